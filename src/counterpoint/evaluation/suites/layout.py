"""Layouts: does every thing come out where and in which colour it was asked for, and is done what was asked for?

Protocol of COCO-MIG (Zhou et al. 2024, arXiv:2402.05408, section 5): levels by the number of instances. Actions are
read from a person's joints and where the thing is, on scenes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoint.data.layouts import ActionCase, Actions, LayoutCase, Levels
from counterpoint.evaluation.suite import CHUNK, Finished, Method, Readers, Row, Task, stack, unstack, weighed
from counterpoint.metrics.actions import action_shown
from counterpoint.metrics.coco_mig import RANGES, has_colour, instance_score, mean_iou, picture_row, success_rate
from counterpoint.metrics.metric import Metric, mean
from counterpoint.metrics.text import clip_score
from counterpoint.types import Box, Image


@dataclass(frozen=True)
class LayoutSuite:
    """Levels of layouts, and actions. A model that reads none is told of them by its prompt alone."""

    levels: Levels
    actions: Actions | None = None

    def tasks(self, n: int, methods: Sequence[Method]) -> list[Task]:
        """Seeds are the numbers of the cases."""
        cases = [(f"L{level}", case) for level, first in self.levels.items() for case in first(n)]
        cases += [(_ACTIONS, case) for case in self._actions(n)]
        return [
            Task(_key(method, sort, case), case.prompt, case.number, method=method, layout=weighed(layout, method))
            for sort, case in cases
            for layout in [case.layout]
            for method in methods
        ]

    def score(self, finished: Finished, n: int, methods: Sequence[Method], readers: Readers) -> list[Row]:
        """A row a method and level, one a method over all instances, as the benchmark averages, and one on actions. On
        scenes the first row of each is the scenes' own: what a picture that is right would have."""
        sources = self._sources(finished, methods)
        overall = {name: _metrics() for name in sources}
        rows = []
        for level, first in self.levels.items():
            cases, tables = first(n), {name: _metrics() for name in sources}
            for start in range(0, len(cases), CHUNK):
                chunk = cases[start : start + CHUNK]
                words = readers.embed_texts([case.prompt for case in chunk])
                for name, picture in sources.items():
                    pictures = stack([picture(f"L{level}", case) for case in chunk])
                    scores = _scores(pictures, chunk, readers)
                    likeness = clip_score(readers.embed_pictures(pictures), words)
                    for success, overlap, clip in (tables[name], overall[name]):
                        success.update(scores)
                        overlap.update(scores)
                        clip.update(likeness)
            rows += [_row(name, f"L{level}", metrics) for name, metrics in tables.items()]
        rows += [_row(name, "all levels", metrics) for name, metrics in overall.items()]
        return [*rows, *self._score_actions(sources, n, readers)]

    def _sources(self, finished: Finished, methods: Sequence[Method]) -> dict[str, _Source]:
        """Name of a row -> where its pictures are from."""
        made: dict[str, _Source] = {
            method.name: lambda sort, case, method=method: finished(_key(method, sort, case)) for method in methods
        }
        known = next(iter(self.levels.values()))(1)[0].picture is not None
        return {_SCENES: _scenes_own, **made} if known else made

    def _actions(self, n: int) -> Sequence[ActionCase]:
        return () if self.actions is None else self.actions(n)

    def _score_actions(self, sources: dict[str, _Source], n: int, readers: Readers) -> list[Row]:
        cases = self._actions(n)
        tables = {name: Metric("action", lambda rows: rows, mean) for name in sources}
        for start in range(0, len(cases), CHUNK):
            chunk = cases[start : start + CHUNK]
            for name, picture in sources.items():
                pictures = stack([picture(_ACTIONS, case) for case in chunk])
                tables[name].update(_right_actions(pictures, chunk, readers))
        return [_row(name, _ACTIONS, (metric,)) for name, metric in tables.items()] if cases else []


_ACTIONS = "actions"
_SCENES = "the scenes themselves"
_Source = Callable[[str, LayoutCase | ActionCase], Image]
"""Sort and case -> picture."""


def _scenes_own(_: str, case: LayoutCase | ActionCase) -> Image:
    assert case.picture is not None
    return case.picture


def _row(name: str, case: str, metrics: Sequence[Metric]) -> Row:
    return Row(name, case, tuple(metrics), rival=name != _SCENES)


def _key(method: Method, sort: str, case: LayoutCase | ActionCase) -> str:
    return f"{sort}/{method.slug}/{case.number:08d}"


def _right_actions(pictures: Tensor, cases: Sequence[ActionCase], readers: Readers) -> Tensor:
    """1 for each picture that shows its action, with whatever it shows of the thing's kind, or 0."""
    everywhere: list[list[Box]] = [[(0.0, 0.0, 1.0, 1.0)]] * len(cases)
    things = readers.segment(pictures, [[case.thing] for case in cases], everywhere)
    seen = zip(cases, readers.joints(pictures), readers.person(pictures), things, strict=True)
    return torch.tensor(
        [float(action_shown(joints.numpy(), person.numpy(), thing) == case.action)
         for case, joints, person, (thing,) in seen]
    )  # fmt: skip


def _metrics() -> list[Metric]:
    """Of rows that are computed once for all of them."""
    names = (("success", success_rate), ("miou", mean_iou), ("clip", mean))
    return [Metric(name, lambda rows: rows, reduce) for name, reduce in names]


def _scores(pictures: Tensor, cases: Sequence[LayoutCase], readers: Readers) -> Tensor:
    names = [[one.name for one in case.wanted] for case in cases]
    seen = readers.detect(pictures, names)
    masks = readers.segment(pictures, names, [[one.box for one in case.wanted] for case in cases])
    return torch.stack(
        [
            picture_row(
                [
                    instance_score(one.box, boxes, has_colour(image, mask, RANGES[one.colour]))
                    for one, boxes, mask in zip(case.wanted, several, shapes, strict=True)
                ]
            )
            for image, case, several, shapes in zip(unstack(pictures), cases, seen, masks, strict=True)
        ]
    )
