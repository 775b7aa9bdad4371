"""Photos with what is known about them, from folders, shards and data sets: random access, nothing held in memory.

Every source is a sequence: a number gives the same photo each time, so a shuffled run needs no state to be resumed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from counterpoint.conditions.image import decode_image, opened, resize
from counterpoint.types import CONTROL_KINDS, Image, UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Of files that are taken for pictures."""
SEGMENTS = "segments"
METADATA = "metadata.jsonl"
ALL = tuple(CONTROL_KINDS)
"""Kinds of which condition images are read where nobody says which."""
MOST_DAMAGED = 0.01
"""Share of photos that may be damaged."""


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture with what its publisher says about it.

    Attributes:
        image: RGB.
        text: a caption.
        maps: kind -> condition image that was published with it; one may be missing.
        person: where people are, ``(h, w)`` bool.
        segments: the number of its segment at each place, ``(h, w)`` integers.
        name: how its publisher calls it.
    """

    image: Image
    text: str = ""
    maps: Mapping[str, Image] = field(default_factory=dict)
    person: np.ndarray | None = None
    segments: np.ndarray | None = None
    name: str = ""


DOWNLOAD = (
    "a list of addresses (URL, TEXT) becomes pictures with img2dataset: name the folder that it writes, files or tar "
    "shards (--output_format webdataset)"
)


class ImageFolder:
    """A folder with ``metadata.jsonl``, a row a line: ``file_name``, ``text``, ``KIND_file_name`` for each condition
    image that is there and ``segments_file_name``, all but the first optional.

    The layout of the hub's image folders. A picture of segments holds numbers in grey, or ``R + 256 G + 65536 B`` as
    COCO's panoptic ones.

    Raises:
        UserError: a row is no JSON, names a file twice or one that is not there; the message has its line.
    """

    def __init__(self, folder: Path, size: int, making: str = "", kinds: Collection[str] = ALL) -> None:
        self.folder, self.size, self.kinds = folder, size, kinds
        self.rows = read_metadata(folder, making, kinds)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Photo:
        row = self.rows[number]
        files = {what: read_bytes(self.folder / name) for what, name in _files(row, self.kinds).items()}
        image = read_bytes(self.folder / row["file_name"])
        return decode_photo(row["file_name"], image, row.get("text", ""), files, self.size)

    def having(self, kind: str) -> list[int]:
        """The numbers of the photos with a condition image of a kind."""
        return [number for number, row in enumerate(self.rows) if row.get(f"{kind}_file_name")]


def decode_photo(where: str, image: bytes, text: str, files: Mapping[str, bytes], size: int) -> Photo:
    """A photo from the content of its files, kind or segments -> bytes, brought to a square.

    Without segments, SAM's picture of them will do. ``where`` becomes its name.

    Raises:
        UserError: a file is damaged, or of other proportions than the photo; the message begins with ``where``.
    """
    photo, maps = decode_image(image, where), {}
    for kind in (kind for kind in files if kind != SEGMENTS):
        made = decode_image(files[kind], f"{where} ({kind})")
        check_shape(f"{where} ({kind})", made.shape[:2], photo.shape[:2])
        maps[kind] = resize(made, size, size, kind=kind)
    segmented = next((what for what in (SEGMENTS, "sam") if what in files), None)
    segments = None
    if segmented is not None:
        segments = square_segments(files[segmented], f"{where} ({segmented})", size, photo.shape[:2])
    return Photo(square(photo, size, where), text, maps, segments=segments, name=where)


def pictured(kinds: Collection[str]) -> list[str]:
    """What pictures are read for beside a photo: condition images of some kinds, and what tells its segments."""
    return list(dict.fromkeys((*kinds, "sam", SEGMENTS)))


def beside(root: Path, kind: str, name: str) -> Path:
    """Where ``counterpoint extract --batch`` puts the condition image of ``ROOT/NAME``: ``ROOT/KIND/NAME.png``."""
    return root / kind / f"{name.rpartition('.')[0]}.png"


def is_inside(name: str) -> bool:
    """Whether a name that a list has stays in the list's folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def check_shape(where: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Hold a map's height and width against its photo's: sizes may differ, proportions by rounding only.

    Raises:
        UserError: the map belongs to no such photo.
    """
    (height, width), (tall, wide) = shape, wanted
    if abs(width * tall / (height * wide) - 1) > 0.01 + 1 / min(*shape, *wanted):
        raise UserError(f"{where} has {width} x {height} pixels, its photo {wide} x {tall}: other proportions")


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def square(picture: Image, size: int, where: object) -> Image:
    """A picture brought to a square, which it covers.

    Raises:
        UserError: it is less than half as large: what is made up when it grows would be learned.
    """
    if 2 * min(picture.shape[:2]) < size:
        tall, wide = picture.shape[:2]
        raise UserError(f"{where} has {wide} x {tall} pixels, too few for a resolution of {size}")
    return resize(picture, size, size)


def read_caption(photo: Path) -> str:
    """What ``NAME.txt`` beside a photo says, or the ``caption`` of ``NAME.json``, or nothing.

    Raises:
        UserError: it is not UTF-8, or no JSON object.
    """
    if (caption := photo.with_suffix(".txt")).exists():
        return decode_text(read_bytes(caption), caption)
    record = photo.with_suffix(".json")
    return decode_record(read_bytes(record), str(record)) if record.exists() else ""


def decode_text(content: bytes, where: object) -> str:
    """A caption.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"{where}: the caption is not UTF-8") from None


def read_metadata(folder: Path, making: str = "", kinds: Collection[str] = ALL) -> list[dict[str, str]]:
    """The rows of a folder's ``metadata.jsonl``; of the condition images those of some ``kinds`` must be there, but of
    the kind that is in the ``making`` they need not, if they are to be :func:`beside` their photos.

    Raises:
        UserError: a line is not UTF-8, no JSON object with a ``file_name``, has a key twice, names a file a second
            time, or one that is not in the folder.
    """
    path = folder / METADATA
    rows: list[dict[str, str]] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_each_once)
            name = row["file_name"]
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8") from None
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {number}: no JSON object with a file_name") from None
        if not all(isinstance(value, str) for value in (name, row.get("text", ""), *_files(row, kinds).values())):
            raise UserError(f"{path}, line {number}: names of files and the text are strings")
        if name in lines:
            raise UserError(f"{path}, line {number}: {name} is there twice, first in line {lines[name]}")
        for what, file in {"": name, **_files(row, kinds)}.items():
            made = what and what == making and Path(file) == beside(Path(), making, name)
            if not (made or (is_inside(file) and (folder / file).is_file())):
                raise UserError(f"{path}, line {number}: there is no file {file}")
        lines[name] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"the key {next(name for name in seen if names.count(name) > 1)} is there twice")
    return seen


def _files(row: Mapping[str, str], kinds: Collection[str]) -> dict[str, str]:
    """What a row has besides its picture: kind, or segments -> file."""
    return {what: row[f"{what}_file_name"] for what in pictured(kinds) if row.get(f"{what}_file_name")}


def decode_record(content: bytes | None, where: str) -> str:
    """The ``caption`` of a JSON object, if there is any.

    Raises:
        UserError: it is none.
    """
    if content is None:
        return ""
    try:
        caption = json.loads(content).get("caption") or ""
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{where}: its json holds no object") from None
    if not isinstance(caption, str):
        raise UserError(f"{where}: the caption is no text")
    return caption.strip()


def read_segments(content: bytes, where: str) -> np.ndarray:
    """Numbers of segments, ``(h, w)``, from a picture of them.

    Raises:
        UserError: it is damaged.
    """
    return _numbers(_coded(content, where))


def square_segments(content: bytes, where: str, size: int, photo: tuple[int, ...]) -> np.ndarray:
    """The same, brought to a square as its photo is, whose height and width are given.

    Raises:
        UserError: it is damaged, or of other proportions.
    """
    coded = _coded(content, where)
    check_shape(where, coded.shape[:2], photo)
    return _numbers(resize(coded, size, size, kind="seg"))


_BYTES = np.array([1, 256, 65536], np.int32)


def _coded(content: bytes, where: str) -> Image:
    """Numbers as three bytes, which are cut like a picture's colours."""
    with opened(io.BytesIO(content), where) as picture:
        given = np.asarray(picture if picture.mode in {"L", "P", "I;16", "I"} else picture.convert("RGB"))
    if given.ndim == 2:
        given = np.stack([given & 255, given >> 8 & 255, given >> 16 & 255], -1)
    return given.astype(np.uint8)


def _numbers(coded: Image) -> np.ndarray:
    return coded.astype(np.int32) @ _BYTES
