"""Whole models that work together: whether they can, and what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from torch import nn

from counterpoint.sampling.model import Model
from counterpoint.types import UserError

_SCHEDULE = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas",
             "rescale_betas_zero_snr")  # fmt: skip


def check_together(models: Sequence[Model]) -> None:
    """Models can be aggregated if a latent means the same to all of them.

    Raises:
        UserError: what differs, and what to do.
    """
    first = models[0]
    for number, other in enumerate(models[1:], 2):
        facts = (
            ("latents of other shape", first.unet.config.in_channels, other.unet.config.in_channels),
            ("another factor between pixels and latents", first.factor, other.factor),
            ("another VAE: scaling factor", first.vae.config.scaling_factor, other.vae.config.scaling_factor),
            *(
                (f"another noise schedule: {name}", first.scheduler.config.get(name), other.scheduler.config.get(name))
                for name in _SCHEDULE
            ),
        )
        for what, mine, theirs in facts:
            if mine != theirs:
                raise UserError(
                    f"models 1 and {number} cannot be aggregated, the second has {what} {theirs} where the first has "
                    f"{mine}: take models of one family"
                )
        if not isinstance(first.scheduler, DDIMScheduler):
            raise UserError(
                f"aggregation edits latents between steps, which {type(first.scheduler).__name__} would undo or "
                "misread: load the first model with scheduler='ddim'"
            )


def leave(helpers: Sequence[Model], first: Model) -> None:
    """Take what the helpers alone use out of an accelerator's memory."""
    for tensor in own_tensors(helpers, first):
        tensor.data = tensor.data.to("cpu")


def come_back(helpers: Sequence[Model], first: Model) -> None:
    """The way back."""
    for tensor in own_tensors(helpers, first):
        tensor.data = tensor.data.to(first.device)


def own_tensors(helpers: Sequence[Model], first: Model) -> list[torch.Tensor]:
    """What the helpers' networks do not share with the first model's."""
    kept = {id(tensor) for tensor in _tensors(first)}
    return [tensor for helper in helpers for tensor in _tensors(helper) if id(tensor) not in kept]


def _tensors(model: Model) -> list[torch.Tensor]:
    networks: list[nn.Module] = [model.unet, *model.controls.values()]
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
