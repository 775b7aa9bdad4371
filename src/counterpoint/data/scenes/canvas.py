"""The layers of a scene and the one operation that paints on all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np

from counterpoint.data.scenes.vocabulary import SIZE

Array = np.ndarray
Shader = Callable[[Array, Array], Array]
"""Pixel coordinates ``x (1, w)``, ``y (h, 1)`` -> RGB ``(h, w, 3)`` in 0..255."""
Paint = Array | Shader
"""One colour ``(3,)`` in 0..255, or a :data:`Shader`."""


@dataclass
class Canvas:
    """RGB in 0..255, class index, disparity in 0..1 (1 = nearest) and instance number (0 = background)."""

    rgb: Array = field(default_factory=lambda: np.zeros((SIZE, SIZE, 3), np.float32))
    seg: Array = field(default_factory=lambda: np.zeros((SIZE, SIZE), np.uint8))
    depth: Array = field(default_factory=lambda: np.zeros((SIZE, SIZE), np.float32))
    instance: Array = field(default_factory=lambda: np.zeros((SIZE, SIZE), np.uint8))

    def polygon(self, points: Array, paint: Paint, seg: int, depth: float, instance: int = 0) -> None:
        """Fill an anti-aliased polygon on every layer.

        Args:
            points: ``(n, 2)`` xy in pixels.
            paint: what goes into the RGB layer.
            seg: class index of the pixels that are covered at least half.
            depth: disparity of those pixels.
            instance: instance number of those pixels.
        """
        mask, x0, y0 = _cover(points)
        self._blend(mask, x0, y0, paint, seg, depth, instance)

    def _blend(self, mask: Array, x0: int, y0: int, paint: Paint, seg: int, depth: float, instance: int) -> None:
        height, width = mask.shape
        roi = np.s_[y0 : y0 + height, x0 : x0 + width]
        if callable(paint):
            y, x = np.ogrid[y0 : y0 + height, x0 : x0 + width]
            paint = paint(x.astype(np.float32), y.astype(np.float32))
        rgb = self.rgb[roi]
        rgb += (mask.astype(np.float32) * (1 / 255))[..., None] * (paint - rgb)
        hard = mask >= 128
        self.seg[roi][hard] = seg
        self.depth[roi][hard] = depth
        self.instance[roi][hard] = instance

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, paint: Paint, seg: int, depth: float, instance: int = 0
    ) -> None:
        """Fill an ellipse with centre ``(x, y)`` and radii ``rx, ry`` in pixels."""
        self.polygon(_CIRCLE * (rx, ry) + (x, y), paint, seg, depth, instance)

    def capsule(
        self, a: Array, b: Array, r0: float, r1: float, paint: Paint, seg: int, depth: float, instance: int = 0
    ) -> None:
        """Fill the limb between points ``a`` and ``b`` with radii ``r0`` and ``r1`` in pixels."""
        axis = np.subtract(b, a)
        angle = np.arctan2(axis[1], axis[0])
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        outline = np.concatenate([_HALF @ turn * r1 + b, -_HALF @ turn * r0 + a])
        self.polygon(outline, paint, seg, depth, instance)

    def shadow(self, x: float, y: float, rx: float, ry: float, strength: float) -> None:
        """Darken the ground under a thing: RGB only."""
        points = _CIRCLE * (rx, ry) + (x, y)
        mask, x0, y0 = _cover(points)
        height, width = mask.shape
        self.rgb[y0 : y0 + height, x0 : x0 + width] *= 1 - strength * (mask.astype(np.float32) * (1 / 255))[..., None]


def _cover(points: Array) -> tuple[Array, int, int]:
    """How much of each pixel a polygon covers, 0..255, inside its box; and the box's left and upper edge."""
    low = np.clip(np.floor(points.min(0)).astype(int) - 1, 0, SIZE)
    width, height = np.maximum(np.minimum(np.ceil(points.max(0)).astype(int) + 2, SIZE) - low, 0)
    mask = np.zeros((height, width), np.uint8)
    if mask.size:
        cv2.fillPoly(mask, [np.round((points - low) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return mask, *low


_ANGLES = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1)
_HALF = np.stack([np.cos(np.linspace(-np.pi / 2, np.pi / 2, 8)), np.sin(np.linspace(-np.pi / 2, np.pi / 2, 8))], -1)


@lru_cache(maxsize=16)
def noise_bank(cells: int) -> Array:
    """Periodic smooth noise, ``(512, 512)`` float32, zero mean, unit deviation; ``cells`` lumps a side of 512."""
    rng = np.random.Generator(np.random.PCG64(cells))
    lumps = np.pad(rng.standard_normal((cells, cells)).astype(np.float32), 2, mode="wrap")
    cell = 512 // cells
    smooth = cv2.resize(lumps, None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)[
        2 * cell : 2 * cell + 512, 2 * cell : 2 * cell + 512
    ]
    return (smooth - smooth.mean()) / smooth.std()


def noise(rng: np.random.Generator, cells: int, height: int = SIZE, width: int = SIZE) -> Array:
    """A window ``(height, width)`` of :func:`noise_bank` at a random place."""
    y, x = rng.integers(0, 512 - SIZE, 2)
    return noise_bank(cells)[y : y + height, x : x + width]
