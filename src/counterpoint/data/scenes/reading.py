"""What a segmentation says about a scene: the words of its caption, read back."""

from __future__ import annotations

import cv2
import numpy as np

from counterpoint.data.scenes.vocabulary import KINDS, SEG_INDEX
from counterpoint.types import Image

_GROUNDS = ("grass", "sand", "snow", "road", "floor", "earth")
_PLACES = {"grass": "meadow", "snow": "snow", "road": "street", "floor": "room"}
_THINGS = [SEG_INDEX[kind] for kind in KINDS]
_MIG = {
    "red": (((0, 50, 70), (9, 255, 255)), ((159, 50, 70), (180, 255, 255))),
    "blue": (((90, 50, 70), (128, 255, 255)),),
    "yellow": (((25, 50, 70), (35, 255, 255)),),
    "green": (((36, 50, 70), (89, 255, 255)),),
    "black": (((0, 0, 0), (180, 255, 30)),),
    "white": (((0, 0, 221), (180, 43, 255)),),
    "brown": (((6, 43, 35), (25, 255, 255)),),
}
"""COCO-MIG's ranges in OpenCV's 8-bit HSV."""


def background(seg: np.ndarray) -> str:
    """The background that a class map ``(h, w)`` shows: by its most frequent ground, then by what is above it."""
    share = np.bincount(seg.ravel(), minlength=len(SEG_INDEX)) / seg.size
    of = {name: share[index] for name, index in SEG_INDEX.items()}
    ground = max(_GROUNDS, key=of.__getitem__)
    if ground == "sand":
        return "beach" if of["sea"] > 0.01 else "desert"
    if ground == "earth":
        return "forest" if of["tree"] > of["sky"] else "night"
    return _PLACES[ground]


def main_thing(seg: np.ndarray, least: float = 0.005) -> str | None:
    """The kind of thing that takes most of a class map, if it takes at least a share ``least`` of it."""
    counts = np.bincount(seg.ravel(), minlength=len(SEG_INDEX))[_THINGS]
    return list(KINDS)[int(counts.argmax())] if counts.max() >= least * seg.size else None


def has_colour(image: Image, mask: np.ndarray, colour: str, least: float = 0.2) -> bool:
    """COCO-MIG's rule: at least a share ``least`` of the masked pixels lies in the colour's range of HSV.

    Purple, which that benchmark does not have, takes the hues between its blue and its red.
    """
    if not mask.any():
        return False
    hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
    ranges = _MIG.get(colour, (((129, 50, 70), (158, 255, 255)),))
    inside = np.any([cv2.inRange(hsv, np.array(low), np.array(high)) > 0 for low, high in ranges], 0)
    return bool(inside[mask].mean() >= least)
