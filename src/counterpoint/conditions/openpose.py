"""OpenPose's drawing of a body: eighteen joints, seventeen limbs, each in its own colour on black."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from counterpoint.types import Image

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
"""Pairs of joints in the order in which they are drawn (COCO-18 numbering: 0 nose, 1 neck, 2..4 right arm, ...)."""

JOINT_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255),
    (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
"""Colour of each joint; limb number i takes colour i at 60 % brightness."""

_COCO_JOINTS = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)


def from_coco(points: np.ndarray) -> np.ndarray:
    """COCO's 17 keypoints ``(17, 2)`` as OpenPose's eighteen joints: the neck lies between the shoulders."""
    return np.stack([points[5:7].mean(0) if one is None else points[one] for one in _COCO_JOINTS])


def draw_pose(people: Iterable[np.ndarray], height: int, width: int) -> Image:
    """Draw people as OpenPose does.

    Args:
        people: one ``(18, 2)`` array of xy in pixels a person, ``nan`` where a joint is not seen.
        height: of the picture, in pixels.
        width: likewise.

    Limbs are 8 pixels thick at 512 pixels and scale with the shorter side, but are never thinner than 2.4.
    """
    picture = np.zeros((height, width, 3), np.uint8)
    radius = max(1.2, 4 * min(height, width) / 512)
    for joints in people:
        for number, (a, b) in enumerate(LIMBS):
            if not np.isnan(joints[[a, b]]).any():
                colour = [int(0.6 * c) for c in JOINT_COLOURS[number]]
                middle, half = (joints[a] + joints[b]) / 2, np.linalg.norm(joints[a] - joints[b]) / 2
                angle = float(np.degrees(np.arctan2(*(joints[a] - joints[b])[::-1])))
                limb = cv2.ellipse2Poly(
                    tuple(round(v * 16) for v in middle),
                    (int(half * 16), int(radius * 16)),
                    int(angle),
                    0,
                    360,
                    10,
                )
                cv2.fillPoly(picture, [limb], colour, cv2.LINE_AA, 4)
        for joint, colour in zip(joints, JOINT_COLOURS, strict=True):
            if not np.isnan(joint).any():
                centre = tuple(round(v * 16) for v in joint)
                cv2.circle(picture, centre, int(radius * 16), colour, cv2.FILLED, cv2.LINE_AA, 4)
    return picture
