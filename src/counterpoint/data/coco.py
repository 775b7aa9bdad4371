"""COCO 2017 and ADE20K as they are published."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from counterpoint.conditions.image import read_image, resize
from counterpoint.conditions.openpose import draw_pose, from_coco
from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.data.photos import SUFFIXES, Photo, square_segments
from counterpoint.types import Image, UserError

_SLACK = 1.0
"""Pixels by which an annotation may hang over its photo: they are rounded."""


class Coco:
    """A split of COCO 2017: ``SPLIT/`` with what ``annotations/`` has of ``captions_SPLIT.json`` (the first caption),
    ``person_keypoints_SPLIT.json`` (poses and where people are) and ``panoptic_SPLIT/`` (segments).

    Raises:
        UserError: there is no annotation at all, a photo or picture of segments is missing, or a person lies outside
            the photo.
    """

    def __init__(self, folder: Path, size: int, split: str = "train2017") -> None:
        self.folder, self.size, self.split = folder / split, size, split
        notes = folder / "annotations"
        captions, people = _read(notes / f"captions_{split}.json"), _read(notes / f"person_keypoints_{split}.json")
        if not self.folder.is_dir() or not (captions or people):
            raise UserError(
                f"COCO 2017 is not whole: {folder} lacks {split}, or captions_{split}.json and "
                f"person_keypoints_{split}.json in annotations"
            )
        self.photos = sorted((captions or people)["images"], key=lambda one: one["id"])
        self.texts: dict[int, str] = {}
        for note in captions.get("annotations", ()):
            self.texts.setdefault(note["image_id"], note["caption"].strip())
        self.people: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for person in people.get("annotations", ()):
            self.people[person["image_id"]].append(person)
        self.knows_people = bool(people)
        self.segments = notes / f"panoptic_{split}"
        for photo in self.photos:
            for person in self.people[photo["id"]]:
                _check_inside(person, photo)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, number: int) -> Photo:
        photo = self.photos[number]
        image = read_image(self.folder / photo["file_name"])
        people = self.people[photo["id"]]
        segments = None
        if self.segments.is_dir():
            file = self.segments / f"{Path(photo['file_name']).stem}.png"
            if not file.is_file():
                raise UserError(f"COCO 2017 is not whole: there is no {file}")
            segments = square_segments(file.read_bytes(), str(file), self.size)
        return Photo(
            resize(image, self.size, self.size),
            self.texts.get(photo["id"], ""),
            {"pose": self._pose(image, people)} if self.knows_people else {},
            self._mask(image, people) if self.knows_people else None,
            segments,
            photo["file_name"],
        )

    def _pose(self, image: Image, people: Sequence[dict[str, Any]]) -> Image:
        height, width = image.shape[:2]
        scale = self.size / min(height, width)
        shift = (np.array([width, height]) * scale - self.size) // 2
        joints = [openpose(person["keypoints"]) * scale - shift for person in people if person["num_keypoints"]]
        return draw_pose(joints, self.size, self.size)

    def _mask(self, image: Image, people: Sequence[dict[str, Any]]) -> np.ndarray:
        mask = np.zeros(image.shape[:2], np.uint8)
        for person in people:
            _fill(mask, person["segmentation"])
        return resize(np.repeat(mask[..., None], 3, -1), self.size, self.size, kind="seg")[..., 0] > 0


class CocoPeople(Coco):
    """COCO 2017's validation photos in which a person shows most of the body, without captions.

    Needs ``val2017/`` and ``annotations/person_keypoints_val2017.json``. A photo counts if one person has at least 12
    of 17 keypoints and covers at least 5 % of it; the pose of everybody is drawn, and ``person`` covers them all.

    Raises:
        UserError: a part is missing.
    """

    def __init__(self, folder: Path, size: int) -> None:
        path = folder / "annotations" / "person_keypoints_val2017.json"
        missing = [str(part) for part in (path, folder / "val2017") if not part.exists()]
        if missing:
            raise UserError(f"COCO 2017 is not whole: there is no {', no '.join(missing)}")
        super().__init__(folder, size, "val2017")
        self.texts = {}
        self.photos = [
            photo
            for photo in self.photos
            if any(
                person["num_keypoints"] >= 12 and person["area"] >= 0.05 * photo["width"] * photo["height"]
                for person in self.people[photo["id"]]
            )
        ]
        if not self.photos:
            raise UserError(f"{path} has no photo with a whole person")


class Ade20k:
    """A split of ADE20K's scene parsing benchmark: ``images/SPLIT/`` and ``annotations/SPLIT/``, whose pictures hold
    the 150 classes from 1 on, and 0 elsewhere; elsewhere is black.

    Raises:
        UserError: there is no photo, or one lacks its annotation.
    """

    def __init__(self, folder: Path, size: int, split: str = "training") -> None:
        self.size = size
        self.paths = sorted(path for path in (folder / "images" / split).glob("*") if path.suffix.lower() in SUFFIXES)
        self.notes = folder / "annotations" / split
        if not self.paths:
            raise UserError(f"ADE20K is not whole: there are no photos in {folder / 'images' / split}")
        there = {path.stem for path in self.notes.glob("*.png")}
        if missing := [path.stem for path in self.paths if path.stem not in there]:
            raise UserError(f"ADE20K is not whole: {self.notes} lacks {missing[0]}.png")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Photo:
        path = self.paths[number]
        note = self.notes / f"{path.stem}.png"
        classes = square_segments(note.read_bytes(), str(note), self.size)
        if classes.max() > len(ADE20K_PALETTE):
            raise UserError(f"{note} has classes beyond {len(ADE20K_PALETTE)}")
        colours = np.concatenate([np.zeros((1, 3), np.uint8), ADE20K_PALETTE])
        image = resize(read_image(path), self.size, self.size)
        return Photo(image, maps={"seg": colours[classes]}, segments=classes, name=path.name)


def openpose(keypoints: Sequence[float]) -> np.ndarray:
    """COCO's ``x, y, visible`` triples -> ``(18, 2)`` joints, ``nan`` where there is none."""
    given = np.array(keypoints, float).reshape(17, 3)
    return from_coco(np.where(given[:, 2:] > 0, given[:, :2], np.nan))


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is damaged: it is no JSON") from None
    return content


def _check_inside(person: Mapping[str, Any], photo: Mapping[str, Any]) -> None:
    given = np.array(person["keypoints"], float).reshape(17, 3)
    points = [given[given[:, 2] > 0, :2]]
    if isinstance(person["segmentation"], list):
        points += [np.array(polygon, float).reshape(-1, 2) for polygon in person["segmentation"]]
    every = np.concatenate(points)
    size = np.array([photo["width"], photo["height"]])
    if ((every < -_SLACK) | (every > size + _SLACK)).any():
        raise UserError(
            f"annotation {person['id']} lies outside its photo {photo['file_name']} ({size[0]} x {size[1]} pixels)"
        )


def _fill(mask: np.ndarray, segmentation: Any) -> None:
    """Draw COCO's polygons, or its run lengths for crowds (columns first), into a mask."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, list):  # COCO 2017 publishes plain counts only
            runs = np.repeat(np.arange(len(counts)) % 2, counts)
            mask |= runs.reshape(segmentation["size"][::-1]).T.astype(np.uint8)
        return
    for polygon in segmentation:
        points = np.rint(np.array(polygon).reshape(-1, 2)).astype(np.int32)
        cv2.fillPoly(mask, [points], 1)
