"""Training a judge: a network that reads segmentation, depth, pose and soft edges from a picture."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.models.perception import PerceptionModel, heat_of
from counterpoint.training.order import Draws
from counterpoint.training.stage import Stage
from counterpoint.training.stages.codec import pictures
from counterpoint.types import Batch, UserError


class JudgeStage(Stage):
    """Supervised reading, hardened against a generator's faults: blur, noise, tint and contrast.

    Learns classes from ``segments`` of a batch, and depth, soft edges and joints where a batch has ``depth``,
    ``control:hed`` or ``keypoints``.
    """

    trained = ("judge",)

    def __init__(self, judge: PerceptionModel) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        reading = self.judge(_spoil(pictures(batch["image"]), draws))
        classes = batch["segments"].long()
        if (highest := int(classes.max())) >= reading.seg.shape[1]:
            raise UserError(f"a picture has segment {highest}; num_labels={reading.seg.shape[1]} counts from 0")
        parts = {"seg": F.cross_entropy(reading.seg.float(), classes)}
        if "depth" in batch:
            miss = reading.depth.float()[:, 0] - batch["depth"].float() / 255
            # the square for what is measured later: RMSE
            parts["depth"] = 4 * (miss.abs().mean() + 30 * miss.square().mean())
        if "control:hed" in batch:
            parts["edge"] = 4 * F.mse_loss(reading.edge.float()[:, 0], batch["control:hed"][..., 0].float() / 255)
        if "keypoints" in batch:
            heat = heat_of(batch["keypoints"], classes.shape[-1])
            parts["joints"] = 4 * F.binary_cross_entropy_with_logits(reading.joints.float(), heat)
        right = (reading.seg.argmax(1) == classes).float().mean()
        return torch.stack(list(parts.values())).sum(), {**parts, "accuracy": right}

    def export(self, folder: Path) -> None:
        self.judge.save_pretrained(folder)


def _spoil(picture: Tensor, draws: Draws) -> Tensor:
    """Each sample its own strength of each fault."""
    kind = draws.uniform(6)[..., None, None, None]
    small = F.interpolate(F.avg_pool2d(picture, 2), scale_factor=2, mode="bilinear")
    picture = torch.lerp(picture, small, (kind[:, 0] - 0.5).clamp(min=0) * 2)
    picture = picture * (0.85 + 0.3 * kind[:, 1]) + 0.15 * (kind[:, 2] - 0.5)
    tint = 0.1 * (draws.uniform(3) - 0.5)[..., None, None]
    return picture + tint + 0.12 * (kind[:, 3] - 0.4).clamp(min=0) * draws.normal(*picture.shape[1:])
