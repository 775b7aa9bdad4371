"""Photos as what a trainer learns from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counterpoint.data.balance import segment
from counterpoint.data.beside import Pictures, PublishedPhotos, pictures_below
from counterpoint.data.coco import PET_TRIMAPS, Ade20k, Coco, CocoInOne, Pets, coco_splits
from counterpoint.data.multigen import MultiGen
from counterpoint.data.photos import ALL, DOWNLOAD, METADATA, MOST_DAMAGED, ImageFolder, Photo
from counterpoint.data.tables import table_reader
from counterpoint.data.tars import TarShards, tar_shards
from counterpoint.types import CONTROL_KINDS, Image, UserError

Extract = Mapping[str, Callable[[Image], Image]]
"""Kind of control -> photo to condition image of the same size."""
_log = logging.getLogger(__name__)


def open_photos(
    place: Path,
    size: int,
    *,
    image: str = "image",
    text: str = "text",
    maps: Mapping[str, str] | None = None,
    kinds: Collection[str] = ALL,
) -> Sequence[Photo]:
    """What a place holds: tar shards (a file, or a folder of them), a data set that the datasets library saved,
    Parquet files as the hub has them, or what :func:`open_folder` reads.

    Args:
        place: a file or folder.
        size: to which pictures are brought: they cover a square and are cut to it.
        image: of a data set in columns, that of the picture.
        text: likewise, that of the caption.
        maps: likewise, kind -> that of its condition image; default whatever is called ``KIND`` or ``control_KIND``.
        kinds: of the condition images that are read where they came with their photos.

    Raises:
        UserError: it is none of these, or a part of it is broken.
    """
    shards = tar_shards(place)
    if (read := table_reader(place)) is not None:
        return read(place, size, text, maps, image=image, kinds=kinds)
    if (image, text, maps) != ("image", "text", None):
        raise UserError(f"{place} has no columns to be named: it is neither Parquet files nor a saved data set")
    if shards:
        return TarShards(shards, size, kinds)
    if not place.is_dir():
        hint = f": {DOWNLOAD}" if place.suffix == ".parquet" else ""
        raise UserError(f"there is no folder of photos and no tar file {place}{hint}")
    return open_folder(place, size, kinds=kinds)


def open_folder(
    place: Path, size: int, making: str = "", kinds: Collection[str] = ALL
) -> ImageFolder | PublishedPhotos:
    """A folder with ``metadata.jsonl``; a layout of its publisher (COCO 2017, ADE20K, the Oxford-IIIT pets,
    MultiGen-20M, ``images/`` with one ``annotations.json``); else the only folder below it with ``metadata.jsonl``, or
    any photos. Of several splits it is the one for training. Condition images of the kind that is in the ``making``
    may be named before they are there, and those of ``kinds`` are read.

    Raises:
        UserError: a part of it is missing or broken, or it is not clear which of its folders is meant.
    """
    if (place / METADATA).exists():
        return ImageFolder(place, size, making, kinds)
    if (photos := _laid_out(place, size)) is None:
        if (table := place / "metadata.csv").exists():
            raise UserError(f"{table} is not read: write it as {METADATA}, a JSON object a line")
        if described := sorted(path.parent for path in place.rglob(METADATA)):
            return ImageFolder(_training(place, described), size, making, kinds)
        splits = (place / "train").is_dir() and any((place / name).is_dir() for name in ("test", "val", "validation"))
        photos = Pictures(place / "train" if splits else place, size)
    photos.kinds = kinds
    return photos


def _laid_out(place: Path, size: int) -> PublishedPhotos | None:
    """Photos that lie as their publisher laid them out, if they do."""
    if splits := coco_splits(place):
        return Coco(place, size, splits[0])
    if (place / "json_files").is_dir():
        return MultiGen(place, size)
    if (place / "annotations.json").is_file() and (place / "images").is_dir():
        return CocoInOne(place, size)
    if (place / "images" / "training").is_dir():
        return Ade20k(place, size)
    if (place / "images").is_dir() and any((place / path).is_dir() for path in PET_TRIMAPS):
        return Pets(place, size)
    return None


def _training(place: Path, described: Sequence[Path]) -> Path:
    """Of folders with ``metadata.jsonl`` the one called ``train``, or the only one if no picture lies elsewhere."""
    found = [folder for folder in described if folder.name == "train"] or described
    if len(found) > 1:
        names = ", ".join(folder.relative_to(place).as_posix() for folder in found)
        raise UserError(f"{place} has no split train; name one of its folders {names}")
    if found[0].name != "train" and any(found[0] not in path.parents for path in pictures_below(place)):
        raise UserError(f"{place} has pictures beside {found[0]}, which alone has a {METADATA}: name one folder")
    return found[0]


class PhotoSamples:
    """Photos as a trainer's samples.

    Photos whose source knows that they came without a control which nothing here makes are left out. A photo whose
    files are damaged is counted, logged, and replaced by the next one, the same one in every run; with loader workers
    each counts for itself.

    Args:
        photos: the source.
        fields: what :meth:`batch` returns: ``image``, ``caption``, ``control:KIND``, ``segments``.
        extract: what makes condition images that did not come with a photo.
        find_segments: whether the field ``segments`` is found by a watershed where a photo came without.
        most: how many of the first photos are taken; default all.
        most_damaged: share of photos that may be damaged before it stops.

    Raises:
        UserError: no photo came with a control that nothing here makes.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        fields: Sequence[str],
        extract: Extract | None = None,
        *,
        find_segments: bool = False,
        most: int | None = None,
        most_damaged: float = MOST_DAMAGED,
    ) -> None:
        self.photos, self.fields, self.extract = photos, tuple(fields), dict(extract or {})
        self.find_segments = find_segments
        self.numbers = self._usable()[:most]
        self.most_damaged = int(most_damaged * len(self))
        self.damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The fields of several samples: pictures ``(b, h, w, 3)`` uint8, segments ``(b, h, w)``, captions as a list.

        Raises:
            UserError: too many photos are damaged, or one lacks segments, or a condition image that nothing can make.
        """
        rows = [self._row(index) for index in indices]
        return {
            name: [row[name] for row in rows]
            if name == "caption"
            else torch.from_numpy(np.stack([row[name] for row in rows]))
            for name in self.fields
        }

    def _row(self, index: int) -> dict[str, Any]:
        number, photo = self._whole(index)
        row: dict[str, Any] = {"image": photo.image, "caption": photo.text}
        for field in self.fields:
            if field.startswith("control:"):
                row[field] = self._control(photo, field.removeprefix("control:"), number)
            if field == "segments":
                row[field] = self._segments(photo, number)
        return row

    def _usable(self) -> Sequence[int]:
        """The numbers of the photos that have what nothing here makes."""
        numbers: Sequence[int] = range(len(self.photos))
        having = getattr(self.photos, "having", None)
        for kind in [field.removeprefix("control:") for field in self.fields if field.startswith("control:")]:
            if having is None or kind in self.extract:
                continue
            found = set(having(kind))
            there = [number for number in numbers if number in found]
            if len(there) < len(numbers):
                said = f"{len(numbers) - len(there)} of {len(numbers)} photos have no {kind} image"
                if not there:
                    raise UserError(f"{said}, and {_nothing_makes(kind)}")
                _log.warning("%s and are left out", said)
            numbers = there
        return numbers

    def _control(self, photo: Photo, kind: str, number: int) -> Image:
        if kind in photo.maps:
            return photo.maps[kind]
        if kind not in self.extract:
            raise UserError(f"photo {number} has no {kind} image, and {_nothing_makes(kind)}")
        return self.extract[kind](photo.image)

    def _segments(self, photo: Photo, number: int) -> np.ndarray:
        if photo.segments is not None:
            return photo.segments
        if not self.find_segments:
            raise UserError(f"photo {number} has no segments (segments_file_name)")
        return segment(photo.image)

    def _whole(self, index: int) -> tuple[int, Photo]:
        """The photo, or the next one that is not damaged."""
        for place in range(index, index + len(self)):
            number = self.numbers[place % len(self)]
            if number in self.damaged:
                continue
            try:
                return number, self.photos[number]
            except UserError as error:
                self.damaged.add(number)
                if len(self.damaged) > self.most_damaged:
                    raise UserError(
                        f"{len(self.damaged)} of {len(self)} photos are damaged, {self.most_damaged} may be; the last "
                        f"one: {error}"
                    ) from None
                _log.warning("skipped (%d of at most %d): %s", len(self.damaged), self.most_damaged, error)
        raise UserError("no photo is whole")


def _nothing_makes(kind: str) -> str:
    if kind in CONTROL_KINDS:
        return f"nothing here makes one: counterpoint extract {kind} --batch"
    return f"{kind} is none of the kinds that can be made ({', '.join(CONTROL_KINDS)})"
