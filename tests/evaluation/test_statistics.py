"""Intervals mean what they say."""

from __future__ import annotations

import pytest
import torch

from counterpoint.evaluation.statistics import bootstrap


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        interval = bootstrap(torch.randn(60, generator=generator, dtype=torch.float64), draws=200, seed=seed)
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.98


def test_it_agrees_with_theory_on_a_mean() -> None:
    rows = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = bootstrap(rows)
    half = 1.96 * float(rows.std()) / 2000**0.5
    assert interval.mean == float(rows.mean())
    assert interval.high - interval.mean == pytest.approx(half, rel=0.15)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.15)


def test_same_rows_same_interval() -> None:
    rows = torch.rand(50, 3)
    assert bootstrap(rows) == bootstrap(rows)


def test_rows_of_a_scene_are_drawn_together() -> None:
    """The difference of two measures that differ by a constant has no uncertainty."""
    first = torch.rand(40, dtype=torch.float64)
    rows = torch.stack([first, first + 1], 1)
    interval = bootstrap(rows, lambda drawn: float(drawn[:, 1].mean() - drawn[:, 0].mean()))
    assert interval.low == pytest.approx(1)
    assert interval.high == pytest.approx(1)
