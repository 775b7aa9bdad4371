"""Canny edges (Canny 1986), as every ControlNet for edges is fed."""

from __future__ import annotations

import cv2
import numpy as np

from counterpoint.types import Image


def canny(photo: Image, low: int = 100, high: int = 200) -> Image:
    """Binary edges, 0 or 255 in three equal channels.

    Args:
        photo: RGB. The channels are given to OpenCV in BGR order, as the published annotators do.
        low: weaker threshold on the gradient, 0..255.
        high: stronger threshold.
    """
    return np.repeat(cv2.Canny(photo[..., ::-1].copy(), low, high)[..., None], 3, -1)
