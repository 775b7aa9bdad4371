"""Stored results of the suites as one page, next to what the papers report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from counterpoint.evaluation.report import markdown
from counterpoint.types import UserError

_HEAD = """# {title}

Every table was made by the command under it, with 95 % intervals over cases and noise, not over trainings, and no
correction for many comparisons; the best of a column is bold, be it beyond chance or not. A sentence for each pair of
rows that differ is in the command's own records. Tables marked *as published* are the papers' own, on other
models and other pictures: compare orders, never numbers across the two.
"""


def leaderboard(title: str, results: Sequence[tuple[str, dict[str, Any]]], schema: int) -> str:
    """The page, in Markdown.

    Args:
        title: its heading.
        results: of each run its name and what its ``results.json`` holds.
        schema: the version of the records that this program writes.

    Raises:
        UserError: a record of another version, with no rows, or one that lacks something.
    """
    parts = [_HEAD.format(title=title)]
    papers = json.loads((files("counterpoint.evaluation") / "published.json").read_text())
    ordered = sorted(results, key=lambda run: (str(run[1].get("suite")), run[0]))
    last = {one.get("suite"): name for name, one in ordered}
    for name, one in ordered:
        if one.get("schema") != schema or not one.get("rows") or "suite" not in one:
            said = f"schema {one.get('schema')}" if one.get("rows") and "suite" in one else "no rows of a suite"
            raise UserError(
                f"the results of {one.get('suite')!r} have {said}; this program reads schema {schema}: "
                "run the suite again"
            )
        try:
            parts.append(f"## {name}\n\n{_measured(one)}")
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise UserError(f"the results of {one['suite']!r} lack {error}: run the suite again") from None
        if name == last[one["suite"]]:
            parts += [_published(paper) for paper in papers if paper["suite"] == one["suite"]]
    return "\n".join(parts)


def _measured(result: dict[str, Any]) -> str:
    plain = {key: value for key, value in result.get("settings", {}).items() if not isinstance(value, dict)}
    settings = ", ".join(f"{key} {value}" for key, value in plain.items() if key != "suite")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    paces = [f"{seconds:.2f}" for seconds in sorted(result.get("seconds_a_picture", {}).values())]
    pace = f", {' to '.join(dict.fromkeys([paces[0], paces[-1]]))} s a picture" if paces else ""
    return (
        f"{markdown(result['rows'])}\n`{result['command']}`: {result['n']} cases of each sort{pace}. "
        f"{settings}. {versions}.\n"
    )


def _published(table: dict[str, Any]) -> str:
    lines = [["", *table["measures"]], ["---"] * (1 + len(table["measures"]))]
    for name, values in table["rows"].items():
        lines.append([name, *("–" if value is None else str(value) for value in values)])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"*As published*: {table['paper']}, {table['case']}; {table['settings']}.\n\n{body}\n"
