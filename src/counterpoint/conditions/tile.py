"""Tiles: a picture without its detail, for ControlNets that put detail back."""

from __future__ import annotations

import cv2

from counterpoint.types import Image

SHRINK = 4
"""How many pixels become one, along each side."""


def tile(photo: Image) -> Image:
    """The photo, shrunk by :data:`SHRINK` and brought back."""
    height, width = photo.shape[:2]
    small = cv2.resize(photo, (max(1, width // SHRINK), max(1, height // SHRINK)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
