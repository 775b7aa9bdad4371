"""Alignment: the control is read from the denoiser's inner features, at every timestep.

InnerControl (2025, sections 4.2 and 5.1). The probe that reads is frozen; the sparse loss is Readout Guidance's (Luo et
al. 2024, arXiv:2312.02150), here for each sample by itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.training.losses.reward import class_error, valid_mean


def mse(read: Float[Tensor, "b c h w"], wanted: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean squared error of each sample."""
    return (read - wanted).square().flatten(1).mean(1)


def cross_entropy(logits: Float[Tensor, "b k h w"], classes: Int[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Mean cross-entropy of each sample, over places whose class is not -1."""
    return valid_mean(class_error(logits, classes), classes)


def sparse_mse(read: Float[Tensor, "b c h w"], wanted: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Half the mean squared error where the target is at its range's minimum, 0, half that everywhere else.

    Edges and poses are mostly black: without this, black would be nearly all that counts. A sample that is black
    everywhere, or nowhere, has the plain mean.
    """
    error, low = (read - wanted).square().flatten(1), wanted.flatten(1) <= 0

    def mean(mask: Tensor) -> Tensor:
        return torch.where(mask, error, 0.0).sum(1) / mask.sum(1).clamp(min=1)

    return torch.where(low.all(1) | ~low.any(1), error.mean(1), (mean(low) + mean(~low)) / 2)
