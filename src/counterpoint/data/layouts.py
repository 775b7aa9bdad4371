"""Layouts: which things, in which colours and boxes, a picture should show.

COCO-MIG as Zhou et al. 2024 (MIGC, arXiv:2402.05408) published it, and the same made of scenes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

import numpy as np

from counterpoint.conditions.layout import Instance, Interaction, Layout, Reference
from counterpoint.data.scenes.caption import caption
from counterpoint.data.scenes.layout import draw_layout
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.metrics.coco_mig import COLOURS
from counterpoint.types import Box, Image, UserError

MOST = 4
"""Things that a training scene has at most."""
LEAST_SIDE = 1 / 8
"""Of a box, as a share of the picture: COCO-MIG leaves smaller things out."""
_START = SPLITS["test"].start


@dataclass(frozen=True)
class Wanted:
    """One instance: its name without its colour, its colour, and its box ``(x0, y0, x1, y1)`` in 0..1."""

    name: str
    colour: str
    box: Box

    @property
    def phrase(self) -> str:
        """``a red ball``, as COCO-MIG labels it."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.name}"


@dataclass(frozen=True)
class LayoutCase:
    """A prompt and what it should show where; ``number`` seeds its noise, ``reference`` is the number of the scene
    whose style is wanted, if one is, and ``picture`` the scene that the layout was read from, if it was."""

    number: int
    prompt: str
    wanted: tuple[Wanted, ...]
    reference: int | None = None
    picture: Image | None = field(default=None, repr=False, compare=False)

    @property
    def layout(self) -> Layout:
        """The same for a model that reads layouts."""
        return Layout(tuple(Instance(one.phrase, one.box) for one in self.wanted), (), _reference(self.reference))


@dataclass(frozen=True)
class ActionCase:
    """Somebody who does something with something. The prompt names both and not what is done, which only the layout
    says: to follow a prompt is no achievement of what reads layouts.

    Attributes:
        number: of the scene, seeds the noise.
        prompt: what is there.
        layout: where, and who does what.
        action: what is done.
        thing: name of what it is done to.
        picture: the scene that shows it.
    """

    number: int
    prompt: str
    layout: Layout
    action: str
    thing: str
    picture: Image = field(repr=False, compare=False)


def _reference(number: int | None) -> Reference | None:
    return None if number is None else Reference(scene(number).image)


Actions = Callable[[int], Sequence[ActionCase]]
"""The first ``n`` cases."""
Levels = Mapping[int, Callable[[int], Sequence[LayoutCase]]]
"""Number of instances -> the first ``n`` cases with as many."""


def scene_levels() -> Levels:
    """Two to six things of a scene; five and six are more than any training scene has."""

    def first(level: int, n: int) -> list[LayoutCase]:
        found = (_of_scene(_START + number, level) for number in count())
        return list(islice((case for case in found if case), n))

    return {level: lambda n, level=level: first(level, n) for level in range(2, 7)}


def _of_scene(number: int, level: int) -> LayoutCase | None:
    things = level if level > MOST else None
    drawn = draw_layout(np.random.Generator(np.random.PCG64(number)), "things", "photo", things)
    if len(drawn.members) != level:
        return None
    one = scene(number, content="things", style="photo", things=things)
    if any(min(x1 - x0, y1 - y0) < LEAST_SIDE for x0, y0, x1, y1 in (thing.box for thing in one.instances)):
        return None
    wanted = tuple(Wanted(thing.name, thing.colour, thing.box) for thing in one.instances)
    return LayoutCase(number, caption(one.layout, "brief"), wanted, number + 1, one.image)


def scene_actions() -> Actions:
    """Interactions of scenes."""
    return lambda n: [_action(_START + number) for number in range(n)]


def _action(number: int) -> ActionCase:
    one = scene(number, content="interaction", style="photo")
    (who, action, whom) = one.triplets[0]
    things = tuple(Instance(thing.phrase, thing.box) for thing in one.instances)
    prompt = caption(replace(one.layout, triplets=()), "brief")
    layout = Layout(things, (Interaction(who, action, whom),), _reference(number + 1))
    return ActionCase(number, prompt, layout, action, one.instances[whom].name, one.image)


def read_mig_bench(path: Path) -> Levels:
    """``mig_bench.json`` as it is published: 160 layouts each of two to six instances.

    Raises:
        UserError: the file is something else.
    """
    try:
        entries = json.loads(path.read_text())
        cases = [_published(int(key), entry) for key, entry in entries.items()]
    except (OSError, UnicodeDecodeError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no COCO-MIG file (mig_bench.json): {type(error).__name__} {error}") from None
    levels: dict[int, list[LayoutCase]] = {}
    for case in cases:
        levels.setdefault(len(case.wanted), []).append(case)
    if not levels or 0 in levels:
        raise UserError(f"{path} has no layouts, or one without instances")
    return {level: lambda n, level=level: levels[level][:n] for level in sorted(levels)}


def _published(number: int, entry: Mapping[str, object]) -> LayoutCase:
    wanted = []
    for segment in entry["segment"]:  # type: ignore[attr-defined]
        article, colour, name = segment["label"].split(" ", 2)
        x0, y0, x1, y1 = (_inside(float(end)) for end in segment["bbox"])
        if colour not in COLOURS or not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(f"entry {number}: {article} {colour} {name} at {segment['bbox']}")
        wanted.append(Wanted(name, colour, (x0, y0, x1, y1)))
    return LayoutCase(number, str(entry["caption"]).strip(), tuple(wanted))


def _inside(end: float, rounding: float = 1e-3) -> float:
    """An edge that leaves the picture by rounding only, which pixels divided by a side do, put back on its edge."""
    return min(max(end, 0.0), 1.0) if -rounding <= end <= 1 + rounding else end
