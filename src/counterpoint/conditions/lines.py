"""Drawn lines without a network: difference of Gaussians with a soft threshold (XDoG, Winnemoeller et al. 2012)."""

from __future__ import annotations

import cv2
import numpy as np

from counterpoint.types import Image

SIGMA = 1.0
"""Width of a line in pixels at 512 pixels; it grows with the shorter side and is never thinner than 0.7."""
RATIO = 1.6
"""The coarse Gaussian's width, in those of the fine one."""
GAIN = 40
SHARPNESS = 0.98
"""Share of the coarse Gaussian that is taken off; what is left of even regions is below the threshold."""


def lines(photo: Image) -> Image:
    """Dark lines and edges as white lines on black, 0..255 in three equal channels."""
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    sigma = line_width(min(grey.shape))
    fine, coarse = (cv2.GaussianBlur(grey, (0, 0), s, borderType=cv2.BORDER_REPLICATE) for s in (sigma, RATIO * sigma))
    darker = coarse * SHARPNESS - fine  # positive on the dark side of an edge and along dark lines
    drawn = np.tanh(GAIN * np.maximum(darker, 0))
    return np.repeat(np.rint(255 * drawn).astype(np.uint8)[..., None], 3, -1)


def line_width(side: int) -> float:
    """Width of a line in a picture whose shorter side is this, in pixels."""
    return max(0.7, SIGMA * side / 512)
