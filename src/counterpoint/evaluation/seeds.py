"""Several sampling seeds for every case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from counterpoint.evaluation.suite import Finished, Method, Readers, Row, Suite, Task
from counterpoint.metrics.metric import Metric, Rows, mean

_APART = 1 << 32
"""Between the seeds of one case, so that no two cases ever share one."""


@dataclass(frozen=True)
class Seeded:
    """A suite whose every picture is made ``seeds`` times; the first seed of a case is the suite's own.

    A number is the mean over seeds of what the pictures of one seed give, as ControlNet++ (arXiv:2404.07987) averages
    its groups. Intervals draw cases, each with all of its seeds: pictures of one case are no independent samples.
    """

    suite: Suite
    seeds: int

    def tasks(self, n: int, methods: Sequence[Method]) -> list[Task]:
        """Those of the suite, once a seed."""
        tasks = self.suite.tasks(n, methods)
        return [
            replace(task, key=_key(task.key, one), seed=task.seed + one * _APART)
            for one in range(self.seeds)
            for task in tasks
        ]

    def score(self, finished: Finished, n: int, methods: Sequence[Method], readers: Readers) -> list[Row]:
        """The suite's rows."""
        tables = [
            self.suite.score(lambda key, one=one: finished(_key(key, one)), n, methods, readers)
            for one in range(self.seeds)
        ]
        return [_together(rows) for rows in zip(*tables, strict=True)]


def _key(key: str, one: int) -> str:
    return f"{key}-{one}" if one else key


def _together(rows: Sequence[Row]) -> Row:
    """One row of a table from that of every seed."""
    metrics = zip(*(row.metrics for row in rows), strict=True)
    return replace(rows[0], metrics=tuple(_averaged(same) for same in metrics))


def _averaged(same: Sequence[Metric]) -> Metric:
    """One measure whose rows ``(n, seeds, ...)`` hold every seed's."""
    first = same[0]

    def reduce(rows: Rows) -> float:
        return sum(map(first.reduce, rows.unbind(1))) / len(same)

    how = mean if first.reduce is mean else reduce  # who knows a mean can have its samples one by one
    made = Metric(first.name, first.measure, how, higher=first.higher, distinct=first.distinct)
    made.add(torch.stack([metric.rows for metric in same], 1))
    made.note = next((metric.note for metric in same if metric.note), "")
    return made
