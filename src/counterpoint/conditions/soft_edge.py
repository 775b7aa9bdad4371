"""Soft edges without a network: a gradient magnitude that fades like HED's side outputs."""

from __future__ import annotations

import cv2
import numpy as np

from counterpoint.types import Image


def soft_edge(photo: Image) -> Image:
    """Soft edges, 0..255 in three equal channels: fine and coarse colour gradients, squashed smoothly below 255."""
    colour = photo.astype(np.float32)
    strength = np.zeros(photo.shape[:2], np.float32)
    for sigma, weight in ((1.0, 0.6), (2.0, 0.9)):
        smooth = cv2.GaussianBlur(colour, (0, 0), sigma)
        dx = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, borderType=cv2.BORDER_REPLICATE)
        dy = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, borderType=cv2.BORDER_REPLICATE)
        strength += weight * np.sqrt(dx * dx + dy * dy).max(-1)
    edge = 255 * np.tanh(np.maximum(strength - 12, 0) / 220)
    return np.repeat(np.rint(edge).astype(np.uint8)[..., None], 3, -1)
