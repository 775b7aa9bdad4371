"""Making a suite's pictures: in batches, on disk, so that a killed run continues where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

import numpy as np
import PIL.Image

from counterpoint.evaluation.suite import Finished, Maker, Task
from counterpoint.types import Image

_TIMES = "times.jsonl"


def make(
    tasks: Sequence[Task],
    maker: Maker,
    folder: Path,
    batch: int = 16,
    listen: Callable[[int, int], None] | None = None,
) -> None:
    """Make every picture that is not there yet as ``folder/<key>.png``; each appears whole or not at all.

    Args:
        tasks: what to make; keys are unique.
        maker: makes pictures.
        folder: where they go.
        batch: pictures at a time.
        listen: hears ``(pictures done, pictures in all)``.
    """
    missing = [task for task in tasks if not _path(folder, task.key).exists()]
    done = len(tasks) - len(missing)
    for chunk in _chunks(missing, batch):
        began = time.perf_counter()
        pictures = maker(chunk)
        _note(folder, chunk[0].method.name, len(chunk), time.perf_counter() - began)
        for task, picture in zip(chunk, pictures, strict=True):
            path = _path(folder, task.key)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            PIL.Image.fromarray(picture).save(partial, "PNG")
            partial.replace(path)
        done += len(chunk)
        if listen is not None:
            listen(done, len(tasks))


def seconds_a_picture(folder: Path) -> dict[str, float]:
    """Method -> seconds that a picture took in its batch, the median over batches."""
    lines = [json.loads(line) for line in (folder / _TIMES).read_text().splitlines()]
    paces: dict[str, list[float]] = {}
    for line in lines:
        paces.setdefault(line["method"], []).append(line["seconds"] / line["pictures"])
    return {method: median(values) for method, values in paces.items()}


def reader(folder: Path) -> Finished:
    """What reads finished pictures back."""

    def read(key: str) -> Image:
        with PIL.Image.open(_path(folder, key)) as picture:
            return np.array(picture)

    return read


def _note(folder: Path, method: str, pictures: int, seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _TIMES).open("a") as file:
        file.write(json.dumps({"method": method, "pictures": pictures, "seconds": round(seconds, 4)}) + "\n")


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.png"


def _chunks(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """Tasks that can share a batch."""

    def alike(task: Task) -> tuple[str, ...]:
        return (task.method.name, task.subject, *task.images)

    for _, group in groupby(sorted(tasks, key=alike), key=alike):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]
