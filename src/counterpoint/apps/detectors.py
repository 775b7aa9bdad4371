"""What finds named things in pictures: a judge's class map, or GroundingDINO and SAM as COCO-MIG has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForMaskGeneration, AutoModelForZeroShotObjectDetection, AutoProcessor

from counterpoint.apps.annotators import load_model
from counterpoint.evaluation.suite import Detect, Names, Segment, unstack
from counterpoint.metrics.coco_mig import box_iou
from counterpoint.types import Box

_THRESHOLD, _OVERLAP = 0.25, 0.8
_LEAST = 0.002
"""Share of a picture below which a patch of one class is no thing."""


def by_classes(classes: Callable[[Tensor], Tensor], index: Mapping[str, int]) -> tuple[Detect, Segment]:
    """A detector and a segmenter from what tells classes ``(b, h, w)`` apart; ``index`` holds a name's class."""

    def detect(pictures: Tensor, names: Names) -> list[list[list[Box]]]:
        return [
            [_patches(seg == index[name]) for name in several]
            for seg, several in zip(classes(pictures).numpy(), names, strict=True)
        ]

    def segment(pictures: Tensor, names: Names, boxes: Sequence[Sequence[Box]]) -> list[list[np.ndarray]]:
        return [
            [_within(seg == index[name], box) for name, box in zip(several, places, strict=True)]
            for seg, several, places in zip(classes(pictures).numpy(), names, boxes, strict=True)
        ]

    return detect, segment


def _patches(mask: np.ndarray) -> list[Box]:
    """Boxes of a mask's connected parts."""
    height, width = mask.shape
    _, _, found, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return [
        (x / width, y / height, (x + w) / width, (y + h) / height)
        for x, y, w, h, area in found[1:].tolist()
        if area >= _LEAST * mask.size
    ]


def _within(mask: np.ndarray, box: Box) -> np.ndarray:
    height, width = mask.shape
    x0, y0, x1, y1 = (round(end * side) for end, side in zip(box, (width, height) * 2, strict=True))
    kept = np.zeros_like(mask)
    kept[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
    return kept


def load_detector(folder: Path, device: torch.device) -> Detect:
    """GroundingDINO from transformers' folder, at the benchmark's thresholds.

    Raises:
        UserError: the folder holds no such model.
    """
    network, processor = load_model(folder, AutoModelForZeroShotObjectDetection, AutoProcessor)
    network.to(device)

    @torch.no_grad()
    def detect(pictures: Tensor, names: Names) -> list[list[list[Box]]]:
        return [[boxes(image, name) for name in several] for image, several in zip(pictures, names, strict=True)]

    def boxes(image: Tensor, name: str) -> list[Box]:
        given = processor(images=unstack(image[None]), text=f"{name.lower()}.", return_tensors="pt").to(device)
        found = processor.post_process_grounded_object_detection(
            network(**given), given["input_ids"], threshold=_THRESHOLD, text_threshold=_THRESHOLD
        )[0]
        places = [tuple(box) for box in found["boxes"].tolist()]
        kept = [found["boxes"][one] for one in _distinct(places, found["scores"].tolist())]
        return [tuple(box.clamp(0, 1).tolist()) for box in kept]

    return detect


def _distinct(boxes: Sequence[Box], scores: Sequence[float]) -> list[int]:
    """Greedy non-maximum suppression: the numbers of boxes that no better one overlaps by more than the benchmark's
    threshold, best first."""
    kept: list[int] = []
    for one in sorted(range(len(boxes)), key=lambda one: -scores[one]):
        if all(box_iou(boxes[one], boxes[other]) <= _OVERLAP for other in kept):
            kept.append(one)
    return kept


def load_mask_generator(folder: Path, device: torch.device) -> Segment:
    """SAM from transformers' folder: of the masks that it offers for a box, the one it thinks best.

    Raises:
        UserError: the folder holds no such model.
    """
    network, processor = load_model(folder, AutoModelForMaskGeneration, AutoProcessor)
    network.to(device)

    @torch.no_grad()
    def segment(pictures: Tensor, names: Names, boxes: Sequence[Sequence[Box]]) -> list[list[np.ndarray]]:
        del names
        sides = torch.tensor(pictures.shape[2:]).flip(0).repeat(2)
        return [
            masks(image, torch.tensor(several, dtype=torch.float64) * sides)
            for image, several in zip(pictures, boxes, strict=True)
        ]

    def masks(image: Tensor, boxes: Tensor) -> list[np.ndarray]:
        given = processor(images=unstack(image[None]), input_boxes=[boxes.tolist()], return_tensors="pt").to(device)
        made = network(**given, multimask_output=True)
        shapes = processor.post_process_masks(
            made.pred_masks.cpu(), given["original_sizes"].cpu(), given["reshaped_input_sizes"].cpu()
        )[0]
        best = made.iou_scores[0].argmax(-1).tolist()
        return [several[one].numpy() for several, one in zip(shapes, best, strict=True)]

    return segment
