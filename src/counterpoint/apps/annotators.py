"""Condition images that take more than one look at a photo: people's poses, and segments of everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForMaskGeneration,
    AutoModelForObjectDetection,
    AutoProcessor,
    VitPoseForPoseEstimation,
)

from counterpoint.conditions.openpose import draw_pose, from_coco
from counterpoint.conditions.plain import Extract
from counterpoint.types import Image, UserError

_SEEN = 0.3
"""Confidence from which a joint is drawn."""
_SURE = 0.5
"""Confidence from which a person is one."""
_GRID = 16
"""Points at which segments are asked for, along each side."""
_STABLE = 0.88
"""Quality, as SAM itself predicts it, below which a segment is left out."""
_SAME = 0.7
"""Overlap above which two segments are one."""


def pose_annotator(estimator: Path, detector: Path | None = None) -> Extract:
    """Poses in OpenPose's drawing, from ViTPose's seventeen keypoints.

    Args:
        estimator: transformers' folder of a ViTPose.
        detector: of an object detector that knows ``person``; without one the whole photo is one person.

    Raises:
        UserError: a folder holds no such model.
    """
    network, processor = load_model(estimator, VitPoseForPoseEstimation, AutoImageProcessor)
    find = _whole if detector is None else _people(detector)

    @torch.no_grad()
    def extract(photo: Image) -> Image:
        boxes = find(photo)
        height, width = photo.shape[:2]
        if not boxes:
            return np.zeros_like(photo)
        given = processor([photo], boxes=[boxes], return_tensors="pt")
        (people,) = processor.post_process_pose_estimation(network(**given), boxes=[boxes])
        return draw_pose([_joints(person) for person in people], height, width)

    return extract


def _joints(person: dict[str, Tensor]) -> np.ndarray:
    points = np.full((17, 2), np.nan)
    seen = person["scores"] >= _SEEN
    points[person["labels"][seen].numpy()] = person["keypoints"][seen].numpy()
    return from_coco(points)


def _whole(photo: Image) -> list[list[float]]:
    return [[0.0, 0.0, float(photo.shape[1]), float(photo.shape[0])]]


def _people(folder: Path) -> Callable[[Image], list[list[float]]]:
    """Boxes ``(x, y, width, height)`` in pixels of the people in a photo."""
    network, processor = load_model(folder, AutoModelForObjectDetection, AutoImageProcessor)
    names = {str(name).lower(): number for number, name in network.config.id2label.items()}
    if "person" not in names:
        raise UserError(f"{folder} does not know what a person is; it knows {', '.join(list(names)[:5])}, ...")

    @torch.no_grad()
    def find(photo: Image) -> list[list[float]]:
        given = processor(images=[photo], return_tensors="pt")
        found = processor.post_process_object_detection(
            network(**given), threshold=_SURE, target_sizes=[photo.shape[:2]]
        )[0]
        corners = found["boxes"][found["labels"] == names["person"]]
        return torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()

    return find


def segment_annotator(folder: Path) -> Extract:
    """Segments of everything, from SAM asked at a grid of points; small ones lie on large ones.

    Raises:
        UserError: the folder holds no such model.
    """
    network, processor = load_model(folder, AutoModelForMaskGeneration, AutoProcessor)

    @torch.no_grad()
    def extract(photo: Image) -> Image:
        height, width = photo.shape[:2]
        steps = (np.arange(_GRID) + 0.5) / _GRID
        points = [[[float(x * width), float(y * height)]] for y in steps for x in steps]
        given = processor(images=[photo], input_points=[points], return_tensors="pt")
        made = network(**given, multimask_output=True)
        scores = made.iou_scores.flatten()
        sure = scores >= _STABLE
        small = made.pred_masks[0].flatten(0, 1)[sure]
        kept = small[distinct(small > 0, scores[sure])]  # few are left to be brought to the photo's size, one at a time
        shapes = [
            processor.post_process_masks(one[None, None, None], given["original_sizes"], given["reshaped_input_sizes"])
            for one in kept
        ]
        masks = [shape[0].reshape(height, width).bool() for shape in shapes]
        return paint(torch.stack(masks) if masks else sure.new_zeros(0, height, width), height, width)

    return extract


def distinct(masks: Tensor, scores: Tensor) -> list[int]:
    """Of masks ``(n, h, w)`` that overlap by more than :data:`_SAME`, the places of the best; not of empty ones."""
    order = [place for place in scores.argsort(descending=True).tolist() if masks[place].any()]
    flat = masks[order].flatten(1).float()
    area = flat.sum(1)
    both = flat @ flat.T
    overlap = both / (area[:, None] + area - both).clamp(min=1)
    kept: list[int] = []
    for number in range(len(flat)):
        if not kept or overlap[number, kept].max() <= _SAME:
            kept.append(number)
    return [order[number] for number in kept]


def paint(masks: Tensor, height: int, width: int) -> Image:
    """Masks ``(n, h, w)`` in colours that are far apart, large ones first; black where none is."""
    picture = np.zeros((height, width, 3), np.uint8)
    order = masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist()
    for place, number in enumerate(order):
        hue = np.array([0.0, 1 / 3, 2 / 3]) + 0.618034 * place  # the golden ratio never comes near where it was
        picture[masks[number].numpy()] = np.rint(127.5 + 100 * np.cos(2 * np.pi * hue)).astype(np.uint8)
    return picture


def load_model(folder: Path, kind: Any, processing: Any) -> tuple[Any, Any]:
    """A transformers model and what prepares its input, from a local folder.

    Raises:
        UserError: the folder holds no such model.
    """
    try:
        network, found = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        processor = processing.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no model for {kind.__name__}: {str(error).splitlines()[0]}") from None
    if found["missing_keys"]:
        raise UserError(f"{folder} is another model than {kind.__name__}: it lacks {sorted(found['missing_keys'])[0]}")
    return network.eval(), processor
