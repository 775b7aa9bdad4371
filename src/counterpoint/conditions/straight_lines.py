"""Straight lines without a network: the line segment detector (von Gioi et al. 2010), drawn as MLSD's are."""

from __future__ import annotations

import cv2
import numpy as np

from counterpoint.types import Image

LEAST = 1 / 10
"""Shortest line that is drawn, as a share of the shorter side."""


def straight_lines(photo: Image) -> Image:
    """Straight edges as white lines of one pixel on black."""
    found = cv2.createLineSegmentDetector().detect(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY))[0]
    drawn = np.zeros(photo.shape, np.uint8)
    for x0, y0, x1, y1 in [] if found is None else found.reshape(-1, 4):
        if np.hypot(x1 - x0, y1 - y0) >= LEAST * min(photo.shape[:2]):
            cv2.line(drawn, (round(x0), round(y0)), (round(x1), round(y1)), (255, 255, 255))
    return drawn
