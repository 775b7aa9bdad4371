"""What a suite is: pictures to make, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from counterpoint.evaluation.statistics import Interval
from counterpoint.types import Image


@dataclass(frozen=True, eq=False)
class Task:
    """One picture to make.

    Attributes:
        key: names it within its suite and becomes its file name.
        prompt: what it shows.
        seed: of its noise.
        images: label -> condition image.
        fusion: the rule, by name.
    """

    key: str
    prompt: str
    seed: int
    images: Mapping[str, Image] = field(default_factory=dict)
    fusion: str = "sum"


@dataclass(frozen=True)
class Row:
    """One line of a table: a fusion, control or file (``name``) on a pair, level or split (``case``)."""

    model: str
    name: str
    case: str
    metrics: dict[str, Interval]

    def record(self) -> dict[str, object]:
        """As ``--json`` has it."""
        return asdict(self)


class Maker(Protocol):
    """Makes the pictures of tasks that have the same controls, fusion and size; knows the model."""

    def __call__(self, tasks: Sequence[Task]) -> list[Image]:
        """One picture a task, independent of the tasks beside it."""
        ...


Pictures = Callable[[str], Image]
"""``key -> (h, w, 3)`` uint8: the finished picture of a task."""
