"""COCO's annotations, checked once: what is wrong with a photo's is kept with the photo, and said when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from counterpoint.data.photos import MOST_DAMAGED, is_inside
from counterpoint.types import UserError

_SLACK = 1.0
"""Pixels by which an annotation may hang over its photo: they are rounded."""
_JOINTS = 17


@dataclass(frozen=True)
class Person:
    """Somebody in a photo.

    Attributes:
        id: of the annotation.
        keypoints: ``x, y, visible`` of COCO's 17, one after the other.
        seen: how many of them are annotated.
        area: in pixels.
        segmentation: polygons, or plain run lengths down the columns.
    """

    id: int
    keypoints: tuple[float, ...]
    seen: int
    area: float
    segmentation: Any


@dataclass
class Entry:
    """A photo with its annotations.

    Attributes:
        id: of the photo.
        name: of its file.
        width: in pixels, as published.
        height: likewise.
        captions: id of the annotation, and what it says.
        people: everybody in it.
        knows_people: whether people are annotated, so that nobody means that there is nobody.
        panoptic: file of its segments, if it is named.
        damage: what is wrong with its annotations, if anything.
    """

    id: int
    name: str
    width: int
    height: int
    captions: list[tuple[int, str]] = field(default_factory=list)
    people: list[Person] = field(default_factory=list)
    knows_people: bool = False
    panoptic: str = ""
    damage: str = ""

    @property
    def shows_a_whole_person(self) -> bool:
        """Whether somebody has at least 12 of 17 keypoints and covers at least 5 % of it."""
        least = 0.05 * self.width * self.height
        return any(one.seen >= 12 and one.area >= least for one in self.people)


def read_annotations(paths: Sequence[Path]) -> list[Entry]:
    """The photos of COCO-style files in order of their ids: captions, people's keypoints, panoptic segments, in one
    file or several; or one file whose photos hold their own.

    Raises:
        UserError: a file is no such file, has a photo twice or an annotation of none, or more than
            :data:`~counterpoint.data.photos.MOST_DAMAGED` of the photos have a broken annotation; the message names it.
    """
    entries: dict[int, Entry] = {}
    for path in paths:
        content = _content(path)
        found = [_entry(one, path) for one in content["images"]]
        if len({one.id for one in found}) < len(found) or len({one.name for one in found}) < len(found):
            raise UserError(f"{path}: a photo is there twice")
        for one in found:
            if (known := entries.setdefault(one.id, one)).name != one.name:
                raise UserError(f"{path}: photo {one.id} is {one.name}, and {known.name} in another file")
        for one in content["images"]:
            entry = entries[one["id"]]
            try:
                _own(entry, one)
            except (TypeError, ValueError, AttributeError):
                entry.damage = f"the annotations of {entry.name} are malformed"
        sort = _annotate(entries, content.get("annotations", []), path)
        for one in found:  # of photos that the file has, it says that nobody is there; of others nothing
            entries[one.id].knows_people |= sort == "keypoints"
    broken = [one.damage for one in entries.values() if one.damage]
    if len(broken) > (most := int(MOST_DAMAGED * len(entries))):
        raise UserError(f"{len(broken)} of {len(entries)} photos have broken annotations, {most} may: {broken[-1]}")
    return [entries[number] for number in sorted(entries)]


def person(note: Mapping[str, Any], entry: Entry) -> Person:
    """An annotation of somebody in a photo.

    Raises:
        UserError: it lacks something, is malformed, or lies outside the photo.
    """
    name = f"annotation {note.get('id', '?')} of {entry.name}"
    if absent := sorted({"id", "keypoints"} - set(note)):
        raise UserError(f"{name} lacks {', '.join(absent)}")
    keypoints = _numbers(note["keypoints"], name, "keypoints")
    if len(keypoints) != 3 * _JOINTS:
        raise UserError(f"{name} has {len(keypoints)} numbers for keypoints; {_JOINTS} keypoints have {3 * _JOINTS}")
    visible = keypoints.reshape(_JOINTS, 3)
    visible = visible[visible[:, 2] > 0, :2]
    points, area = [visible], 0.0
    box = note.get("bbox")
    if box is not None:
        x, y, width, height = _numbers(box, name, "bbox", 4)
        points.append(np.array([[x, y], [x + width, y + height]]))
        area = float(width * height)
    segmentation = note.get("segmentation")
    if isinstance(segmentation, dict):
        segmentation = {"size": [entry.height, entry.width], "counts": _runs(segmentation, entry, name)}
    elif segmentation or box is None:
        segmentation = segmentation or []
        points += _polygons(segmentation, name)
    else:
        segmentation = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    every = np.concatenate(points)
    if ((every < -_SLACK) | (every > np.array([entry.width, entry.height]) + _SLACK)).any():
        raise UserError(
            f"annotation {note['id']} lies outside its photo {entry.name} ({entry.width} x {entry.height} pixels)"
        )
    seen, area = note.get("num_keypoints", len(visible)), note.get("area", area)
    if not (isinstance(note["id"], int) and math.isfinite(area)):
        raise UserError(f"{name}: its id is a whole number, its area a finite one")
    return Person(note["id"], tuple(keypoints.tolist()), int(seen), float(area), segmentation)


def fill(mask: np.ndarray, segmentation: Any) -> None:
    """Draw polygons, or run lengths, of :class:`Person` into a mask ``(h, w)`` of 0 and 1."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        runs = np.repeat(np.arange(len(counts)) % 2, counts)
        mask |= runs.reshape(segmentation["size"][::-1]).T.astype(np.uint8)
        return
    for polygon in segmentation:
        points = np.rint(np.array(polygon).reshape(-1, 2)).astype(np.int32)
        cv2.fillPoly(mask, [points], 1)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is no JSON") from None
    if not (isinstance(content, dict) and isinstance(content.get("images"), list)):
        raise UserError(f"{path} holds no COCO annotations: it has no list of images")
    if not isinstance(content.get("annotations", []), list):
        raise UserError(f"{path} holds no COCO annotations: its annotations are no list")
    return content


def _entry(one: Any, path: Path) -> Entry:
    wanted = {"id": int, "file_name": str, "width": int, "height": int}
    if not isinstance(one, dict) or any(not isinstance(one.get(key), kind) for key, kind in wanted.items()):
        raise UserError(f"{path}: a photo has {', '.join(wanted)}; one is {str(one)[:80]}")
    if min(one["width"], one["height"]) < 1:
        raise UserError(f"{path}: {one['file_name']} has {one['width']} x {one['height']} pixels")
    _check_name(one["file_name"], str(path))
    return Entry(one["id"], one["file_name"], one["width"], one["height"])


def _check_name(name: str, where: str) -> None:
    """Files lie in their folder, for some are written beside those that a list names."""
    if not is_inside(name):
        raise UserError(f"{where}: {name} lies outside the data set")


def _annotate(entries: Mapping[int, Entry], notes: Sequence[Any], path: Path) -> str | None:
    """Add annotations, which are of one sort a file, and tell it; those of other sorts are left alone."""
    sorts = ("caption", "keypoints", "segments_info")
    sort = next((one for one in sorts if any(isinstance(note, dict) and one in note for note in notes)), None)
    for number, note in enumerate(notes if sort else ()):
        entry = entries.get(image) if isinstance(image := _of(note), int) else None
        if entry is None:
            name = note.get("id", number) if isinstance(note, dict) else number
            raise UserError(f"{path}: annotation {name} is of no photo that the file has")
        _try_add(entry, str(sort), note)
    return sort


def _of(note: Any) -> Any:
    return note.get("image_id") if isinstance(note, dict) else None


def _own(entry: Entry, one: Mapping[str, Any]) -> None:
    """Annotations that lie in the photo's own record."""
    for number, caption in enumerate(one.get("captions", ())):
        _try_add(entry, "caption", {"id": number, "caption": caption})
    entry.panoptic = one.get("panoptic_png", entry.panoptic)
    _check_name(entry.panoptic, entry.name)
    shapes = {str(thing["bbox_xywh"]): thing["segmentation"] for thing in one.get("instances", ())
              if thing.get("category") == "person" and {"bbox_xywh", "segmentation"} <= set(thing)}  # fmt: skip
    entry.knows_people |= "person_keypoints" in one
    for number, note in enumerate(one.get("person_keypoints", ())):
        flat = [value for triple in note.get("keypoints_xyv", ()) for value in triple]
        shape = shapes.get(str(note.get("bbox_xywh")))
        box = {} if "bbox_xywh" not in note else {"bbox": note["bbox_xywh"]}
        rest = {"id": number, "keypoints": flat, "segmentation": shape, "num_keypoints": note.get("num_keypoints", 0)}
        _try_add(entry, "keypoints", rest | box)


def _try_add(entry: Entry, sort: str, note: Mapping[str, Any]) -> None:
    try:
        if sort == "keypoints":
            entry.people.append(person(note, entry))
        elif not isinstance(given := note.get("caption" if sort == "caption" else "file_name"), str):
            raise UserError(f"annotation {note.get('id', '?')} of {entry.name} has no {sort}")
        elif sort == "caption":
            entry.captions.append((note.get("id", 0), given.strip()))
        else:
            _check_name(given, entry.name)
            entry.panoptic = given
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        said = str(error) if isinstance(error, UserError) else f"annotation {note.get('id', '?')} is malformed"
        entry.damage = entry.damage or said


def _numbers(given: Any, name: str, what: str, count: int | None = None) -> np.ndarray:
    whole = isinstance(given, list) and all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in given
    )
    if not whole or (count is not None and len(given) != count):
        raise UserError(f"{name}: {what} is a list of {'' if count is None else f'{count} '}finite numbers")
    return np.array(given, float)


def _polygons(given: Any, name: str) -> list[np.ndarray]:
    if not isinstance(given, list):
        raise UserError(f"{name}: segmentation is polygons or run lengths")
    polygons = [_numbers(polygon, name, "a polygon") for polygon in given]
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise UserError(f"{name}: a polygon has x and y of at least three points")
    return [polygon.reshape(-1, 2) for polygon in polygons]


def _runs(given: Mapping[str, Any], entry: Entry, name: str) -> list[int]:
    counts = given.get("counts")
    counts = _unpacked(counts) if isinstance(counts, str) else _numbers(counts, name, "counts").astype(int).tolist()
    if given.get("size") != [entry.height, entry.width] or sum(counts) != entry.width * entry.height or min(counts) < 0:
        raise UserError(f"{name}: its run lengths do not fill {entry.width} x {entry.height} pixels")
    return counts


def _unpacked(text: str) -> list[int]:
    """COCO's compressed run lengths: five bits a character, low ones first, a sixth says that more follow; from the
    fourth length on, the difference from the one two before."""
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    return counts
