"""Stored results become one page, and the papers' numbers stay apart."""

from __future__ import annotations

import json
from importlib.resources import files

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
            {
                "model": "tiny",
                "name": name,
                "case": "pose+seg",
                "metrics": {"miou_p": {**value, "mean": mean, **than_first}},
                "rival": True,
            }
            for name, mean, than_first in (("sum", 0.4, {}), ("cross", 0.6, {"than_first": "better"}))
        ],
        "seconds_a_picture": {"sum": 0.31, "cross": 0.52},
        "command": "counterpoint evaluate conflicting",
        "versions": {"torch": "2"},
        "settings": {"suite": "conflicting", "steps": 20},
        **changes,
    }


def test_measured_and_published_tables_are_told_apart() -> None:
    page = leaderboard("Rules", [("run", result())], 1)
    assert page.startswith("# Rules\n")
    measured, published = page.split("*As published*", 1)
    assert "**0.6" in measured
    assert next(line for line in measured.splitlines() if line.startswith("| cross")).endswith("▲ |")
    assert "▲" not in next(line for line in measured.splitlines() if line.startswith("| sum"))
    assert "`counterpoint evaluate conflicting`: 64 cases of each sort, 0.31 to 0.52 s a picture. " in measured
    assert "| Cross-ControlNet (cross) | 0.2978 | 0.1983 | 0.3719 |" in published


def test_every_suite_has_its_papers_numbers() -> None:
    """Copied digit by digit, with a dash where a paper has no number."""
    suites = ("conflicting", "complementary", "silent", "conservativity", "single", "layout")
    page = leaderboard("Rules", [(suite, result(suite=suite)) for suite in suites], 1)
    for line in (
        "| Cross-ControlNet (cross) | 3.2434 | 0.0736 | 0.1008 |",
        "| ControlNet 0.5 | 65.9972 | 108.2335 | 81.5698 | 75.4173 |",
        "| MIControlNet (2-stage) | 61.6007 | 61.2391 | 56.3576 | 57.4142 |",
        "| OpenPose, detailed prompts | 99.09 | 2.7 | 95.34 | 2.92 | 94.16 | 2.91 |",
        "| MIControlNet (2-stage) | 0.1174 | 0.1894 | 0.0274 |",
        "| T2I-Adapter (SDXL) | – | – | 0.639 | – | 39.75 | – | – | – |",
        "| InteractDiffusion (+MIGC) | 57.18 | 52.91 | 52.65 | 49.62 | 47.39 | 50.81 | 50.73 |",
    ):
        assert line.removesuffix(" |") in page, line


def test_runs_of_one_suite_stand_together_before_its_papers_numbers() -> None:
    page = leaderboard("Methods", [(run, result(suite="single")) for run in ("seg", "depth")], 1)
    order = [page.index(part) for part in ("## depth", "## seg", "*As published*: InnerControl")]
    assert order == sorted(order)
    assert page.count("*As published*: InnerControl, table 1") == 1


def test_tables_are_whole() -> None:
    for table in json.loads((files("counterpoint.evaluation") / "published.json").read_text()):
        assert {len(values) for values in table["rows"].values()} == {len(table["measures"])}, table["paper"]


@pytest.mark.parametrize("missing", ["versions", "command", "n"])
def test_results_that_lack_something_are_refused(missing: str) -> None:
    whole = result()
    whole.pop(missing)
    with pytest.raises(UserError, match=f"lack '{missing}': run the suite again"):
        leaderboard("Rules", [("run", whole)], 1)


@pytest.mark.parametrize("changes", [{"schema": 0}, {"schema": None}, {"rows": []}])
def test_results_of_another_version_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match="run the suite again"):
        leaderboard("Rules", [("run", result(**changes))], 1)
