"""The three styles: what happens to the painted picture, never to its annotations."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from counterpoint.data.scenes.canvas import Array, noise

Rng = np.random.Generator


def apply_style(rgb: Array, style: str, rng: Rng) -> Array:
    """Turn the RGB layer (float, 0..255) into the finished picture, ``uint8``."""
    return STYLED[style](rgb, rng)


def _bytes(rgb: Array) -> Array:
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def _photo(rgb: Array, rng: Rng) -> Array:
    return _bytes(rgb + 1.6 * noise(rng, 256)[..., None])


def _watercolour(rgb: Array, rng: Rng) -> Array:
    wash = cv2.medianBlur(_bytes(rgb), 5).astype(np.float32)
    edge = np.abs(cv2.Laplacian(cv2.GaussianBlur(wash, (0, 0), 1.2), cv2.CV_32F)).max(-1, keepdims=True)
    paper = 6 * noise(rng, 128)[..., None] + 8 * noise(rng, 16)[..., None]
    return _bytes(255 - (255 - wash) * 0.66 - 1.1 * edge + paper)


def _line_drawing(rgb: Array, rng: Rng) -> Array:
    smooth = cv2.GaussianBlur(rgb, (0, 0), 0.8)
    slope = np.sqrt(cv2.Sobel(smooth, cv2.CV_32F, 1, 0) ** 2 + cv2.Sobel(smooth, cv2.CV_32F, 0, 1) ** 2).max(-1)
    tone = smooth.mean(-1)
    ink = 250 - 0.10 * (255 - tone) - np.clip(1.15 * slope - 24, 0, 215) + 1.5 * noise(rng, 256)
    return np.repeat(_bytes(ink)[..., None], 3, -1)


STYLED: dict[str, Callable[[Array, Rng], Array]] = {
    "photo": _photo,
    "watercolour": _watercolour,
    "line drawing": _line_drawing,
}
