"""Layouts: does every thing come out where and in which colour it was asked for?

Protocol of COCO-MIG (Zhou et al. 2024, arXiv:2402.05408, section 5): levels by the number of instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoint.data.layouts import LayoutCase, Levels
from counterpoint.evaluation.suite import CHUNK, Finished, Method, Readers, Row, Task, stack, unstack
from counterpoint.metrics.coco_mig import RANGES, has_colour, instance_score, mean_iou, picture_row, success_rate
from counterpoint.metrics.metric import Metric, mean
from counterpoint.metrics.text import clip_score


@dataclass(frozen=True)
class LayoutSuite:
    """Levels of layouts. A model that reads none is told of them by its prompt alone."""

    levels: Levels

    def tasks(self, n: int, methods: Sequence[Method]) -> list[Task]:
        """Seeds are the numbers of the cases."""
        return [
            Task(_key(method, level, case), case.prompt, case.number, method=method, layout=case.layout)
            for level, first in self.levels.items()
            for case in first(n)
            for method in methods
        ]

    def score(self, finished: Finished, n: int, methods: Sequence[Method], readers: Readers) -> list[Row]:
        """A row a method and level, and one a method over all instances, as the benchmark averages."""
        overall = {method.name: _metrics() for method in methods}
        rows = []
        for level, first in self.levels.items():
            cases, tables = first(n), {method.name: _metrics() for method in methods}
            for start in range(0, len(cases), CHUNK):
                chunk = cases[start : start + CHUNK]
                words = readers.embed_texts([case.prompt for case in chunk])
                for method in methods:
                    pictures = stack([finished(_key(method, level, case)) for case in chunk])
                    scores = _scores(pictures, chunk, readers)
                    likeness = clip_score(readers.embed_pictures(pictures), words)
                    for success, overlap, clip in (tables[method.name], overall[method.name]):
                        success.update(scores)
                        overlap.update(scores)
                        clip.update(likeness)
            rows += [Row(name, f"L{level}", tuple(metrics), rival=True) for name, metrics in tables.items()]
        return [*rows, *(Row(name, "all levels", tuple(metrics), rival=True) for name, metrics in overall.items())]


def _key(method: Method, level: int, case: LayoutCase) -> str:
    return f"L{level}/{method.slug}/{case.number:08d}"


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
