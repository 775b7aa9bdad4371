"""Stored results become one page, and the papers' numbers stay apart."""

from __future__ import annotations

import pytest

from counterpoint.evaluation.leaderboard import leaderboard
from counterpoint.types import UserError


def result(**changes: object) -> dict:
    value = {"mean": 0.4, "low": 0.3, "high": 0.5, "higher": True}
    return {
        "schema": 1,
        "suite": "conflicting",
        "n": 64,
        "rows": [
            {"model": "tiny", "name": name, "case": "pose+seg", "metrics": {"miou_p": {**value, "mean": mean}}}
            for name, mean in (("sum", 0.4), ("cross", 0.6))
        ],
        "differences": ["pose+seg: cross beats sum in miou_p by 0.2"],
        "seconds": 12.3,
        "command": "counterpoint evaluate conflicting",
        "versions": {"torch": "2"},
        "settings": {"suite": "conflicting", "steps": 20},
        **changes,
    }


def test_measured_and_published_tables_are_told_apart() -> None:
    page = leaderboard([result()], 1)
    measured, published = page.split("*As published*", 1)
    assert "**0.6" in measured
    assert "`counterpoint evaluate conflicting`: 64 cases" in measured
    assert "cross beats sum" in measured
    assert "| Cross-ControlNet (cross) | 0.2978 | 0.1983 | 0.3719 |" in published


@pytest.mark.parametrize("changes", [{"schema": 0}, {"schema": None}, {"rows": []}])
def test_results_of_another_version_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match="run the suite again"):
        leaderboard([result(**changes)], 1)
