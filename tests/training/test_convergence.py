"""A jump is reported where it is, and a slow climb is none."""

from __future__ import annotations

import pytest

from counterpoint.training.convergence import sudden_rise


@pytest.mark.parametrize(
    ("numbers", "step"),
    [
        ([0.0, 0.02, 0.01, 0.55, 0.6, 0.62], 30),
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], None),
        ([0.0, 0.01, 0.08], None),
        ([0.0, 0.9], None),
        ([0.3, 0.2, 0.1, 0.0], None),
        ([0.0, 0.01, 0.0, 0.3, 0.6, 0.61], 40),
        ([0.0, 0.05, 0.4, 0.6, 0.7, 0.75], None),
        ([0.0, 0.01, 0.02, 0.4], None),
        ([0.0, 0.3, 0.4, 0.45], None),
    ],
)
def test_sudden_rise(numbers: list[float], step: int | None) -> None:
    assert sudden_rise([(10 * i, number) for i, number in enumerate(numbers)]) == step
