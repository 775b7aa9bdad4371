"""Making a suite's pictures: in batches, on disk, so that a killed run continues where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL.PngImagePlugin import PngInfo

from counterpoint.evaluation.suite import Finished, Maker, Task
from counterpoint.metrics.cost import Cost, measuring
from counterpoint.types import Image, UserError

_COSTS = "costs.jsonl"
_ASKED = "asked"
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Made:
    """A batch of tasks, their pictures and what they cost."""

    tasks: Sequence[Task]
    pictures: Sequence[Image]
    cost: Cost


Executor = Callable[[Sequence[Sequence[Task]]], Iterator[Made]]
"""Makes batches, in any order, and hands each over when it is done."""


def made_by(maker: Maker, device: torch.device, tasks: Sequence[Task]) -> Made:
    """One batch, made here."""
    with measuring(device) as cost:
        pictures = maker(tasks)
    return Made(tasks, pictures, cost)


def in_turn(maker: Maker, device: torch.device = _CPU) -> Executor:
    """The executor that needs nothing: one batch after the other, in this process."""
    return lambda batches: (made_by(maker, device, batch) for batch in batches)


def make(
    tasks: Sequence[Task],
    execute: Executor,
    folder: Path,
    batch: int = 16,
    listen: Callable[[int, int], None] | None = None,
) -> None:
    """Make every picture that is not there yet as ``folder/<key>.png``; each appears whole or not at all.

    Batches are those of all tasks, and one that lacks a picture is made again whole: a picture's neighbours decide how
    its numbers are rounded, so a run that was killed gives what one that was not would have. Each picture notes what it
    was asked for, so that one of other photos, or of a version that draws other cases, is not taken for what it is not.

    Args:
        tasks: what to make; keys are unique.
        execute: who makes it.
        folder: where they go.
        batch: pictures at a time.
        listen: hears ``(pictures done, pictures in all)``.

    Raises:
        UserError: a picture is there that was asked for something else; nothing is made then.
    """
    there = {task.key for task in tasks if _is_there(folder, task)}
    missing = [several for several in _batches(tasks, batch) if not all(one.key in there for one in several)]
    done = len(tasks) - sum(map(len, missing))
    for made in execute(missing) if missing else ():
        _note(folder, made)
        for task, picture in zip(made.tasks, made.pictures, strict=True):
            path = _path(folder, task.key)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            note = PngInfo()
            note.add_text(_ASKED, _asked(task))
            PIL.Image.fromarray(picture).save(partial, "PNG", pnginfo=note)
            partial.replace(path)
        done += len(made.tasks)
        if listen is not None:
            listen(done, len(tasks))


def costs(folder: Path) -> dict[str, dict[str, float | None]]:
    """``seconds_a_picture`` in its batch, the median over batches, and ``peak_mb``, the largest, of every method."""
    path = folder / _COSTS
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    batches: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        batches.setdefault(line["method"], []).append(line)
    return {
        "seconds_a_picture": {
            method: median(one["seconds"] / one["pictures"] for one in several) for method, several in batches.items()
        },
        "peak_mb": {
            method: max((one["peak_mb"] for one in several if one["peak_mb"]), default=None)
            for method, several in batches.items()
        },
    }


def reader(folder: Path) -> Finished:
    """What reads finished pictures back."""

    def read(key: str) -> Image:
        with PIL.Image.open(_path(folder, key)) as picture:
            return np.array(picture)

    return read


def _note(folder: Path, made: Made) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    peak = made.cost.peak_mb and round(made.cost.peak_mb)
    line = {"method": made.tasks[0].method.name, "pictures": len(made.tasks), "seconds": round(made.cost.seconds, 4)}
    with (folder / _COSTS).open("a") as file:
        file.write(json.dumps({**line, "peak_mb": peak}) + "\n")


def _is_there(folder: Path, task: Task) -> bool:
    path = _path(folder, task.key)
    if not path.exists():
        return False
    with contextlib.suppress(OSError, SyntaxError), PIL.Image.open(path, formats=("PNG",)) as picture:
        if picture.info.get(_ASKED) == _asked(task):
            return True
    raise UserError(
        f"{path} is damaged, or was made for another case than the one that has its name now: choose another --out"
    )


def _asked(task: Task) -> str:
    """Of all that a task says, but for where its networks are: those are told apart by their weights."""
    said = (task.prompt, task.seed, task.images, task.method.name, task.subject, task.layout)
    return hashlib.sha256(repr(_told(said)).encode()).hexdigest()[:16]


def _told(value: Any) -> Any:
    """The same in full, for arrays' own words leave numbers out."""
    if isinstance(value, np.ndarray):
        return value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if is_dataclass(value):
        return [_told(getattr(value, one.name)) for one in fields(value)]
    if isinstance(value, Mapping):
        return [(key, _told(one)) for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return [_told(one) for one in value]
    return value


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.png"


def _batches(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """Tasks that can share a batch."""

    def alike(task: Task) -> tuple[str, ...]:
        return (task.method.name, task.subject, *task.images)

    for _, group in groupby(sorted(tasks, key=alike), key=alike):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]
