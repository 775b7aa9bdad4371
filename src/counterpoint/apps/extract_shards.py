"""Condition images for WebDataset's shards: each gets its pictures' maps as members, and is replaced as a whole."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import PIL.Image

from counterpoint.apps.extract_batch import Filled, Maps, Run, check_damage, check_kind, warn_of_maps
from counterpoint.apps.record import settle, write_whole
from counterpoint.conditions.image import decode_image
from counterpoint.data.beside import made_kinds
from counterpoint.data.photos import SEGMENTS, SUFFIXES, read_segments
from counterpoint.data.tars import TarShards
from counterpoint.types import Image, UserError

_SIZE = 64
"""Shards are opened for their members, no picture of them is read at a size."""
Members = dict[str, tuple[int, int]]
"""Suffix -> where a file lies in its shard, and its size."""


def extract_shards(
    shards: Sequence[Path],
    kind: str,
    run: Run,
    *,
    source: str | None = None,
    balanced: bool = False,
    listen: Callable[[int, int], None] | None = None,
) -> Filled:
    """Give each picture ``KEY.jpg`` of some tar files a ``KEY.KIND.png``; those that are there stay.

    A shard is read, and written anew beside itself, with its members as they were and the maps after them, before it
    takes the old one's place: there is room for one more shard a worker. Arguments and errors are those of
    :func:`counterpoint.apps.extract_batch.extract_batch`; ``listen`` hears of shards.
    """
    check_kind(kind, source, balanced)
    samples = TarShards(shards, _SIZE).samples  # what is wrong with them is said before the work
    lacking = {shards[number] for number, _, files in samples if not _has(kind, files)}
    todo = [str(shard) for shard in shards if shard in lacking]
    firsts = {shards[number]: (key, files) for number, key, files in reversed(samples)}
    warn_of_maps(
        kind, [(f"{shard}:{key}", partial(_decode, shard, key, files)) for shard, (key, files) in firsts.items()]
    )
    place = shards[0].parent
    if balanced and kind not in made_kinds(place) and any(_has(kind, files) for _, _, files in samples):
        raise UserError(f"--balance: the shards hold {kind} images already: train with balanced=true")
    settle(place / kind, {"model": source, "balance": balanced}, "begin with shards that hold none")
    damaged: dict[str, str] = {}
    work = partial(_Work, kind, source, balanced)
    for done, (shard, reasons) in enumerate(run(work, todo) if todo else (), len(shards) - len(todo) + 1):
        damaged |= {f"{shard} {number}": reason for number, reason in enumerate((reasons or "").splitlines())}
        check_damage(damaged, len(samples))
        if listen is not None:
            listen(done, len(shards))
    return Filled(len(samples) - len(damaged), damaged)


class _NothingError(Exception):
    """No map could be made: the shard stays."""


class _Work:
    """Fills one shard; returns why some maps could not be made, a line each."""

    def __init__(self, kind: str, source: str | None, balanced: bool) -> None:
        self.kind, self.balanced, self.maps = kind, balanced, Maps(kind, source)

    def __call__(self, name: str) -> str | None:
        reasons: list[str] = []
        shard = Path(name).resolve()  # a link stays one
        with contextlib.suppress(_NothingError):
            write_whole(shard, partial(self._fill, shard, reasons))
        return "\n".join(reasons) or None

    def _fill(self, shard: Path, reasons: list[str], file: BinaryIO) -> None:
        """A shard's members as they are, then a map after the other."""
        made = False
        with tarfile.open(shard, "r:") as old, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as new:
            for member in old:
                new.addfile(member, old.extractfile(member) if member.isfile() else None)
            for _, key, files in TarShards([shard], _SIZE).samples:
                if not _has(self.kind, files):
                    try:
                        new.addfile(*_png(f"{key}.{self.kind}.png", self._make(shard, key, files)))
                        made = True
                    except UserError as error:
                        reasons.append(" ".join(str(error).split()))
        if not made:
            raise _NothingError

    def _make(self, shard: Path, key: str, files: Members) -> Image:
        photo, segments = _decode(shard, key, files), None
        if self.balanced and (file := next(filter(files.get, (f"{SEGMENTS}.png", "sam.png")), None)):
            segments = read_segments(_read(shard, files[file]), f"{shard}:{key}.{file}")
        return self.maps.make(photo, key, segments, balanced=self.balanced)


def _png(name: str, picture: Image) -> tuple[tarfile.TarInfo, BinaryIO]:
    content = io.BytesIO()
    PIL.Image.fromarray(picture).save(content, "PNG", compress_level=1)
    member = tarfile.TarInfo(name)
    member.size = content.tell()
    content.seek(0)
    return member, content


def _has(kind: str, files: Members) -> bool:
    return any(one.startswith(f"{kind}.") for one in files)


def _read(shard: Path, place: tuple[int, int]) -> bytes:
    try:
        with shard.open("rb") as file:
            file.seek(place[0])
            return file.read(place[1])
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror or error}") from None


def _decode(shard: Path, key: str, files: Members) -> Image:
    return decode_image(_read(shard, next(files[one] for one in files if f".{one}" in SUFFIXES)), f"{shard}:{key}")
