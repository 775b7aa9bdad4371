"""Intervals by resampling: what a number would have been with other samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from counterpoint.metrics.metric import Reduce, Rows, mean

DRAWS = 1000


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval."""

    mean: float
    low: float
    high: float


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
