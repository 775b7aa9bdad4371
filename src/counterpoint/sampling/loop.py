"""The one sampling loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from counterpoint.sampling.schedulers import moments
from counterpoint.types import Denoiser, Latents, Moment

Settle = Callable[[Latents, Moment], Latents]
"""``(latents after a step, that step) -> latents``: what inpainting or a callback puts in their place."""


@dataclass(frozen=True)
class Step:
    """What listeners hear after every step."""

    moment: Moment
    latents: Latents


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: SchedulerMixin,
    latents: Latents,
    timesteps: Tensor,
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    settle: Settle | None = None,
) -> Iterator[Step]:
    """Denoise ``latents`` over ``timesteps``, one event a step; the last event holds the result.

    Args:
        denoise: predicts the noise, guidance included.
        scheduler: with its timesteps set.
        latents: the noise to start from, already at the scheduler's scale.
        timesteps: those still to go.
        generator: for schedulers that add noise; one a sample, or one for all.
        settle: changes the latents after every step.
    """
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for moment in moments(scheduler, timesteps):
        prediction = denoise(scheduler.scale_model_input(latents, moment.timestep), moment)
        latents = scheduler.step(prediction, moment.timestep, latents, **extra, return_dict=False)[0]
        if settle is not None:
            latents = settle(latents, moment)
        yield Step(moment, latents)
