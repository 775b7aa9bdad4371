"""Condition images for a whole data set, on every core or on Ray; killed and called again, it continues."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import torch

from counterpoint.apps.cluster import map_on_ray
from counterpoint.apps.extractors import extractor
from counterpoint.apps.record import settle, write_text, write_whole
from counterpoint.conditions.image import read_image
from counterpoint.conditions.recognise import WrongPicture, recognise
from counterpoint.data.balance import keep_some, segment, silence
from counterpoint.data.photos import (
    METADATA,
    MOST_DAMAGED,
    SUFFIXES,
    decode_text,
    read_bytes,
    read_metadata,
    read_segments,
)
from counterpoint.types import CONTROL_KINDS, UserError

Run = Callable[[Callable[[], Callable[[str], str | None]], Sequence[str]], Iterator[tuple[str, str | None]]]
"""``(build, items) -> (item, result)``: builds what an item is given to once a worker, and gives it all items."""


_LOOKED_AT = 32


@dataclass(frozen=True)
class Filled:
    """What a run did: condition images that are there now, and the pictures that could not be read, with reasons."""

    there: int
    damaged: dict[str, str]


def extract_batch(
    folder: Path,
    kind: str,
    run: Run,
    *,
    source: str | None = None,
    balanced: bool = False,
    listen: Callable[[int, int], None] | None = None,
) -> Filled:
    """Write ``KIND/NAME.png`` for each picture of a folder, and say so in its ``metadata.jsonl``.

    A folder without ``metadata.jsonl`` gets one first, with captions from ``NAME.txt``. Images that are there are not
    made again, those that ``metadata.jsonl`` names elsewhere among them.

    Args:
        folder: pictures, also below it.
        kind: of control.
        run: who does it.
        source: the extractor's model, as :func:`counterpoint.apps.extractors.extractor` takes it.
        balanced: silence the control in random segments of each picture: of its ``segments_file_name``, else of SAM's
            ``sam_file_name``, or found by a watershed.
        listen: hears ``(pictures done, pictures in all)``.

    Raises:
        UserError: no such kind or model, nothing to read, or more than :data:`MOST_DAMAGED` of the pictures are
            damaged; what was made stays.

    Warns:
        WrongPicture: pictures among the first few are condition maps themselves.
    """
    extractor(kind, source)  # a mistake is said here, once
    if balanced and CONTROL_KINDS[kind].silent is None:
        raise UserError(f"--balance: {kind} has no silent value, every colour of it means something")
    rows = _rows(folder, kind)
    given = {row["file_name"] for row in rows if _given(folder, kind, row)}
    if balanced and given:
        raise UserError(
            f"--balance: {METADATA} names {kind} images already, which stay as they are: train with balanced=true"
        )
    names = [row["file_name"] for row in rows if row["file_name"] not in given]
    _check_targets(folder, [_target(folder, kind, name) for name in names])
    todo = [name for name in names if not _target(folder, kind, name).exists()]
    columns = "segments_file_name", "sam_file_name"
    segments = {row["file_name"]: file for row in rows if (file := next(filter(None, map(row.get, columns)), None))}
    _warn_of_maps(folder, kind, todo)
    settle(folder / kind, {"model": source, "balance": balanced}, "move it away first")
    if not (folder / METADATA).exists():
        _write_rows(folder, rows)  # killed from here on, what was made is not taken for photos
    most, damaged = int(MOST_DAMAGED * len(rows)), {}
    work = partial(_Work, folder, kind, source, segments if balanced else None)
    for done, (name, reason) in enumerate(run(work, todo) if todo else (), len(rows) - len(todo) + 1):
        if reason is not None:
            damaged[name] = reason
            if len(damaged) > most:
                raise UserError(
                    f"{len(damaged)} of {len(rows)} pictures are damaged, {most} may be; the last one: {reason}"
                )
        if listen is not None:
            listen(done, len(rows))
    made = {name for name in names if _target(folder, kind, name).exists()}
    _note(folder, kind, rows, made)
    return Filled(len(made | given), damaged)


def _check_targets(folder: Path, targets: Sequence[Path]) -> None:
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise UserError(f"two pictures of {folder} would both become {twice}: their names differ in the suffix only")


def _given(folder: Path, kind: str, row: dict[str, str]) -> bool:
    """Whether a row names an image that is there and was not made here."""
    file = row.get(f"{kind}_file_name")
    return (
        bool(file) and folder / str(file) != _target(folder, kind, row["file_name"]) and (folder / str(file)).is_file()
    )


def _warn_of_maps(folder: Path, kind: str, names: Sequence[str]) -> None:
    looked = names[:: max(1, len(names) // _LOOKED_AT)][:_LOOKED_AT] if kind != "tile" else ()
    found = []
    for name in looked:
        with contextlib.suppress(UserError):  # damage is counted later
            found += [name] if recognise(read_image(folder / name)) is not None else []
    if found:
        said = (
            f"{len(found)} of {len(looked)} pictures that were looked at are condition maps already, such as {found[0]}"
        )
        warnings.warn(said, WrongPicture, stacklevel=3)


def on_cores(workers: int | None = None) -> Run:
    """One process a core."""

    def run(build: Callable[[], Callable[[str], str | None]], items: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        count = min(workers or os.cpu_count() or 1, len(items))
        with ProcessPoolExecutor(count, get_context("spawn"), initializer=_start, initargs=(build,)) as pool:
            yield from pool.map(_do, items, chunksize=4)

    return run


def on_cluster(address: str) -> Run:
    """Every core of a Ray cluster that sees the same folders."""
    return lambda build, items: map_on_ray(address, build, items)


class _Work:
    """One picture's condition image; returns why it could not be made."""

    def __init__(self, folder: Path, kind: str, source: str | None, segments: dict[str, str] | None) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.folder, self.kind, self.segments = folder, kind, segments
        self.extract = extractor(kind, source)

    def __call__(self, name: str) -> str | None:
        try:
            photo = read_image(self.folder / name)
            made = self.extract(photo)
            if self.segments is not None:
                rng = np.random.default_rng(zlib.crc32(name.encode()))
                made = silence(made, keep_some(self._segments(name, photo), rng), self.kind)
        except UserError as error:
            return str(error)
        picture = PIL.Image.fromarray(made)
        target = _target(self.folder, self.kind, name)
        write_whole(target, lambda file: picture.save(file, "PNG", compress_level=1), durable=False)
        return None

    def _segments(self, name: str, photo: np.ndarray) -> np.ndarray:
        if name not in self.segments:
            return segment(photo)
        file = self.folder / self.segments[name]
        segments = read_segments(read_bytes(file), str(file))
        if segments.shape != photo.shape[:2]:
            raise UserError(f"{file} has {segments.shape[1]} x {segments.shape[0]} pixels, {name} has "
                            f"{photo.shape[1]} x {photo.shape[0]}")  # fmt: skip
        return segments


def _start(build: Callable[[], Callable[[str], str | None]]) -> None:
    global _work
    _work = build()


def _do(name: str) -> tuple[str, str | None]:
    return name, _work(name)


def _rows(folder: Path, kind: str) -> list[dict[str, str]]:
    if (folder / METADATA).exists():
        return read_metadata(folder, kind)
    made = {folder / kind for kind in CONTROL_KINDS}
    paths = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not made & set(path.parents)
    )
    if not paths:
        raise UserError(f"{folder} holds no pictures (jpg, png or webp)")
    rows = [{"file_name": path.relative_to(folder).as_posix()} for path in paths]
    for row, path in zip(rows, paths, strict=True):
        if (caption := path.with_suffix(".txt")).exists():
            row["text"] = decode_text(caption.read_bytes(), caption)
    return rows


def _target(folder: Path, kind: str, name: str) -> Path:
    return folder / kind / f"{name.rpartition('.')[0]}.png"


def _note(folder: Path, kind: str, rows: Sequence[dict[str, str]], there: set[str]) -> None:
    column = f"{kind}_file_name"
    for row in rows:
        if row["file_name"] in there:
            row[column] = _target(folder, kind, row["file_name"]).relative_to(folder).as_posix()
    _write_rows(folder, rows)


def _write_rows(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    write_text(folder / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
