"""Learned perceptual distance, for a backbone that is handed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def lpips(
    features: Sequence[Float[Tensor, "b _ _ _"]],
    references: Sequence[Float[Tensor, "b _ _ _"]],
    weights: Sequence[Float[Tensor, " _"]],
) -> Float[Tensor, " b"]:
    """Weighted squared distance of unit-normalised features, averaged over places and summed over layers.

    Zhang et al. 2018 (arXiv:1801.03924, Eq. 1). 0 is identical.

    Args:
        features: of the pictures, one map a layer.
        references: of what they are compared with.
        weights: one non-negative number a channel, for each layer.
    """
    layers = []
    for one, other, weight in zip(features, references, weights, strict=True):
        gap = (F.normalize(one, dim=1, eps=1e-10) - F.normalize(other, dim=1, eps=1e-10)).square()
        layers.append((gap * weight[:, None, None]).sum(1).flatten(1).mean(1).double())
    return torch.stack(layers).sum(0)
