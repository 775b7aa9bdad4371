"""From rows to what people and programs read: records, sentences, tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from counterpoint.evaluation.statistics import Interval, Resampled
from counterpoint.evaluation.suite import Row
from counterpoint.metrics.metric import mean

FEWEST = 20
"""Pairs below which a resampled interval is too narrow to draw conclusions from."""
Record = dict[str, Any]
"""A row as JSON has it: ``model``, ``name``, ``case`` and ``metrics`` with mean, low, high and higher-is-better; a row
or a measure may have a ``note``, and rows that compete are each other's ``rival``. ``than_first`` is ``"better"`` or
``"worse"`` where a measure differs beyond chance from the case's first rival."""
_MARKS = {"better": "▲", "worse": "▼"}


def records(rows: Sequence[Row], model: str) -> list[Record]:
    """Every row with its intervals."""
    firsts = {row.case: row for row in reversed(rows) if _counts(row)}
    return [
        {
            "model": model,
            "name": row.name,
            "case": row.case,
            "metrics": {
                one.metric.name: _value(one) | _standing(one, base)
                for one, base in zip(row.resampled, _beside(row, firsts), strict=True)
            },
            **({"rival": True} if row.rival else {}),
            **({"note": row.note} if row.note else {}),
        }
        for row in rows
    ]


def _value(one: Resampled) -> dict[str, Any]:
    """Its interval; ``None`` for what is not finite, which JSON cannot hold."""
    found = {end: value if math.isfinite(value) else None for end, value in asdict(one.interval()).items()}
    rows = one.metric.rows
    lost = int((~rows.isfinite().reshape(len(rows), -1).all(1)).sum())
    notes = [one.metric.note] * bool(one.metric.note) + [f"no finite number for {lost} of {len(rows)}"] * bool(lost)
    return {**found, "higher": one.metric.higher, **({"note": "; ".join(notes)} if notes else {})}


def _counts(row: Row) -> bool:
    return row.rival and len(row.metrics[0].rows) >= FEWEST


def _beside(row: Row, firsts: Mapping[str, Row]) -> Sequence[Resampled | None]:
    """The same measures of the case's first rival, if there is another one to stand beside."""
    first = firsts.get(row.case)
    return first.resampled if first is not None and first is not row and _counts(row) else [None] * len(row.resampled)


def _compared(one: Resampled, two: Resampled) -> tuple[Interval, bool] | None:
    """Their difference and whether ``one`` is better; ``None`` where chance could make it."""
    gap = one.minus(two)
    return (gap, (gap.mean > 0) == one.metric.higher) if gap.excludes_zero else None


def _standing(one: Resampled, base: Resampled | None) -> dict[str, str]:
    found = None if base is None else _compared(one, base)
    return {} if found is None else {"than_first": "better" if found[1] else "worse"}


def sentences(rows: Sequence[Row]) -> list[str]:
    """One sentence for each difference between two rivals whose 95 % interval excludes zero.

    Sets of fewer than :data:`FEWEST` pairs get none.
    """
    said = []
    rivals = [row for row in rows if _counts(row)]
    for first, second in combinations(rivals, 2):
        if first.case != second.case:
            continue
        for one, two in zip(first.resampled, second.resampled, strict=True):
            if found := _compared(one, two):
                gap, ahead = found
                better, worse = (first, second) if ahead else (second, first)
                low, high = sorted((abs(gap.low), abs(gap.high)))
                said.append(
                    f"{first.case}: {better.name} beats {worse.name} in {one.metric.name} by {abs(gap.mean):.3g} "
                    f"(95 % interval {low:.3g} to {high:.3g}, {len(one.metric.rows)} pairs with the same seeds)."
                )
    return said


def scores(rows: Sequence[Row]) -> str:
    """A line a sample as CSV, for statistics of one's own: of measures that are the average of their samples ``(n,
    seeds, ...)``. What has no number there is empty."""
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\n").writerow
    write(("case", "name", "measure", "sample", "seed", "value"))
    for row in rows:
        for metric in row.metrics:
            if metric.reduce is mean:
                values = metric.rows.reshape(*metric.rows.shape[:2], -1).mean(-1)
                for (sample, seed), value in np.ndenumerate(values.numpy()):
                    write((row.case, row.name, metric.name, sample, seed, value if math.isfinite(value) else ""))
    return file.getvalue()


def plain(rows: Sequence[Record]) -> str:
    """Aligned text: one line a measure, ``mean [low, high]``."""
    lines = [("case", "name", "measure", "mean", "95 % interval")]
    lines += [
        (row["case"], row["name"], _measure(name, [row]), number(value["mean"]), _bounds(value))
        for row in rows
        for name, value in row["metrics"].items()
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    aligned = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*(line.rstrip() for line in aligned), *_notes(rows)])


def markdown(rows: Sequence[Record]) -> str:
    """One table a case: methods down, measures across; the best of each measure is bold, and what differs from the
    first row beyond chance is marked."""
    made = []
    for case, group in tables(rows):
        header = ["", *(_measure(name, group) for name in group[0]["metrics"])]
        lines = [header, ["---"] * len(header)]
        lines += [
            [_pipes(row["name"]), *(_cell(name, row, group, "**{}**") + _mark(row, name) for name in row["metrics"])]
            for row in group
        ]
        made.append(f"**{_pipes(case)}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    marked = any(_mark(row, name) for row in rows for name in row["metrics"])
    legend = ["▲ better, ▼ worse than the first row, beyond chance, on the same cases and noise"] * marked
    return "\n\n".join([*made, *legend, *_notes(rows)]) + "\n"


def latex(rows: Sequence[Record]) -> str:
    """The same as ``tabular`` environments."""
    made = []
    for case, group in tables(rows):
        names = list(group[0]["metrics"])
        arrows = {"↑": r" $\uparrow$", "↓": r" $\downarrow$", "": ""}
        header = " & ".join(["", *(f"{_escape(name)}{arrows[way(name, group)]}" for name in names)])
        lines = [
            " & ".join([_escape(row["name"]), *(_cell(name, row, group, r"\textbf{{{}}}") for name in names)]) + r" \\"
            for row in group
        ]
        made.append(
            "\n".join(
                [
                    f"% {' '.join(case.split())}",
                    rf"\begin{{tabular}}{{l{'c' * len(names)}}}",
                    r"\hline",
                    header + r" \\",
                    r"\hline",
                    *lines,
                    r"\hline",
                    r"\end{tabular}",
                ]
            )
        )
    return "\n\n".join(made) + "\n"


def tables(rows: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Rows of one case that have the same measures, with the case's name."""
    grouped: dict[tuple[str, tuple[str, ...]], list[Record]] = {}
    for row in rows:
        grouped.setdefault((row["case"], tuple(row["metrics"])), []).append(row)
    return [(case, group) for (case, _), group in grouped.items()]


def _cell(name: str, row: Record, group: Sequence[Record], bold: str) -> str:
    value = row["metrics"][name]
    text = number(value["mean"])
    if is_best(row, group, name):
        text = bold.format(text)
    return text if value["low"] is None else f"{text} ± {number((value['high'] - value['low']) / 2)}"


def _mark(row: Record, name: str) -> str:
    found = row["metrics"][name].get("than_first")
    return f" {_MARKS[found]}" if found else ""


def is_best(row: Record, group: Sequence[Record], name: str) -> bool:
    """Whether a row has the best mean of a measure, of two or more rivals that have one."""
    rivals = [one["metrics"][name] for one in group if one.get("rival") and one["metrics"][name]["mean"] is not None]
    if len(rivals) < 2 or not row.get("rival"):
        return False
    pick = max if rivals[0]["higher"] else min
    return bool(row["metrics"][name]["mean"] == pick(value["mean"] for value in rivals))


def way(name: str, group: Sequence[Record]) -> str:
    """An arrow to where a measure is better; none where rows differ in that."""
    ways = {row["metrics"][name]["higher"] for row in group}
    return "" if len(ways) > 1 else "↑" if ways == {True} else "↓"


def _measure(name: str, group: Sequence[Record]) -> str:
    """Its name, which way is better, and an asterisk where there is a note."""
    noted = any("note" in row["metrics"][name] for row in group)
    return f"{name} {way(name, group)}".rstrip() + "*" * noted


def _notes(rows: Sequence[Record]) -> list[str]:
    measures = {f"* {name}: {one['note']}" for row in rows for name, one in row["metrics"].items() if "note" in one}
    return sorted(measures | {f"* {row['name']}, {row['case']}: {row['note']}" for row in rows if "note" in row})


def _bounds(value: Record) -> str:
    return f"[{number(value['low'])}, {number(value['high'])}]"


def number(value: float | None) -> str:
    """Three digits after the point, or of what is small three in all; a dash for what is not finite."""
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}" if abs(value) >= 0.1 or not value else f"{value:.3g}"


_LATEX = str.maketrans(
    {one: rf"\{one}" for one in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
)


def _escape(text: str) -> str:
    return text.translate(_LATEX)


def _pipes(text: str) -> str:
    """A name in a Markdown table."""
    return text.replace("|", r"\|")
