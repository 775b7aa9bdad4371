"""Intervals by resampling, and whether two methods differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from counterpoint.metrics.metric import Metric, Reduce, Rows, mean

DRAWS = 1000
GROUPS = 20
_NORMAL = 1.96


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is beyond doubt."""
        return self.low > 0 or self.high < 0


def interval(metric: Metric) -> Interval:
    """A measure with its interval, by the resampling that suits it."""
    return _spread(metric)(metric.rows, metric.reduce)


def difference(first: Metric, second: Metric) -> Interval:
    """``first - second`` of one measure under two methods with the same samples and seeds, resampled together.

    Raises:
        ValueError: the measures differ, or their numbers of samples.
    """
    if first.name != second.name or len(first.rows) != len(second.rows):
        raise ValueError(
            f"only one measure of the same samples can be compared in pairs, got {first.name} of {len(first.rows)} "
            f"and {second.name} of {len(second.rows)}"
        )
    rows = torch.stack([first.rows, second.rows], 1)
    return _spread(first)(rows, lambda drawn: first.reduce(drawn[:, 0]) - second.reduce(drawn[:, 1]))


def bootstrap(rows: Rows, reduce: Reduce = mean, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The percentile bootstrap (Efron 1979) over samples.

    Rows that belong together (the same scene under two methods, say) are one row with one more axis, and are drawn
    together.

    Args:
        rows: one a sample.
        reduce: what makes a number of them.
        draws: resamplings.
        seed: of the resampling; the same rows always give the same interval.
    """
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(rows), (draws, len(rows)), generator=generator)
    drawn = torch.tensor([reduce(rows[pick]) for pick in picks], dtype=torch.float64)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(reduce(rows), low, high)


def jackknife(rows: Rows, reduce: Reduce = mean, groups: int = GROUPS) -> Interval:
    """The delete-a-group jackknife (Tukey 1958): every sample counts at most once, as distances between sets need."""
    whole = reduce(rows)
    groups = min(groups, len(rows))
    group = torch.arange(len(rows)) % groups
    parts = torch.tensor([reduce(rows[group != one]) for one in range(groups)], dtype=torch.float64)
    deviation = float(((groups - 1) * (parts - parts.mean()).square().mean()).sqrt())
    return Interval(whole, whole - _NORMAL * deviation, whole + _NORMAL * deviation)


def _spread(metric: Metric) -> Callable[[Rows, Reduce], Interval]:
    return jackknife if metric.distinct else bootstrap
