"""COCO 2017, ADE20K and the Oxford-IIIT pets as they are published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from counterpoint.conditions.image import read_image, resize
from counterpoint.conditions.openpose import draw_pose, from_coco
from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.data.annotations import Entry, Person, fill, read_annotations
from counterpoint.data.beside import PublishedPhotos
from counterpoint.data.photos import SUFFIXES, Photo, read_bytes, square, square_segments
from counterpoint.types import Image, UserError


class AnnotatedPhotos(PublishedPhotos):
    """Photos of a folder with COCO's annotations: the first caption, everybody's pose, where people are, segments.

    Args:
        photos: their annotations.
        root: of the data set.
        size: to which pictures are brought.
        folder: of their files, below the root.
        segments: of the pictures of segments, likewise, if there are any.

    Raises:
        UserError: there are no photos.
    """

    def __init__(
        self, photos: Sequence[Entry], root: Path, size: int, folder: str = "", segments: str | None = None
    ) -> None:
        if not photos:
            raise UserError(f"{root}: its annotations name no photos")
        self.photos, self.root, self.size = list(photos), root, size
        self.folder, self.segments = Path(folder), None if segments is None else Path(segments)

    def __len__(self) -> int:
        return len(self.photos)

    def _row(self, number: int) -> dict[str, str]:
        entry = self.photos[number]
        row = {"file_name": (self.folder / entry.name).as_posix()}
        if self.segments is not None and entry.panoptic:
            row["segments_file_name"] = (self.segments / entry.panoptic).as_posix()
        return row

    def published(self, kind: str) -> list[int]:
        """Poses, where people are annotated."""
        return [number for number, entry in enumerate(self.photos) if entry.knows_people] if kind == "pose" else []

    def _photo(self, number: int) -> Photo:
        entry, row = self.photos[number], self._row(number)
        if entry.damage:
            raise UserError(entry.damage)
        image = read_image(self.root / row["file_name"])
        height, width = image.shape[:2]
        if (width, height) != (entry.width, entry.height):
            raise UserError(
                f"{entry.name} has {width} x {height} pixels; its annotations are for {entry.width} x {entry.height}"
            )
        segments = None
        if "segments_file_name" in row:
            file = self.root / row["segments_file_name"]
            segments = square_segments(read_bytes(file), str(file), self.size, (height, width))
        return Photo(
            square(image, self.size, entry.name),
            entry.captions[0][1] if entry.captions else "",
            {"pose": self._pose(image, entry.people)} if entry.knows_people else {},
            self._mask(image, entry.people) if entry.knows_people else None,
            segments,
            entry.name,
        )

    def _pose(self, image: Image, people: Sequence[Person]) -> Image:
        height, width = image.shape[:2]
        scale = self.size / min(height, width)
        shift = (np.array([width, height]) * scale - self.size) // 2
        joints = [openpose(person.keypoints) * scale - shift for person in people if person.seen]
        return draw_pose(joints, self.size, self.size)

    def _mask(self, image: Image, people: Sequence[Person]) -> np.ndarray:
        mask = np.zeros(image.shape[:2], np.uint8)
        for person in people:
            fill(mask, person.segmentation)
        return resize(np.repeat(mask[..., None], 3, -1), self.size, self.size, kind="seg")[..., 0] > 0


class Coco(AnnotatedPhotos):
    """A split of COCO 2017: ``SPLIT/`` with what ``annotations/`` has of ``captions_SPLIT.json`` (the first caption),
    ``person_keypoints_SPLIT.json`` (poses and where people are) and ``panoptic_SPLIT/`` (segments).

    Raises:
        UserError: there is no annotation at all, or too many are broken.
    """

    def __init__(self, folder: Path, size: int, split: str = "train2017") -> None:
        notes = folder / "annotations"
        files = [path for path in (notes / f"{sort}_{split}.json" for sort in _SORTS) if path.exists()]
        if not (folder / split).is_dir() or not files:
            raise UserError(
                f"COCO 2017 is not whole: {folder} lacks {split}, or captions_{split}.json and "
                f"person_keypoints_{split}.json in annotations"
            )
        if len(files) > 1:  # the list of panoptic segments is large, and needed for nothing but the photos' names
            files = [path for path in files if not path.name.startswith("panoptic")]
        segments = f"annotations/panoptic_{split}"
        super().__init__(
            read_annotations(files), folder, size, split, segments if (folder / segments).is_dir() else None
        )
        for entry in self.photos:
            entry.panoptic = entry.panoptic or f"{Path(entry.name).stem}.png"


_SORTS = ("captions", "person_keypoints", "panoptic")


def coco_splits(folder: Path) -> list[str]:
    """The splits of COCO that a folder has annotations and photos of, the one for training first."""
    found = {path.stem.rpartition("_")[2] for sort in _SORTS for path in folder.glob(f"annotations/{sort}_*.json")}
    return sorted((split for split in found if (folder / split).is_dir()), key=lambda one: ("train" not in one, one))


class CocoInOne(AnnotatedPhotos):
    """Photos in ``images/`` whose annotations lie in one ``annotations.json``, in each photo's record or beside them.

    Raises:
        UserError: as :func:`~counterpoint.data.annotations.read_annotations`.
    """

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__(read_annotations([folder / "annotations.json"]), folder, size, "images", "")


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
        self.photos = [entry for entry in self.photos if entry.shows_a_whole_person]
        for entry in self.photos:
            entry.captions = []
        if not self.photos:
            raise UserError(f"{path} has no photo with a whole person")


class _Labelled(PublishedPhotos):
    """Photos, each with a picture of numbers that is called as it is.

    Args:
        root: of the data set.
        size: to which pictures are brought.
        photos: folder of the photos, below the root.
        notes: of the pictures of numbers, likewise.
        what: the data set is called in a message.

    Raises:
        UserError: there is no photo, or one lacks its numbers.
    """

    def __init__(self, root: Path, size: int, photos: str, notes: str, what: str) -> None:
        self.root, self.size, self.notes = root, size, root / notes
        folder = root / photos
        self.paths = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise UserError(f"{what} is not whole: there are no photos in {folder}")
        there = {path.stem for path in self.notes.glob("*.png")}
        if missing := [path.stem for path in self.paths if path.stem not in there]:
            raise UserError(f"{what} is not whole: {self.notes} lacks {missing[0]}.png")

    def __len__(self) -> int:
        return len(self.paths)

    def _row(self, number: int) -> dict[str, str]:
        path = self.paths[number]
        files = {"file_name": path, "segments_file_name": self.notes / f"{path.stem}.png"}
        return {key: file.relative_to(self.root).as_posix() for key, file in files.items()}

    def _read(self, number: int) -> tuple[Image, np.ndarray]:
        """A photo and its numbers, as squares."""
        path, note = (self.root / name for name in self._row(number).values())
        image = read_image(path)
        labels = square_segments(read_bytes(note), str(note), self.size, image.shape[:2])
        return square(image, self.size, path), labels


class Ade20k(_Labelled):
    """A split of ADE20K's scene parsing benchmark: ``images/SPLIT/`` and ``annotations/SPLIT/``, whose pictures hold
    the 150 classes from 1 on, and 0 elsewhere; elsewhere is black. The kind of scene that ``sceneCategories.txt``
    names, if it is there, is the caption.

    Raises:
        UserError: there is no photo, or one lacks its annotation.
    """

    def __init__(self, folder: Path, size: int, split: str = "training") -> None:
        super().__init__(folder, size, f"images/{split}", f"annotations/{split}", "ADE20K")
        scenes = folder / "sceneCategories.txt"
        lines = read_bytes(scenes).decode(errors="replace").splitlines() if scenes.exists() else []
        self.scenes = dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)

    def published(self, kind: str) -> list[int]:
        """Every photo has its segmentation."""
        return list(range(len(self))) if kind == "seg" else []

    def _photo(self, number: int) -> Photo:
        image, classes = self._read(number)
        if classes.max() > len(ADE20K_PALETTE):
            raise UserError(f"{self.notes / self.paths[number].stem}.png has classes beyond {len(ADE20K_PALETTE)}")
        colours = np.concatenate([np.zeros((1, 3), np.uint8), ADE20K_PALETTE])
        scene = self.scenes.get(self.paths[number].stem, "misc").replace("_", " ")
        text = "a photo" if scene == "misc" else f"a photo of a {scene}"
        return Photo(image, text, {"seg": colours[classes]}, segments=classes, name=self.paths[number].name)


class Pets(_Labelled):
    """The Oxford-IIIT Pet data set, or a part of it: ``images/``, and ``trimaps/`` or ``annotations/trimaps/``, whose
    pictures hold 1 for the animal, 2 for what is behind it and 3 for the border between them, as segments.

    Raises:
        UserError: there is no photo, or one lacks its trimap.
    """

    def __init__(self, folder: Path, size: int) -> None:
        notes = next(path for path in PET_TRIMAPS if (folder / path).is_dir())
        super().__init__(folder, size, "images", notes, "the data set of pets")

    def published(self, kind: str) -> list[int]:
        """No condition images."""
        return []

    def _photo(self, number: int) -> Photo:
        image, trimap = self._read(number)
        return Photo(image, segments=trimap, name=self.paths[number].name)


PET_TRIMAPS = ("trimaps", "annotations/trimaps")
"""Where trimaps may lie."""


def openpose(keypoints: Sequence[float]) -> np.ndarray:
    """COCO's ``x, y, visible`` triples -> ``(18, 2)`` joints, ``nan`` where there is none."""
    given = np.array(keypoints, float).reshape(17, 3)
    return from_coco(np.where(given[:, 2:] > 0, given[:, :2], np.nan))
