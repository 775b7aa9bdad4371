"""The command line around stored results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "folders that hold results"),
        ("[1]", "is no results file"),
        ("{", "is no results file"),
        ("{}", "no rows of a suite"),
    ],
)
def test_leaderboard_of_what_is_no_result(cli, tmp_path: Path, content: str | None, said: str) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    if content is not None:
        (folder / "results.json").write_text(content)
    status, _, message = cli("evaluate", "leaderboard", folder, "--out", tmp_path / "page.md")
    assert status == 2
    assert said in message
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    ("suite", "more", "rows"),
    [
        ("conflicting", ["--fusion", "sum", "--fusion", "mean"], [("sum", "pose+seg"), ("mean", "pose+depth")]),
        ("silent", ["--fusion", "sum", "--gate-silence"], [("sum gated", "crops, brief prompt")]),
        ("layout", [], [("base", "L2"), ("base", "all levels")]),
        ("style", [], [("base", "reference of another scene")]),
        ("conservativity", [], [("canny", "noisy pictures"), ("seg", "noisy pictures")]),
        ("tiny-quality", [], [("codec", "test scenes"), ("hed", "test scenes")]),
    ],
)
def test_suites_on_the_family(
    cli, tiny: Path, tmp_path: Path, suite: str, more: list[str], rows: list[tuple[str, str]]
) -> None:
    arguments = ["evaluate", suite, "-n", 3, "--steps", 1, "--out", tmp_path / "run", "--json", *more]
    status, out, error = cli(*arguments)
    assert status == 0, error
    record = json.loads(out)
    assert set(rows) <= {(row["name"], row["case"]) for row in record["rows"]}
    assert record == json.loads((tmp_path / "run" / "results.json").read_text())
    page = (tmp_path / "run" / "index.html").read_text()
    assert all(row["name"] in page and row["case"] in page for row in record["rows"])
    for name in ("results.md", "results.tex"):
        assert (tmp_path / "run" / name).read_text()
    again = json.loads(cli(*arguments)[1])
    assert again["rows"] == record["rows"], "finished pictures are read, not made again"
    arguments[5] = 2
    status, _, error = cli(*arguments)
    assert (status, "steps: 1 -> 2" in error) == (2, True)
