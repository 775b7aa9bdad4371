"""What a segmentation says about a scene: the words of its caption, read back."""

from __future__ import annotations

import numpy as np

from counterpoint.data.scenes.vocabulary import KINDS, SEG_INDEX

_GROUNDS = ("grass", "sand", "snow", "road", "floor", "earth")
_PLACES = {"grass": "meadow", "snow": "snow", "road": "street", "floor": "room"}
_THINGS = [SEG_INDEX[kind] for kind in KINDS]


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
