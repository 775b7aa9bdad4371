"""The condition images of a scene: real extractors where they exist, exact annotations otherwise."""

from __future__ import annotations

import numpy as np

from counterpoint.conditions.canny import canny
from counterpoint.conditions.lines import lines
from counterpoint.conditions.openpose import draw_pose
from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.data.scenes.render import Scene
from counterpoint.data.scenes.vocabulary import SEG_CLASSES, SIZE
from counterpoint.types import Image

SEG_PALETTE = np.array(list(SEG_CLASSES.values()), np.uint8)


def seg_map(seg: np.ndarray) -> Image:
    """Class indices -> the palette's colours."""
    return SEG_PALETTE[seg]


def depth_map(depth: np.ndarray) -> Image:
    """Disparity in 0..1 -> grey, near is bright."""
    return np.repeat(np.rint(depth * 255).astype(np.uint8)[..., None], 3, -1)


def control_map(scene: Scene, kind: str) -> Image:
    """The scene's condition image of a kind in ``canny``, ``hed``, ``lineart``, ``pose``, ``depth``, ``seg``."""
    return {
        "canny": lambda: canny(scene.image),
        "hed": lambda: soft_edge(scene.image),
        "lineart": lambda: lines(scene.image),
        "pose": lambda: draw_pose(scene.keypoints, SIZE, SIZE),
        "depth": lambda: depth_map(scene.depth),
        "seg": lambda: seg_map(scene.seg),
    }[kind]()
