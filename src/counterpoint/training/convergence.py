"""ControlNets learn in a jump: for a long time nothing, then within a few hundred steps the control is followed."""

from __future__ import annotations

from collections.abc import Sequence


def sudden_rise(measured: Sequence[tuple[int, float]]) -> int | None:
    """Where a number jumped from one plateau to another: the step at which it had.

    A jump takes one interval or two, is more than 0.1, and is more than four times what changes on either side of it.

    Args:
        measured: ``(step, number)`` in order; on each side of a jump there must be two.
    """
    numbers = [number for _, number in measured]
    for wide in (1, 2):
        rises = {}
        for first in range(1, len(numbers) - wide - 1):
            rise = numbers[first + wide] - numbers[first]
            if rise > max(0.1, 4 * _spread(numbers[: first + 1]), 4 * _spread(numbers[first + wide :])):
                rises[first + wide] = rise
        if rises:
            return measured[max(rises, key=rises.__getitem__)][0]
    return None


def _spread(numbers: Sequence[float]) -> float:
    return max(numbers) - min(numbers)
