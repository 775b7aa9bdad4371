"""Intervals by resampling, and whether two methods differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True, eq=False)
class Resampled:
    """A measure, and what it becomes when samples are drawn again: of distances between sets by the jackknife, of all
    others by the bootstrap. One seed for all, so that samples which belong together are drawn together."""

    metric: Metric
    mean: float
    draws: Tensor

    def interval(self) -> Interval:
        """The measure's own."""
        return self._spread(self.mean, self.draws)

    def minus(self, other: Resampled) -> Interval:
        """The difference of one measure under two methods with the same samples and seeds.

        Raises:
            ValueError: the measures differ, or their numbers of samples.
        """
        one, two = self.metric, other.metric
        if one.name != two.name or len(one.rows) != len(two.rows):
            raise ValueError(
                f"only one measure of the same samples can be compared in pairs, got {one.name} of {len(one.rows)} "
                f"and {two.name} of {len(two.rows)}"
            )
        return self._spread(self.mean - other.mean, self.draws - other.draws)

    def _spread(self, mean: float, draws: Tensor) -> Interval:
        return _jackknife_interval(mean, draws) if self.metric.distinct else _percentile_interval(mean, draws)


def resample(metric: Metric) -> Resampled:
    """Draw a measure's samples again."""
    draw = _without_groups if metric.distinct else _with_replacement
    return Resampled(metric, metric.compute(), draw(metric.rows, metric.reduce))


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
    return _percentile_interval(reduce(rows), _with_replacement(rows, reduce, draws, seed))


def jackknife(rows: Rows, reduce: Reduce = mean) -> Interval:
    """The delete-a-group jackknife (Tukey 1958): every sample counts at most once, as distances between sets need."""
    return _jackknife_interval(reduce(rows), _without_groups(rows, reduce))


def _with_replacement(rows: Rows, reduce: Reduce, draws: int = DRAWS, seed: int = 0) -> Tensor:
    picks = torch.randint(len(rows), (draws, len(rows)), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([reduce(rows[pick]) for pick in picks], dtype=torch.float64)


def _percentile_interval(mean: float, draws: Tensor) -> Interval:
    """``nan`` at both ends where a draw is not finite."""
    if not draws.isfinite().all():
        return Interval(mean, float("nan"), float("nan"))
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


def _without_groups(rows: Rows, reduce: Reduce) -> Tensor:
    """``nan`` where too few samples would be left for a set."""
    if len(rows) < 3:
        return torch.full((1,), torch.nan, dtype=torch.float64)
    groups = min(GROUPS, len(rows))
    group = torch.arange(len(rows)) % groups
    return torch.tensor([reduce(rows[group != one]) for one in range(groups)], dtype=torch.float64)


def _jackknife_interval(mean: float, draws: Tensor) -> Interval:
    deviation = float(((len(draws) - 1) * (draws - draws.mean()).square().mean()).sqrt())
    return Interval(mean, mean - _NORMAL * deviation, mean + _NORMAL * deviation)
