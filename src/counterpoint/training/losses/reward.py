"""Rewards: the control is read from a one-step estimate of the picture and compared with the one that was given.

ControlNet++ (Li et al. 2024, arXiv:2404.07987, Eqs. 5 to 9). The estimate is decoded and read with gradients, so that
they reach the ControlNet; the reader stays frozen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Window = tuple[int, int]
"""First and last timestep, both included."""


def estimate_x0(
    x_t: Float[Tensor, "b ..."],
    prediction: Float[Tensor, "b ..."],
    level: Float[Tensor, " b"],
    prediction_type: str,
) -> Float[Tensor, "b ..."]:
    """The clean latents that a prediction implies (Eq. 7): ``(x_t - sqrt(1 - a) eps) / sqrt(a)``, or of ``v``; of a
    flow ``x_t - s v``. ``level`` is ``a``, of a flow ``s``, as in :func:`diffusion.add_noise`."""
    a = level.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.dtype)
    if prediction_type == "epsilon":
        return (x_t - (1 - a).sqrt() * prediction) / a.sqrt()
    if prediction_type == "v_prediction":
        return a.sqrt() * x_t - (1 - a).sqrt() * prediction
    if prediction_type == "flow_prediction":
        return x_t - a * prediction
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def within(t: Int[Tensor, " b"], window: Window) -> Bool[Tensor, " b"]:
    """Which samples lie in a window."""
    return (t >= window[0]) & (t <= window[1])


def masked_mean(
    losses: Float[Tensor, " b"], mask: Bool[Tensor, " b"], count: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """The mean over the samples of a mask; 0 where there is none. ``count`` is what to divide by, if several processes
    share the samples: how many a process has on average."""
    count = mask.sum() if count is None else count
    return torch.where(mask, losses, 0.0).sum() / torch.where(count > 0, count, 1)


def logged(number: Float[Tensor, ""], count: Shaped[Tensor, ""]) -> Float[Tensor, ""]:
    """A mean as the log should have it: none (NaN) where it is that of no sample."""
    return torch.where(count > 0, number.detach(), torch.nan)


def valid_mean(error: Float[Tensor, "b h w"], classes: Int[Tensor, "b h w"], ignore: int = -1) -> Float[Tensor, " b"]:
    """Of each sample the mean over places whose class counts; 0 where none does."""
    valid = classes != ignore
    return torch.where(valid, error, 0.0).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def map_error(read: Float[Tensor, "b c h w"], wanted: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Squared error at each place, the mean over channels: for depth and edges."""
    return (read - wanted).square().mean(1)


def class_error(
    logits: Float[Tensor, "b k h w"], classes: Int[Tensor, "b h w"], ignore: int = -1
) -> Float[Tensor, "b h w"]:
    """Cross-entropy at each place, 0 where the class is ``ignore``: for segmentations."""
    return F.cross_entropy(logits, classes, reduction="none", ignore_index=ignore)
