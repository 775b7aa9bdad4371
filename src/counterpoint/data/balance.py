"""Silent-signal balancing (Minimal Impact ControlNet, ICLR 2025, section 4.1 and appendix F.1).

Edges and poses are black wherever nothing is drawn, so a ControlNet learns that black means an even surface. Here a
control is kept in some segments of its picture only, and the picture stays whole: black then has texture under it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch

from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.types import CONTROL_KINDS, Image, Samples, UserError, meaning

_SIDE = 256
"""Shorter side at which a photo is segmented."""
_FLAT = 40
"""Soft edges below this lie inside a segment, 0..255."""
_DEEP = 1 / 25
"""How far from any edge a segment's core lies, as a share of the shorter side."""


def keep_some(segments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where a control may speak: in a random subset of segments, any number of them from one to all.

    Args:
        segments: the number of its segment at each place, ``(h, w)`` integers; any numbers will do.
        rng: decides.

    Returns:
        ``(h, w)`` bool.
    """
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    names = np.unique(segments[begins])  # a look at every pixel would cost more than the edges themselves
    kept = np.zeros(len(names), bool)
    kept[rng.choice(len(names), rng.integers(1, len(names) + 1), replace=False)] = True
    return kept[np.searchsorted(names, segments)]


def check_can_be_silent(kind: str, asked: str) -> None:
    """Hold a kind of control against a wish to balance it, ``asked`` by this setting.

    Raises:
        UserError: it cannot be silent.
    """
    if meaning(kind).silent is None:
        raise UserError(f"{asked}: {kind} has no silent value, every colour of it means something")


def silence(control: Image, where: np.ndarray, kind: str) -> Image:
    """A condition image with its kind's silent value outside ``where (h, w)``.

    Raises:
        ValueError: the kind has no silent value.
    """
    silent = CONTROL_KINDS[kind].silent
    if silent is None:
        raise ValueError(f"{kind} has no silent value: every colour of it means something")
    return np.where(where[..., None], control, np.uint8(silent))


class Balanced:
    """Samples whose control is silent outside a random subset of each one's segments, which is drawn once.

    Args:
        samples: with the fields ``control:KIND``, ``(b, h, w, 3)`` uint8, and ``segments``, ``(b, h, w)``.
        kind: of the control.
        seed: of what is drawn.
    """

    def __init__(self, samples: Samples, kind: str, seed: int) -> None:
        self.samples, self.kind, self.seed = samples, kind, seed

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The same samples, silenced."""
        batch, field = self.samples.batch(indices), f"control:{self.kind}"
        silenced = [
            silence(control.numpy(), keep_some(where.numpy(), np.random.default_rng((self.seed, index))), self.kind)
            for control, where, index in zip(batch[field], batch["segments"], indices, strict=True)
        ]
        return {**batch, field: torch.from_numpy(np.stack(silenced))}


def segment(photo: Image) -> np.ndarray:
    """Segments of a photo without a network: what flows together from cores that are far from any edge.

    A watershed (Meyer 1992). Numbers count from 1.
    """
    height, width = photo.shape[:2]
    scale = min(1.0, _SIDE / min(height, width))
    small = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else photo
    edges = soft_edge(cv2.medianBlur(small, 7))
    depth = cv2.distanceTransform((edges[..., 0] < _FLAT).astype(np.uint8), cv2.DIST_L2, 3)
    deep = min(_DEEP * min(small.shape[:2]), 0.5 * float(depth.max()))
    _, cores = cv2.connectedComponents((depth > deep).astype(np.uint8))
    if cores.max() == 0:
        return np.ones((height, width), np.int32)
    flooded = cv2.watershed(np.ascontiguousarray(edges), cores)
    if (flooded < 1).all():  # a picture so small that all of it is frame
        return np.ones((height, width), np.int32)
    while (flooded < 1).any():  # the lines between basins, and the frame
        grown = cv2.dilate(np.maximum(flooded, 0).astype(np.float32), np.ones((3, 3), np.uint8)).astype(np.int32)
        flooded = np.where(flooded < 1, grown, flooded)
    return cv2.resize(flooded, (width, height), interpolation=cv2.INTER_NEAREST)
