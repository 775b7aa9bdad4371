"""COCO-MIG: did every instance come out where and in which colour it was asked for?

Zhou et al. 2024 (MIGC, arXiv:2402.05408) as their public evaluation does it. Detector and segmenter are handed in: what
comes in here are their boxes and masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.types import Box, Image

Range = tuple[tuple[int, int, int], tuple[int, int, int]]
COLOURS: dict[str, tuple[Range, ...]] = {
    "red": (((0, 50, 70), (9, 255, 255)), ((159, 50, 70), (180, 255, 255))),
    "blue": (((90, 50, 70), (128, 255, 255)),),
    "yellow": (((25, 50, 70), (35, 255, 255)),),
    "green": (((36, 50, 70), (89, 255, 255)),),
    "black": (((0, 0, 0), (180, 255, 30)),),
    "white": (((0, 0, 221), (180, 43, 255)),),
    "brown": (((6, 43, 35), (25, 255, 255)),),
}
"""The benchmark's ranges in OpenCV's 8-bit HSV, both ends included. Red and brown overlap."""
RANGES = {**COLOURS, "purple": (((129, 50, 70), (158, 255, 255)),)}
"""COCO-MIG's colours, and the scenes' purple between its blue and its red."""


def has_colour(image: Image, mask: np.ndarray, ranges: Sequence[Range], least: float = 0.2) -> bool:
    """Whether at least a share ``least`` of the pixels under ``mask (h, w)`` lies in a colour's ranges."""
    if not mask.any():
        return False
    hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
    inside = np.any([cv2.inRange(hsv, np.array(low), np.array(high)) > 0 for low, high in ranges], 0)
    return bool(inside[mask].mean() >= least)


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes ``(x0, y0, x1, y1)``."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0) * max(height, 0)
    either = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (first, second)) - both
    return both / either if either > 0 else 0.0


def instance_score(wanted: Box, detections: Sequence[Box], coloured: bool) -> tuple[float, float]:
    """``(success, IoU)`` of one instance.

    Success: a detection overlaps the wanted box by at least half, and the colour is right. A detection that overlaps
    by less keeps its IoU; a wrong colour makes it 0.

    Args:
        wanted: where the instance should be.
        detections: boxes in which the detector saw its kind of object.
        coloured: whether the segment in the wanted box has the wanted colour.
    """
    best = max((box_iou(wanted, box) for box in detections), default=0.0)
    if best < 0.5:
        return 0.0, best
    return (1.0, best) if coloured else (0.0, 0.0)


def success_rate(rows: Float[Tensor, "n 3"]) -> float:
    """Instance success rate of pictures whose rows are ``(sum of successes, sum of IoUs, instances)``."""
    return float(rows[:, 0].sum() / rows[:, 2].sum())


def mean_iou(rows: Float[Tensor, "n 3"]) -> float:
    """Mean IoU over all instances; the benchmark's average is over instances, not over levels."""
    return float(rows[:, 1].sum() / rows[:, 2].sum())


def picture_row(scores: Sequence[tuple[float, float]]) -> Float[Tensor, " 3"]:
    """A picture's row from its instances' scores."""
    successes, ious = zip(*scores, strict=True)
    return torch.tensor([sum(successes), sum(ious), len(scores)], dtype=torch.float64)
