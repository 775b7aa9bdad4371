"""Published data sets as benchmark cases, read in the layouts in which they are published.

Nothing is downloaded: a user names the folder, and what is missing in it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.data.beside import Pictures
from counterpoint.data.coco import Ade20k, CocoPeople
from counterpoint.data.manifest import PROMPT, open_manifest
from counterpoint.data.pairs import Case, Layout, everywhere, silenced
from counterpoint.data.photos import SEGMENTS, Photo
from counterpoint.data.samples import Extract
from counterpoint.data.tables import parquet
from counterpoint.types import Image, UserError

SETS: dict[str, Callable[[Path, int], Sequence[Photo]]] = {
    "coco2017": CocoPeople,
    "bg20k": Pictures,
    "laion": Pictures,
    "multigen": lambda folder, size: parquet(folder, size, "text", {}, "validation"),
    "multigen-depth": lambda folder, size: parquet(folder, size, "text", {"depth": "control_depth"}, "validation"),
    "ade20k": lambda folder, size: (
        Ade20k(folder, size, "validation")
        if (folder / "annotations").is_dir()
        else parquet(folder, size, "prompt", {"seg": "control_seg", SEGMENTS: "seg_map"}, "validation")
    ),
}  # type: ignore[dict-item]  # sequences in all that is needed: a length and numbered items
"""Published set -> what reads its folder at a size: MultiGen-20M's two evaluation sets and Captioned ADE20K as
ControlNet++ (arXiv:2404.07987) published them, or ADE20K's scene parsing benchmark itself."""


PARTS = ("pairs", "photos", "backgrounds")
"""What the cases of a manifest are named by: its file, and the folders of its pictures."""


def check_sets(names: Collection[str]) -> None:
    """Hold the names of sets against those that there are.

    Raises:
        UserError: there is no such set, or a manifest lacks its photos.
    """
    if unknown := sorted(set(names) - {*SETS, *PARTS}):
        raise UserError(f"unknown data set {unknown[0]!r}; there are {', '.join((*SETS, *PARTS))}")
    if set(PARTS) & set(names) and not {"pairs", "photos"} <= set(names):
        raise UserError("pairs of your own need --data pairs=MANIFEST and --data photos=FOLDER")


def open_sets(places: Mapping[str, Path], size: int) -> dict[str, Sequence[Photo]]:
    """Published sets by name, and what a manifest lists of a user's.

    Raises:
        UserError: as :func:`check_sets`, or a part of one is missing.
    """
    check_sets(places)
    sets = {name: SETS[name](place, size) for name, place in places.items() if name in SETS}
    if "pairs" in places:
        sets |= open_manifest(places["pairs"], places["photos"], places.get("backgrounds"), size)
    return sets


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
        names = {"pose": person.name, background: other.name}
        return Case(PROMPT, images, everywhere(images), photos, person.person, "person", names)

    def complementary(self, number: int, kinds: tuple[str, ...] = ("hed", "seg")) -> Case:
        """Several maps of one captioned photo."""
        photo = self._photo(number, "laion", "multigen")
        images = {kind: self._map(photo, kind) for kind in kinds}
        photos, names = dict.fromkeys(kinds, photo.image), dict.fromkeys(kinds, photo.name)
        return Case(photo.text, images, everywhere(images), photos, names=names)

    def alone(self, number: int, kind: str) -> Case:
        """One control, on the set in which the field measures it."""
        own = {"pose": "coco2017", "depth": "multigen-depth", "seg": "ade20k"}.get(kind, "multigen")
        photo = self._photo(number, own)
        images = {kind: self._map(photo, kind)}
        text = photo.text or PROMPT
        photos, names = {kind: photo.image}, {kind: photo.name}
        classes = photo.segments - 1 if kind == "seg" and photo.segments is not None else None  # 0 is unlabelled
        if classes is not None and classes.max() >= self.CLASSES:
            raise UserError(
                f"{photo.name} of {own}: its seg_map holds {classes.max() + 1}; classes are 1 to {self.CLASSES}"
            )
        return Case(text, images, everywhere(images), photos, photo.person, names=names, classes=classes)

    def silent(self, number: int, layout: Layout, kinds: tuple[str, str] = SILENT_KINDS, level: str = "brief") -> Case:
        """Two photos' maps, each silent where the other speaks; the caption is the first photo's."""
        photos = [self._photo(2 * number + i, "laion", "multigen") for i in range(2)]
        full = [(self._map(photo, kind), photo.image) for kind, photo in zip(kinds, photos, strict=True)]
        case = silenced(photos[0].text if level == "brief" else "", kinds, full, layout)
        return replace(case, names={kind: photo.name for kind, photo in zip(kinds, photos, strict=True)})

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
