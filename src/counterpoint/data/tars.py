"""WebDataset's shards on disk."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path

from counterpoint.data.photos import (
    ALL,
    METADATA,
    SUFFIXES,
    Photo,
    decode_photo,
    decode_record,
    decode_text,
    pictured,
)
from counterpoint.types import UserError


def tar_shards(place: Path) -> list[Path]:
    """The shards of a place: a tar file, or those in a folder.

    Raises:
        UserError: a folder holds pictures as well, and is probably meant for those; or it cannot be read.
    """
    if place.suffix == ".tar":
        return [place]
    try:
        paths = sorted(place.iterdir()) if place.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror or error}") from None
    shards = [path for path in paths if path.suffix == ".tar" and not path.name.startswith(".")]
    if shards and any(path.name == METADATA or path.suffix.lower() in SUFFIXES for path in paths):
        raise UserError(f"{place} holds both photos and {shards[0].name}: move one away, or name the tar file")
    return shards


class TarShards:
    """Tar files of ``KEY.jpg``, ``KEY.txt`` (or the ``caption`` of ``KEY.json``),
    ``KEY.KIND.png`` and ``KEY.segments.png``.

    Shards are read in place: only where each file lies is held in memory.

    Raises:
        UserError: a shard is cut or no tar file, or a key comes twice or has two pictures.
    """

    def __init__(self, shards: Sequence[Path], size: int, kinds: Collection[str] = ALL) -> None:
        self.shards, self.size, self.wanted = list(shards), size, pictured(kinds)
        self.samples: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        seen: dict[str, Path] = {}
        for number, shard in enumerate(self.shards):
            for key, files in read_members(shard).items():
                if key in seen:
                    raise UserError(f"{shard}: the key {key} is there twice, first in {seen[key]}")
                seen[key] = shard
                pictures = [suffix for suffix in files if f".{suffix}" in SUFFIXES]
                if len(pictures) > 1:
                    raise UserError(f"{shard}: the key {key} has {len(pictures)} pictures: {', '.join(pictures)}")
                if pictures:
                    self.samples.append((number, key, files))
        if not self.samples:
            raise UserError(f"{', '.join(map(str, self.shards))} hold no pictures (KEY.jpg, KEY.png or KEY.webp)")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Photo:
        shard, key, places = self.samples[number]
        content = {}
        where = f"{self.shards[shard]}:{key}"
        try:
            with self.shards[shard].open("rb") as file:
                for suffix, (offset, size) in places.items():
                    file.seek(offset)
                    content[suffix] = file.read(size)
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror or error}") from None
        image = next(content[suffix] for suffix in content if f".{suffix}" in SUFFIXES)
        text = decode_text(content["txt"], where) if "txt" in content else decode_record(content.get("json"), where)
        named = {suffix.partition(".")[0]: content[suffix] for suffix in content if "." in suffix}
        files = {what: named[what] for what in self.wanted if what in named}
        return decode_photo(where, image, text, files, self.size)

    def having(self, kind: str) -> list[int]:
        """The numbers of the photos with a condition image of a kind."""
        return [
            number
            for number, (_, _, files) in enumerate(self.samples)
            if any(suffix.startswith(f"{kind}.") for suffix in files)
        ]


def read_members(shard: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> suffix -> where the file lies in a shard, and its size.

    Raises:
        UserError: it is cut or no tar file, or a file is there twice.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, slash, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    files = found.setdefault(folder + slash + key, {})
                    if suffix.lower() in files:
                        raise UserError(f"{shard}: {member.name} is there twice")
                    files[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard} is cut or no tar file: {error}") from None
    with shard.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1024, 0))
        closed = not any(file.read())  # an archive ends with two empty blocks
    if not closed or any(offset + size > end for files in found.values() for offset, size in files.values()):
        raise UserError(f"{shard} is cut: it has no end")
    return found
