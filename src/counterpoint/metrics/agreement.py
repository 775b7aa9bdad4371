"""How well a control that was read back from a picture agrees with the one that was asked for, in 0..1 (ours).

One number a kind, for a user who looks at one picture; the suites use the papers' measures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.metrics.similarity import ssim

Maps = Float[Tensor, "b 3 h w"]
REACH = 1 / 32
"""How far apart two limbs may lie and still meet, as a share of the picture's shorter side."""


def agreement(kind: str, read: Maps, wanted: Maps) -> Float[Tensor, " b"]:
    """Agreement of condition images in 0..1.

    Segmentation: the share of pixels of the same colour. Depth, normals and tiles: 1 minus the root mean squared error.
    Pose: the Dice overlap of the drawn limbs, each widened by :data:`REACH`. Edges of any sort: structural similarity,
    at least 0.
    """
    if kind == "seg":
        return ((read - wanted).abs().amax(1) < 1 / 255).float().flatten(1).mean(1)
    if kind in {"depth", "normal", "tile"}:
        return 1 - (read - wanted).square().flatten(1).mean(1).sqrt()
    if kind == "pose":
        radius = max(1, round(REACH * min(read.shape[2:])))
        first, second = (
            F.max_pool2d((maps.amax(1, keepdim=True) > 0.05).float(), 2 * radius + 1, 1, radius).flatten(1)
            for maps in (read, wanted)
        )
        total = first.sum(1) + second.sum(1)
        return torch.where(total > 0, 2 * (first * second).sum(1) / total.clamp(min=1), 1.0)
    return ssim(read[:, :1], wanted[:, :1]).clamp(min=0).float()
