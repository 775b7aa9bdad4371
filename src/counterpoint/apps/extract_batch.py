"""Condition images for a folder of photos, on every core or on Ray; killed and called again, it continues."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from counterpoint.data.balance import check_can_be_silent, keep_some, segment, silence
from counterpoint.data.beside import made_kinds, pictures_below
from counterpoint.data.photos import METADATA, MOST_DAMAGED, ImageFolder, beside, read_bytes, read_segments
from counterpoint.data.samples import open_folder
from counterpoint.data.tables import table_reader
from counterpoint.types import Image, UserError

Run = Callable[[Callable[[], Callable[[str], str | None]], Sequence[str]], Iterator[tuple[str, str | None]]]
"""``(build, items) -> (item, result)``: builds what an item is given to once a worker, and gives it all items."""


_LOOKED_AT = 32


@dataclass(frozen=True)
class Filled:
    """What a run did: condition images that are there now, the pictures that could not be read, with reasons, and those
    that a folder holds and its ``metadata.jsonl`` does not name."""

    there: int
    damaged: dict[str, str]
    unnamed: Sequence[Path] = ()


def extract_batch(
    folder: Path,
    kind: str,
    run: Run,
    *,
    source: str | None = None,
    balanced: bool = False,
    listen: Callable[[int, int], None] | None = None,
) -> Filled:
    """Write ``KIND/NAME.png`` for each picture of a folder.

    A folder's ``metadata.jsonl`` says so; a folder without one, or in the layout of its publisher, stays as it is, and
    its reader finds what was made. Images that are there are not made again, those that ``metadata.jsonl`` names
    elsewhere or the publisher drew among them.

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
    check_kind(kind, source, balanced)
    if table_reader(folder) is not None:
        raise UserError(
            f"{folder} is a table: --batch fills folders of pictures and tar files; give it a column with datasets' map"
        )
    photos = open_folder(folder, _SIZE, making=kind)
    if isinstance(photos, ImageFolder):
        folder, rows = photos.folder, photos.rows
        begun = kind in made_kinds(folder)
        given = {row["file_name"] for row in rows if _given(folder, kind, row, begun)}
    else:
        folder, rows = photos.root, [photos.row(number) for number in range(len(photos))]
        given = {rows[number]["file_name"] for number in photos.published(kind)}
    if balanced and given:
        raise UserError(
            f"--balance: {folder} came with {kind} images already, which stay as they are: train with balanced=true"
        )
    names = [row["file_name"] for row in rows if row["file_name"] not in given]
    _check_targets(folder, [beside(folder, kind, name) for name in names])
    todo = [name for name in names if not beside(folder, kind, name).exists()]
    columns = "segments_file_name", "sam_file_name"
    segments = {row["file_name"]: file for row in rows if (file := next(filter(None, map(row.get, columns)), None))}
    warn_of_maps(kind, [(name, partial(read_image, folder / name)) for name in todo])
    if todo or kind in made_kinds(folder):
        settle(folder / kind, {"model": source, "balance": balanced}, "move it away first")
    damaged: dict[str, str] = {}
    work = partial(_Work, folder, kind, source, segments, balanced)
    for done, (name, reason) in enumerate(run(work, todo) if todo else (), len(rows) - len(todo) + 1):
        if reason is not None:
            damaged[name] = reason
            check_damage(damaged, len(rows))
        if listen is not None:
            listen(done, len(rows))
    made = {name for name in names if beside(folder, kind, name).exists()}
    if not isinstance(photos, ImageFolder):
        return Filled(len(made | given), damaged)
    _note(folder, kind, rows, made)
    named = {folder / name for row in rows for key, name in row.items() if key.endswith("file_name")}
    return Filled(len(made | given), damaged, tuple(sorted(set(pictures_below(folder)) - named)))


_SIZE = 64
"""A published data set is opened for its list, no picture of it is read at a size."""


def check_kind(kind: str, source: str | None, balanced: bool) -> None:
    """Say a mistake once, before the work.

    Raises:
        UserError: nothing makes this kind, or it has no silent value to be balanced with.
    """
    extractor(kind, source)
    if balanced:
        check_can_be_silent(kind, "--balance")


def check_damage(damaged: Mapping[str, str], total: int) -> None:
    """Hold the pictures that could not be read, with reasons, against their bound.

    Raises:
        UserError: they are too many.
    """
    if len(damaged) > (most := int(MOST_DAMAGED * total)):
        last = next(reversed(damaged.values()))
        raise UserError(f"{len(damaged)} of {total} pictures are damaged, {most} may be; the last one: {last}")


def _check_targets(folder: Path, targets: Sequence[Path]) -> None:
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise UserError(f"two pictures of {folder} would both become {twice}: their names differ in the suffix only")


def _given(folder: Path, kind: str, row: dict[str, str], begun: bool) -> bool:
    """Whether a row names an image that is there and was not made here, where ``begun`` says that some were."""
    file = folder / row.get(f"{kind}_file_name", "")
    ours = begun and file == beside(folder, kind, row["file_name"])
    return file.is_file() and not ours


def warn_of_maps(kind: str, pictures: Sequence[tuple[str, Callable[[], Image]]]) -> None:
    """Look at a few pictures, by their names and what reads them.

    Warns:
        WrongPicture: some are condition maps themselves.
    """
    looked = pictures[:: max(1, len(pictures) // _LOOKED_AT)][:_LOOKED_AT] if kind != "tile" else ()
    found = []
    for name, read in looked:
        with contextlib.suppress(UserError):  # damage is counted later
            found += [name] if recognise(read()) is not None else []
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


class Maps:
    """Makes condition images on one core, whole or balanced."""

    def __init__(self, kind: str, source: str | None) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.kind, self.extract = kind, extractor(kind, source)

    def make(self, photo: Image, name: str, segments: np.ndarray | None, *, balanced: bool) -> Image:
        """A photo's; balanced, it stays in a subset of its segments, which the photo's name draws.

        Raises:
            UserError: the segments are not as large as the photo.
        """
        made = self.extract(photo)
        if not balanced:
            return made
        if segments is None:
            segments = segment(photo)
        if segments.shape != photo.shape[:2]:
            raise UserError(f"the segments of {name} have {segments.shape[1]} x {segments.shape[0]} pixels, itself "
                            f"{photo.shape[1]} x {photo.shape[0]}")  # fmt: skip
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return silence(made, keep_some(segments, rng), self.kind)


class _Work:
    """One picture's condition image; returns why it could not be made."""

    def __init__(self, folder: Path, kind: str, source: str | None, segments: dict[str, str], balanced: bool) -> None:
        self.folder, self.kind, self.segments, self.balanced = folder, kind, segments, balanced
        self.maps = Maps(kind, source)

    def __call__(self, name: str) -> str | None:
        try:
            photo, segments = read_image(self.folder / name), None
            if self.balanced and name in self.segments:
                file = self.folder / self.segments[name]
                segments = read_segments(read_bytes(file), str(file))
            picture = PIL.Image.fromarray(self.maps.make(photo, name, segments, balanced=self.balanced))
        except UserError as error:
            return str(error)
        target = beside(self.folder, self.kind, name)
        write_whole(target, lambda file: picture.save(file, "PNG", compress_level=1), durable=False)
        return None


def _start(build: Callable[[], Callable[[str], str | None]]) -> None:
    global _work
    _work = build()


def _do(name: str) -> tuple[str, str | None]:
    return name, _work(name)


def _note(folder: Path, kind: str, rows: Sequence[dict[str, str]], there: set[str]) -> None:
    column = f"{kind}_file_name"
    for row in rows:
        if row["file_name"] in there:
            row[column] = beside(folder, kind, row["file_name"]).relative_to(folder).as_posix()
    write_text(folder / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
