"""ControlNets learn in a jump: for a long time nothing, then within a few hundred steps the control is followed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def sudden_rise(measured: Sequence[tuple[int, float]]) -> int | None:
    """Where a number jumped: the step after the largest rise, if that is more than half of all that it has risen.

    Args:
        measured: ``(step, number)`` in order; fewer than three are too few.
    """
    if len(measured) < 3:
        return None
    numbers = [number for _, number in measured]
    rises = [later - sooner for sooner, later in pairwise(numbers)]
    largest, total = max(rises), max(numbers) - numbers[0]
    return measured[rises.index(largest) + 1][0] if largest > 0.1 and largest > total / 2 else None
