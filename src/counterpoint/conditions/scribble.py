"""Scribbles: the ridges of soft edges as thick binary strokes, as the ControlNets for scribbles were trained."""

from __future__ import annotations

import cv2
import numpy as np

from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.types import Image

_FLOOR = 127
"""Soft edges below this are no strokes, 0..255."""
_WIDTH = 3.0
"""Deviation in pixels at 512 pixels of the blurs before and after thinning."""


def scribble(photo: Image) -> Image:
    """Binary strokes, 0 or 255 in three equal channels, of a photo."""
    return strokes(soft_edge(photo))


def strokes(edges: Image) -> Image:
    """Binary strokes of soft edges: thinned to their ridges, then widened."""
    sigma = max(1.0, _WIDTH * min(edges.shape[:2]) / 512)
    soft = cv2.GaussianBlur(edges[..., 0].astype(np.float32), (0, 0), sigma)
    ridge = np.zeros(soft.shape, bool)
    for direction in (((0, 0, 0), (1, 1, 1), (0, 0, 0)), ((0, 1, 0),) * 3, np.eye(3), np.eye(3)[::-1]):
        ridge |= cv2.dilate(soft, np.array(direction, np.uint8)) == soft
    thin = (ridge & (soft > _FLOOR)).astype(np.uint8) * 255
    wide = cv2.GaussianBlur(thin, (0, 0), sigma) > 4
    return np.repeat((wide * np.uint8(255))[..., None], 3, -1)
