"""One self-contained page for a suite's results: tables, pictures, quality against time."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from counterpoint.conditions.layout import draw_layout
from counterpoint.evaluation.report import Record, is_best, number, tables, way
from counterpoint.evaluation.suite import Finished, Task
from counterpoint.pages import render
from counterpoint.types import Image

STRIPS = 6
"""Cases of each sort that are shown: the first ones, never chosen ones."""


Strips = dict[str, list[dict[str, Any]]]
"""Sort of case -> strips: a ``prompt`` and ``pictures`` with ``label`` and ``data``."""


def page(results: dict[str, Any], strips: Strips) -> str:
    """The page.

    Args:
        results: what ``results.json`` holds.
        strips: from :func:`strips`; empty where nothing was made.
    """
    shown = [case for case, _ in tables(results["rows"])]
    pace = results.get("seconds_a_picture", {})
    return render(
        "evaluation.html",
        results=results,
        tables=tables(results["rows"]),
        pace=pace,
        timed=lambda group, name: [row for row in group if row["name"] in pace and None not in _ends(row, name)],
        memory=results.get("peak_mb", {}),
        strips=strips,
        others=[strip for sort, several in strips.items() if sort not in shown for strip in several],
        is_best=is_best,
        way=way,
        plot=_plot,
        number=number,
    )


def strips(tasks: Sequence[Task], finished: Finished) -> Strips:
    """The controls of the first cases of each sort, then every method's result."""
    sorts: dict[str, dict[int, list[Task]]] = {}
    for task in tasks:
        cases = sorts.setdefault(task.key.partition("/")[0], {})
        if task.seed in cases or len(cases) < STRIPS:
            cases.setdefault(task.seed, []).append(task)
    return {sort: [_strip(same, finished) for same in cases.values()] for sort, cases in sorts.items()}


def _strip(same: Sequence[Task], finished: Finished) -> dict[str, Any]:
    controls = [{"label": kind, "data": _data(image)} for kind, image in same[0].images.items()]
    results = [{"label": task.method.name, "data": _data(_shown(task, finished))} for task in same]
    return {"prompt": same[0].prompt, "pictures": controls + results}


def _shown(task: Task, finished: Finished) -> Image:
    """A result, with its layout drawn over it."""
    picture = finished(task.key)
    return picture if task.layout is None else draw_layout(picture, task.layout)


def _data(image: Image) -> str:
    file = io.BytesIO()
    PIL.Image.fromarray(np.asarray(image)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _ends(row: Record, name: str) -> list[float | None]:
    return [row["metrics"][name][end] for end in ("low", "mean", "high")]


def _plot(group: Sequence[Record], name: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Where the marks of quality against seconds a picture lie: shares of the plot, from its lower left corner."""
    values = [row["metrics"][name] for row in group]
    low, high = min(value["low"] for value in values), max(value["high"] for value in values)
    last, span = 1.2 * max(seconds[row["name"]] for row in group), (high - low) or 1.0
    marks = [
        {"name": row["name"], "x": seconds[row["name"]] / last}
        | {end: (value[end] - low) / span for end in ("low", "mean", "high")}
        for row, value in zip(group, values, strict=True)
    ]
    _name(marks)
    return {"marks": marks, "last": last, "low": low, "high": high}


def _name(marks: list[dict[str, Any]]) -> None:
    """Give every mark the height of its name, so that names beside each other do not overlap."""
    wide, high, top = 0.35, 0.1, 1.0
    marks.sort(key=lambda mark: mark["mean"])
    for i, mark in enumerate(marks):
        below = [other["label"] + high for other in marks[:i] if abs(other["x"] - mark["x"]) < wide]
        mark["label"] = max([mark["mean"], *below])
    for i, mark in reversed(list(enumerate(marks))):
        above = [other["label"] - high for other in marks[i + 1 :] if abs(other["x"] - mark["x"]) < wide]
        mark["label"] = min([mark["label"], top, *above])
