"""Published data sets as benchmark cases, read in the layouts in which they are published.

Nothing is downloaded: a user names the folder, and what is missing in it is said.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from counterpoint.conditions.image import read_image, resize
from counterpoint.conditions.openpose import draw_pose, from_coco
from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.data.pairs import Case, Layout, everywhere, silenced
from counterpoint.data.photos import Photo, Pictures
from counterpoint.data.samples import Extract
from counterpoint.data.tables import parquet
from counterpoint.types import Image, UserError


class CocoPeople:
    """COCO 2017's validation photos in which a person shows most of the body.

    Needs ``val2017/`` and ``annotations/person_keypoints_val2017.json``. A photo counts if one person has at least 12
    of 17 keypoints and covers at least 5 % of it; the pose of everybody is drawn, and ``person`` covers them all.

    Raises:
        UserError: a part is missing.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        path = folder / "annotations" / "person_keypoints_val2017.json"
        _need("COCO 2017", path, folder / "val2017")
        content = json.loads(path.read_text())
        people: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for person in content["annotations"]:
            people[person["image_id"]].append(person)
        self.photos = [
            (photo, people[photo["id"]])
            for photo in sorted(content["images"], key=lambda one: one["id"])
            if any(
                person["num_keypoints"] >= 12 and person["area"] >= 0.05 * photo["width"] * photo["height"]
                for person in people[photo["id"]]
            )
        ]
        if not self.photos:
            raise UserError(f"{path} has no photo with a whole person")

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, number: int) -> Photo:
        photo, people = self.photos[number]
        image = read_image(self.folder / "val2017" / photo["file_name"])
        height, width = image.shape[:2]
        scale = self.size / min(height, width)
        shift = (np.array([width, height]) * scale - self.size) // 2
        mask = np.zeros((height, width), np.uint8)
        for person in people:
            _fill(mask, person["segmentation"])
        joints = [_openpose(person["keypoints"]) * scale - shift for person in people if person["num_keypoints"]]
        return Photo(
            resize(image, self.size, self.size),
            maps={"pose": draw_pose(joints, self.size, self.size)},
            person=resize(np.repeat(mask[..., None], 3, -1), self.size, self.size, kind="seg")[..., 0] > 0,
        )


SETS: dict[str, Callable[[Path, int], Sequence[Photo]]] = {
    "coco2017": CocoPeople,
    "bg20k": Pictures,
    "laion": Pictures,
    "multigen": lambda folder, size: parquet(folder, size, "text", {}, "validation"),
    "multigen-depth": lambda folder, size: parquet(folder, size, "text", {"depth": "control_depth"}, "validation"),
    "ade20k": lambda folder, size: parquet(folder, size, "prompt", {"seg": "control_seg"}, "validation"),
}  # type: ignore[dict-item]  # sequences in all that is needed: a length and numbered items
"""Published set -> what reads its folder at a size: MultiGen-20M's two evaluation sets and Captioned ADE20K as
ControlNet++ (arXiv:2404.07987) published them."""


class PublishedCases:
    """The cases of :mod:`counterpoint.data.pairs`, made of published photos.

    Args:
        sets: name in :data:`SETS` -> photos.
        extract: what reads a condition image from a photo; published maps come first.
    """

    SILENT_KINDS = ("canny", "hed")
    LEVELS = ("none", "brief")
    CLASSES = len(ADE20K_PALETTE)

    def __init__(self, sets: Mapping[str, Sequence[Photo]], extract: Extract) -> None:
        self.sets, self.extract = sets, extract

    def conflicting(self, number: int, background: str = "seg") -> Case:
        """A person of COCO 2017 over the segmentation or depth of a BG-20K photo (Cross-ControlNet, section 4.3)."""
        person, other = self._photo(number, "coco2017"), self._photo(number, "bg20k")
        images = {"pose": person.maps["pose"], background: self._map(other, background)}
        photos = {"pose": person.image, background: other.image}
        return Case("a photo of a person", images, everywhere(images), photos, person.person, "person")

    def complementary(self, number: int, kinds: tuple[str, ...] = ("hed", "seg")) -> Case:
        """Several maps of one captioned photo."""
        photo = self._photo(number, "laion", "multigen")
        images = {kind: self._map(photo, kind) for kind in kinds}
        return Case(photo.text, images, everywhere(images), dict.fromkeys(kinds, photo.image))

    def alone(self, number: int, kind: str) -> Case:
        """One control, on the set in which the field measures it."""
        own = {"pose": "coco2017", "depth": "multigen-depth", "seg": "ade20k"}.get(kind, "multigen")
        photo = self._photo(number, own)
        images = {kind: self._map(photo, kind)}
        text = photo.text or "a photo of a person"
        return Case(text, images, everywhere(images), {kind: photo.image}, photo.person)

    def silent(self, number: int, layout: Layout, kinds: tuple[str, str] = SILENT_KINDS, level: str = "brief") -> Case:
        """Two photos' maps, each silent where the other speaks; the caption is the first photo's."""
        photos = [self._photo(2 * number + i, "laion", "multigen") for i in range(2)]
        full = [(self._map(photo, kind), photo.image) for kind, photo in zip(kinds, photos, strict=True)]
        return silenced(photos[0].text if level == "brief" else "", kinds, full, layout)

    def _photo(self, number: int, *names: str) -> Photo:
        """From the first of several sets that is there.

        Raises:
            UserError: none is, or it has too few photos.
        """
        for name in names:
            if name in self.sets:
                if number >= len(self.sets[name]):
                    raise UserError(f"{name} has {len(self.sets[name])} photos only; ask for fewer cases with --n")
                return self.sets[name][number]
        raise UserError(f"this suite needs --data {' or '.join(f'{name}=FOLDER' for name in names)}")

    def _map(self, photo: Photo, kind: str) -> Image:
        return photo.maps[kind] if kind in photo.maps else self.extract[kind](photo.image)


def _need(name: str, *paths: Path) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise UserError(f"{name} is not whole: there is no {', no '.join(missing)}")


def _openpose(keypoints: Sequence[float]) -> np.ndarray:
    """COCO's ``x, y, visible`` triples -> ``(18, 2)`` joints, ``nan`` where there is none."""
    given = np.array(keypoints, float).reshape(17, 3)
    return from_coco(np.where(given[:, 2:] > 0, given[:, :2], np.nan))


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
