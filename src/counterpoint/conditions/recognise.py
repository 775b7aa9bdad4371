"""Is this picture a photo, or a condition map already? By its colours alone."""

from __future__ import annotations

import warnings

import cv2
import numpy as np

from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.types import CONTROL_KINDS, Image, Notice, meaning

_MOST = 0.97
"""Share of pixels that must agree."""
_LABELS = 48
"""Colours of a picture that has no more of them than labels would."""
_PLAIN = CONTROL_KINDS.keys() - {"tile", "normal"}
"""Kinds whose maps nobody takes for a photo."""
_CODES = np.unique(ADE20K_PALETTE.astype(np.int64) @ [65536, 256, 1])


class WrongPicture(Notice):
    """A photo where a condition map is expected, or the other way round."""


def check_picture(name: str, picture: Image, kind: str, *, photo: bool) -> None:
    """Warn about a picture that does not look like what it is given as, with :class:`WrongPicture`.

    Args:
        name: of the picture, for the message.
        picture: RGB.
        kind: of the control.
        photo: whether it is given as a photo to extract from, not as a condition map.
    """
    found = recognise(picture)
    said = None
    if photo and found == "inverted" and kind != "tile":
        said = "dark lines on white already: invert it and give it with --control"
    elif photo and found is not None and kind != "tile":
        said = f"a {found} map already: give it with --control"
    elif not photo and found == "inverted" and meaning(kind).silent == 0:
        said = "dark lines on white: controls are white on black, invert it"
    elif not photo and found is None and kind in _PLAIN and int(np.ptp(picture, -1).max()) > 2:
        said = f"a photo: give it with --photo {kind}=..., which extracts the {kind} map"
    if said is not None:
        warnings.warn(f"{name} looks like {said}", WrongPicture, stacklevel=3)


def recognise(picture: Image) -> str | None:
    """The kind of control whose map a picture looks like, or ``None`` for a photo.

    Kinds that look alike go by one name: ``"canny"`` stands for every sort of binary line, ``"hed"`` for every sort of
    soft one, ``"inverted"`` for dark ones on white.
    """
    small = picture[:: max(1, picture.shape[0] // 512), :: max(1, picture.shape[1] // 512)]
    low, high = small.min(-1).astype(np.int16), small.max(-1).astype(np.int16)
    if (high - low).max() <= 2:
        return _grey(low)
    codes = small.astype(np.int64) @ [65536, 256, 1]
    if np.isin(codes, _CODES).mean() >= _MOST or len(np.unique(codes)) <= _LABELS:
        return "seg"
    length = np.linalg.norm(small / 127.5 - 1, axis=-1)
    if ((length > 0.9) & (length < 1.1)).mean() >= _MOST:
        return "normal"
    coloured = (high > 40).mean()
    if 0.001 < coloured < 0.25 and (high <= 8).mean() >= 0.7:
        saturated = (high - low)[high > 40] / high[high > 40] > 0.7
        return "pose" if saturated.mean() > 0.8 else None
    return None


def _grey(values: np.ndarray) -> str | None:
    black = (values <= 8).mean()
    if ((values <= 8) | (values >= 247)).mean() >= _MOST and 0.3 < black < 1:
        return "canny"
    if (values <= 24).mean() > 0.5 and black < 1 and np.percentile(values, 99.5) > 128:
        return "hed"
    if (values >= 231).mean() > 0.5 and np.percentile(values, 0.5) < 128:
        return "inverted"
    rough = np.abs(cv2.Laplacian(values.astype(np.float32), cv2.CV_32F))
    return "depth" if values.max() > values.min() and np.median(rough) <= 1 else None
