"""Answers foretold on a line: exact where the truth is one, computed again where it bends, each row by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterpoint.control.reuse import Line, Reuse


def test_a_straight_line_is_foretold_and_costs_two_answers_and_a_proof() -> None:
    start, slope = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    asked: list[list[int]] = []

    def truth(time: float, rows: list[int]) -> list[Tensor]:
        asked.append(rows)
        return [(start + time * slope)[rows], 2 * (start + time * slope)[rows]]

    reuse = Reuse(0.05, 2)
    for time in (999.0, 950.0, 900.0, 850.0, 400.0, 50.0):
        found = reuse.ask("pose", time, [0, 1], lambda rows, time=time: truth(time, rows))
        torch.testing.assert_close(found, [start + time * slope, 2 * (start + time * slope)], rtol=1e-3, atol=1e-3)
    assert asked == [[0, 1]] * 3
    assert reuse.thrift["pose"].share == 0.5
    assert reuse.thrift["pose"].error < 1e-3


def test_the_error_is_known_before_it_is_made() -> None:
    """Of a parabola the estimate is what is missed, with caution: its second difference is the same everywhere."""
    line = Line(1)

    def curve(time: float) -> Tensor:
        return torch.tensor([[10 + time**2]])

    for time in (0.0, 1.0, 2.0):
        assert line.error(time, [0]).isinf()
        line.learn(time, [0], [curve(time)])
    (guess,) = line.foretell(4.0, [0])
    missed = float((guess - curve(4.0)).abs())
    assert missed == pytest.approx((4 - 2) * (4 - 1))
    estimate = float(line.error(4.0, [0])) * float(curve(2.0))  # relative to where C was measured
    assert estimate == pytest.approx(2 * missed)


def test_a_time_that_comes_twice_teaches_nothing_about_the_line() -> None:
    """Second-order schedulers ask again where they have just been; equal numbers there are no proof of a line."""

    def truth(time: float) -> Tensor:
        return torch.tensor([[0.0, 10 + time**2]])

    once, twice = Line(1), Line(1)
    for time in (0.0, 1.0, 2.0):
        once.learn(time, [0], [truth(time)])
        twice.learn(time, [0], [truth(time) - 1])
        twice.learn(time, [0], [truth(time)])
    for time in (2.0, 3.0):
        assert torch.equal(*(line.foretell(time, [0])[0] for line in (once, twice)))
        assert 0 <= float(twice.error(time, [0])) < torch.inf
    assert float(twice.error(3.0, [0])) > 0
    broken = Line(1)
    for time in (0.0, 1.0, 2.0):
        broken.learn(time, [0], [truth(time) * float("nan")])
    assert broken.error(3.0, [0]).isinf(), "what is no number is trusted by nobody"


def test_rows_decide_for_themselves() -> None:
    reuse, asked = Reuse(0.1, 2), []

    def truth(time: float, rows: list[int]) -> list[Tensor]:
        asked.append((time, rows))
        return [torch.tensor([[100.0 + time], [10 + 8 * (-1) ** round(time)]])[rows]]

    for time in range(8):
        found = reuse.ask("a", time, [0, 1], lambda rows, time=time: truth(time, rows))
        assert float(found[0][1]) == 10 + 8 * (-1) ** time, "what jumps is computed at every step"
    assert [rows for _, rows in asked[3:]] == [[1]] * 5
    alone = Reuse(0.1, 1)
    for time in range(8):
        kept = alone.ask("a", time, [0], lambda rows, time=time: truth(time, rows))
    assert torch.equal(kept[0][0], found[0][0]), "the same beside a neighbour as alone"


def test_who_has_never_spoken_is_not_foretold() -> None:
    reuse = Reuse(10.0, 2)
    for time in (3.0, 2.0, 1.0):
        reuse.ask("a", time, [0], lambda rows: [torch.ones(len(rows), 1)])
    found = reuse.ask("a", 0.5, [0, 1], lambda rows: [torch.full((len(rows), 1), 7.0)])
    assert found[0].flatten().tolist() == [1, 7]
