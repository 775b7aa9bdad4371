"""Whole models that work together: whether they can, and what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler

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
    if any(model.residency for model in models):
        raise UserError("models with a residency cannot be aggregated, their networks come and go: load them with all")
    for number, other in enumerate(models[1:], 2):
        for what, fix, mine, theirs in _facts(first, other):
            if mine != theirs:
                raise UserError(
                    f"models 1 and {number} cannot be aggregated, the second has {what} {theirs} where the first has "
                    f"{mine}: {fix}"
                )
        if not _same_latents(first, other):
            raise UserError(
                f"models 1 and {number} cannot be aggregated, the encoders of their VAEs have other weights, so that "
                f"a latent means something else to each: {_FAMILY} (decoders may differ)"
            )
        if not isinstance(first.scheduler, DDIMScheduler):
            raise UserError(
                f"aggregation edits latents between steps, which {type(first.scheduler).__name__} would undo or "
                "misread: load the first model with ddim (scheduler='ddim', --scheduler ddim)"
            )


_FAMILY = "take models of one family"


def _facts(first: Model, other: Model) -> list[tuple[str, str, Any, Any]]:
    """What must be the same: what it is, what to do where it is not, and both models' own."""
    return [
        ("another device:", "move both with .to()", str(first.device), str(other.device)),
        ("another dtype:", "load both with the same", first.unet.dtype, other.unet.dtype),
        ("latents of other shape", _FAMILY, first.unet.config.in_channels, other.unet.config.in_channels),
        ("another factor between pixels and latents", _FAMILY, first.factor, other.factor),
        (
            "another VAE: scaling factor",
            _FAMILY,
            first.vae.config.scaling_factor,
            other.vae.config.scaling_factor,
        ),
        *(
            (f"another noise schedule: {name}", _FAMILY, _setting(first, name), _setting(other, name))
            for name in _SCHEDULE
        ),
    ]


def _setting(model: Model, name: str) -> Any:
    """Of a scheduler; one that lacks a setting has it off."""
    return model.scheduler.config.get(name) or None


def _same_latents(first: Model, other: Model) -> bool:
    """Whether both VAEs encode alike, bit for bit."""
    mine, theirs = (
        {name: value for name, value in one.vae.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
        for one in (first, other)
    )
    return mine.keys() == theirs.keys() and all(
        value.data_ptr() == theirs[name].data_ptr() or torch.equal(value, theirs[name]) for name, value in mine.items()
    )


def leave(helpers: Sequence[Model], first: Model) -> None:
    """Take what the helpers alone use out of an accelerator's memory."""
    _move(helpers, first, away=True)


def come_back(helpers: Sequence[Model], first: Model) -> None:
    """The way back."""
    _move(helpers, first, away=False)


def _move(helpers: Sequence[Model], first: Model, *, away: bool) -> None:
    home = first.device  # asked once: a UNet looks through all of its modules for it
    if home.type == "cpu":  # there is nowhere to go, and to look for what could would take as long as a step
        return
    for tensor in own_tensors(helpers, first):
        tensor.data = tensor.data.to("cpu" if away else home)


def own_tensors(helpers: Sequence[Model], first: Model) -> list[torch.Tensor]:
    """What the helpers' networks do not share with the first model's."""
    kept = {id(tensor) for tensor in _tensors(first)}
    return [tensor for helper in helpers for tensor in _tensors(helper) if id(tensor) not in kept]


def _tensors(model: Model) -> list[torch.Tensor]:
    return [tensor for network in model.networks for tensor in (*network.parameters(), *network.buffers())]
