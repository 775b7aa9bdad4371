"""The command line around stored results."""

from __future__ import annotations

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
