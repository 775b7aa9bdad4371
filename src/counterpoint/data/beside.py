"""Photos that stay as their publisher laid them out, with the condition images that were made beside them."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import PIL.Image

from counterpoint.conditions.image import opened, read_image, read_shape, resize
from counterpoint.conditions.recognise import recognise
from counterpoint.data.photos import (
    ALL,
    DOWNLOAD,
    METADATA,
    SUFFIXES,
    Photo,
    beside,
    check_shape,
    pictured,
    read_bytes,
    read_caption,
    square,
    square_segments,
)
from counterpoint.types import CONTROL_KINDS, UserError

_LOOKED_AT = 8


class PublishedPhotos(ABC):
    """Photos whose files stay where they are. A condition image that did not come with a photo is the one that was
    made beside it, if there is one; without segments, SAM's picture of them will do.

    Attributes:
        root: of the data set.
        size: to which pictures are brought.
        kinds: of the condition images that are read.
    """

    root: Path
    size: int
    kinds: Collection[str] = ALL

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def published(self, kind: str) -> list[int]:
        """The numbers of the photos whose publisher drew a condition image of a kind."""

    @abstractmethod
    def _row(self, number: int) -> dict[str, str]: ...

    @abstractmethod
    def _photo(self, number: int) -> Photo: ...

    def row(self, number: int) -> dict[str, str]:
        """A photo as a row of ``metadata.jsonl``: ``file_name`` below the root, ``segments_file_name`` or
        ``sam_file_name`` if it has any.

        Raises:
            UserError: what is known of it is damaged.
        """
        row = self._row(number)
        if "segments_file_name" not in row and "sam" in self._made:
            made = beside(self.root, "sam", row["file_name"])
            if made.exists():
                row["sam_file_name"] = made.relative_to(self.root).as_posix()
        return row

    def __getitem__(self, number: int) -> Photo:
        photo = self._photo(number)
        if not self._made:
            return photo
        row, made = self.row(number), {}
        shape = read_shape(self.root / row["file_name"])
        for kind in self._made - set(photo.maps):
            if (path := beside(self.root, kind, row["file_name"])).exists():
                picture = read_image(path)
                check_shape(str(path), picture.shape[:2], shape)
                made[kind] = resize(picture, self.size, self.size, kind=kind)
        segments = photo.segments
        if segments is None and "sam_file_name" in row:
            path = self.root / row["sam_file_name"]
            segments = square_segments(read_bytes(path), str(path), self.size, shape)
        return replace(photo, maps={**photo.maps, **made}, segments=segments)

    def having(self, kind: str) -> list[int]:
        """The numbers of the photos with a condition image of a kind."""
        there = set(self.published(kind))
        if kind in self._made:
            made = set((self.root / kind).rglob("*.png"))
            names = (beside(self.root, kind, self._row(number)["file_name"]) for number in range(len(self)))
            there |= {number for number, name in enumerate(names) if name in made}
        return sorted(there)

    @cached_property
    def _made(self) -> set[str]:
        """Kinds that are read and of which some were made."""
        return made_kinds(self.root).intersection(pictured(self.kinds))


class Pictures(PublishedPhotos):
    """Any folder of photos, also below it, in order of their paths; ``NAME.txt`` beside one, or the ``caption`` of
    ``NAME.json``, is its caption.

    BG-20K as it is unpacked, or a sample of LAION as img2dataset writes it.

    Args:
        root: of the photos.
        size: to which they are brought.
        names: paths in the folder, if only some are meant, in their order.

    Raises:
        UserError: there are none, or some have the names of others and look like maps of them.
    """

    def __init__(self, root: Path, size: int, names: Sequence[str] = ()) -> None:
        self.root, self.size = root, size
        self.paths = [root / name for name in names] or sorted(pictures_below(root))
        if not self.paths:
            raise UserError(f"{root} holds no pictures (jpg, png or webp){_instead(root)}")
        if (found := _map_among(self.paths)) is not None:
            raise UserError(
                f"{found} looks like a map of the photo of its name, not like a photo: name the folder of the photos "
                f"alone, or say in a {METADATA} which is which"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def published(self, kind: str) -> list[int]:
        """No condition images."""
        return []

    def _row(self, number: int) -> dict[str, str]:
        return {"file_name": self.paths[number].relative_to(self.root).as_posix()}

    def _photo(self, number: int) -> Photo:
        path = self.paths[number]
        image = square(read_image(path), self.size, path)
        return Photo(image, read_caption(path), name=self._row(number)["file_name"])


def made_kinds(root: Path) -> set[str]:
    """The kinds of which condition images were made beside the photos of a folder."""
    return {kind for kind in CONTROL_KINDS if (root / kind / "settings.json").exists()}


def pictures_below(root: Path) -> Iterator[Path]:
    """Pictures in a folder and below it, through links too, but for hidden ones and the maps that were made."""
    made, seen = {root / kind for kind in made_kinds(root)}, set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        if (real := here.resolve()) in seen:  # a link that leads up again
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and here / name not in made]
        yield from (here / name for name in names if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES)


def _instead(root: Path) -> str:
    """What a folder without pictures holds, and how that is named."""
    if tar := next((path for path in root.rglob("*") if path.suffix.lower() in {".tar", ".gz", ".tgz"}), None):
        return f"; {tar} is read by name, or that of its folder, unpacked if it is compressed"
    if table := next(root.rglob("*.parquet"), None):
        return (
            f"; {table} is read by the name of the folder that holds data/"
            if "train" in table.name
            else f"; {DOWNLOAD}"
        )
    return ""


def _map_among(paths: Sequence[Path]) -> Path | None:
    """Of pictures that share their name with another, the first that is a map by its colours; a few are looked at."""
    folders: dict[str, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.stem, []).append(path)
    shared = [path for same in folders.values() if len(same) > 1 for path in same]
    for path in shared[:: max(1, len(shared) // _LOOKED_AT)][:_LOOKED_AT] + shared[:_LOOKED_AT]:
        with contextlib.suppress(UserError), opened(path, str(path)) as picture:
            if picture.mode.startswith("I") or recognise(read_image(path)) is not None or _few_greys(picture):
                return path
    return None


def _few_greys(picture: PIL.Image.Image) -> bool:
    """Whether they are numbers: hardly any different ones."""
    return picture.mode in {"P", "L"} and len(picture.getcolors() or range(256)) < 32
