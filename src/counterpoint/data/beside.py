"""Photos in the layouts of their publishers, with the condition images that were made beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import PIL.Image

from counterpoint.conditions.image import read_image, resize
from counterpoint.data.photos import Photo, check_shape
from counterpoint.types import CONTROL_KINDS


def beside(root: Path, kind: str, name: str) -> Path:
    """Where ``counterpoint extract --batch`` puts the condition image of ``ROOT/NAME``: ``ROOT/KIND/NAME.png``."""
    return root / kind / f"{name.rpartition('.')[0]}.png"


class PublishedPhotos(ABC):
    """Photos whose files stay where their publisher put them. A condition image that did not come with a photo is
    the one that was made beside it, if there is one.

    Attributes:
        root: of the data set.
        size: to which pictures are brought.
    """

    root: Path
    size: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> dict[str, str]:
        """A photo as a row of ``metadata.jsonl``: ``file_name`` below the root, ``segments_file_name`` if it has any.

        Raises:
            UserError: what is known of it is damaged.
        """

    @abstractmethod
    def published(self, kind: str) -> list[int]:
        """The numbers of the photos whose publisher drew a condition image of a kind."""

    @abstractmethod
    def _photo(self, number: int) -> Photo: ...

    def __getitem__(self, number: int) -> Photo:
        photo, made = self._photo(number), {}
        name = self.row(number)["file_name"] if self._kinds else ""
        for kind in self._kinds - set(photo.maps):
            if (path := beside(self.root, kind, name)).exists():
                picture = read_image(path)
                with PIL.Image.open(self.root / name) as whole:
                    check_shape(str(path), picture.shape[:2], (whole.height, whole.width))
                made[kind] = resize(picture, self.size, self.size, kind=kind)
        return replace(photo, maps={**photo.maps, **made})

    def having(self, kind: str) -> list[int]:
        """The numbers of the photos with a condition image of a kind."""
        there = set(self.published(kind))
        made = {path.relative_to(self.root).as_posix() for path in (self.root / kind).rglob("*.png")}
        if made:
            names = (beside(Path(), kind, self.row(number)["file_name"]).as_posix() for number in range(len(self)))
            there |= {number for number, name in enumerate(names) if name in made}
        return sorted(there)

    @cached_property
    def _kinds(self) -> set[str]:
        """Of which some were made."""
        return {kind for kind in CONTROL_KINDS if (self.root / kind / "settings.json").exists()}
