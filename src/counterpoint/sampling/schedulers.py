"""Schedulers by name."""

from __future__ import annotations

import math
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from torch import Tensor

from counterpoint.types import UserError

SCHEDULERS = {
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-sde": "DPMSolverSDEScheduler",
    "deis": "DEISMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
}
"""Short name -> diffusers class. Any other scheduler is given by its class name."""


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """The diffusers class of a name.

    Raises:
        UserError: diffusers has none of that name.
    """
    kind: Any = getattr(diffusers, SCHEDULERS.get(name.lower(), name), None)
    if kind is None or not ((isinstance(kind, type) and name.lower() in SCHEDULERS) or name.endswith("Scheduler")):
        raise UserError(
            f"unknown scheduler {name!r}; there are {', '.join(SCHEDULERS)}, and every diffusers class such as "
            "UniPCMultistepScheduler"
        )
    return kind  # type: ignore[no-any-return]


def make_scheduler(name: str, config: dict[str, object]) -> SchedulerMixin:
    """A scheduler of a name, with the noise schedule of another's ``config``.

    Raises:
        UserError: diffusers has none of that name, or this machine lacks what it needs.
    """
    kind = find_scheduler(name)
    try:
        return kind.from_config(config)
    except ImportError as error:
        raise UserError(
            f"scheduler {name!r} needs a package that is not installed: {str(error).strip().splitlines()[0]}"
        ) from None


def noise_level(scheduler: SchedulerMixin, timestep: Tensor) -> float:
    """``sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)`` at a timestep; of flow matching, ``s / (1 - s)`` of its share
    of noise ``s``: in both, noise for each part of signal."""
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None:
        share = float(timestep) / scheduler.config.num_train_timesteps
        return share / (1 - share) if share < 1 else math.inf
    product = float(products[min(round(float(timestep)), len(products) - 1)])
    return math.sqrt((1 - product) / product) if product > 0 else math.inf
