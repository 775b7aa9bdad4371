"""MultiGen-20M in the layout of its publisher, UniControl (arXiv:2305.11147)."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.beside import PublishedPhotos
from counterpoint.data.photos import Photo, decode_photo, is_inside, read_bytes
from counterpoint.types import CONTROL_KINDS, UserError

TASKS = {"openpose": "pose", "hedsketch": "scribble", "segbase": "seg"}
"""UniControl's word -> ours, where they differ."""
_LIST = "aesthetics_plus_all_group_{}_all.json"
_log = logging.getLogger(__name__)


class MultiGen(PublishedPhotos):
    """``json_files/aesthetics_plus_all_group_TASK_all.json``, a line each of ``source``, ``prompt`` and
    ``control_TASK``, which lie below ``images/`` and ``conditions/``.

    A photo that several lists name has the controls of all of them, and of one that names it twice the last. The lists
    name millions: only where each line lies is held in memory, 16 bytes a line. What lies in an archive that was not
    unpacked, a folder that is not there, counts as not published.

    Args:
        root: of the data set.
        size: to which pictures are brought.

    Raises:
        UserError: there is no list of a control that this software knows, a line is none of it, or no photo is there.
    """

    def __init__(self, root: Path, size: int) -> None:
        self.root, self.size = root, size
        lists = root / "json_files"
        tasks = {task: TASKS.get(task, task) for task in (*TASKS, *CONTROL_KINDS)}
        self.lists = {kind: path for task, kind in tasks.items() if (path := lists / _LIST.format(task)).exists()}
        if not self.lists:
            raise UserError(f"MultiGen-20M is not whole: {lists} lacks {_LIST.format('canny')} and its like")
        self.folders: dict[str, bool] = {}
        marks, starts, left_out = array("q"), array("q"), 0
        kinds = []
        for number, (kind, path) in enumerate(self.lists.items()):
            before = len(marks)
            for start, line, row in _rows(path):
                source, control = _source(row, kind, path, line)
                if not self._unpacked(f"images/{source}"):
                    left_out += 1
                    continue
                marks.append(_mark(source))
                starts.append(start if self._unpacked(f"conditions/{control}") else -1 - start)
            kinds.append(np.full(len(marks) - before, number, np.int8))
        if left_out:
            _log.warning("%d of %d lines name photos that are not unpacked", left_out, left_out + len(marks))
        if not marks:
            raise UserError(f"MultiGen-20M is not whole: {root / 'images'} holds none of the photos of its lists")
        found, first, photo = np.unique(np.frombuffer(marks, np.int64), return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))  # photos in the order in which the lists name them first
        self.starts = np.full((len(found), len(self.lists)), _ABSENT, np.int64)
        self.starts[order[photo], np.concatenate(kinds)] = np.frombuffer(starts, np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def _row(self, number: int) -> dict[str, str]:
        return {"file_name": f"images/{self._read(number)[0]}"}

    def published(self, kind: str) -> list[int]:
        """The photos that the list of a kind names."""
        if kind not in self.lists:
            return []
        return np.flatnonzero(self.starts[:, list(self.lists).index(kind)] >= 0).tolist()

    def _photo(self, number: int) -> Photo:
        source, prompt, controls = self._read(number)
        files = {
            kind: read_bytes(self.root / "conditions" / name) for kind, name in controls.items() if kind in self.kinds
        }
        return decode_photo(f"images/{source}", read_bytes(self.root / "images" / source), prompt, files, self.size)

    def _read(self, number: int) -> tuple[str, str, dict[str, str]]:
        """Where a photo lies, its prompt, and where its controls lie."""
        source, prompt, controls = "", "", {}
        for start, (kind, path) in zip(self.starts[number].tolist(), self.lists.items(), strict=True):
            if start == _ABSENT:
                continue
            with path.open("rb") as file:
                file.seek(start if start >= 0 else -1 - start)
                row = json.loads(file.readline())
            source, control = _source(row, kind, path, 0)
            prompt = prompt or row.get("prompt") or ""
            if start >= 0:
                controls[kind] = control
        return source, prompt, controls

    def _unpacked(self, name: str) -> bool:
        folder = name.rpartition("/")[0]
        if folder not in self.folders:
            self.folders[folder] = (self.root / folder).is_dir()
        return self.folders[folder]


_ABSENT = np.iinfo(np.int64).min


def _rows(path: Path) -> Iterator[tuple[int, int, Any]]:
    """Where each line begins, its number from 1, and what it says."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield start, number, json.loads(line)
                except UnicodeDecodeError:
                    raise UserError(f"{path}, line {number}: not UTF-8") from None
                except (ValueError, RecursionError):
                    raise UserError(f"{path}, line {number}: no JSON") from None
            start += len(line)


def _source(row: Any, kind: str, path: Path, line: int) -> tuple[str, str]:
    """Where the photo of a row lies, and its control.

    Raises:
        UserError: the row names none, or one outside the data set.
    """
    controls = [f"control_{task}" for task, ours in TASKS.items() if ours == kind] + [f"control_{kind}"]
    try:
        names = row["source"], next(row[key] for key in controls if key in row)
        tidy = [name.removeprefix("./") for name in names]
        text = row.get("prompt") or ""
    except (KeyError, TypeError, AttributeError, StopIteration):
        raise UserError(f"{path}, line {line}: no object with source, prompt and {controls[-1]}") from None
    if not isinstance(text, str) or not all(map(is_inside, tidy)):
        raise UserError(f"{path}, line {line}: the prompt is text, and names stay inside the data set")
    return tidy[0], tidy[1]


def _mark(source: str) -> int:
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "little", signed=True)
