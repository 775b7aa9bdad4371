"""Schedulers by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor

from counterpoint.types import Moment, UserError

SCHEDULERS = {
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
}
"""Short name -> diffusers class. Any other scheduler is given by its class name."""
_OTHERS = {one.name for one in KarrasDiffusionSchedulers} | {"TCDScheduler", "SASolverScheduler"}
_REFUSED = {
    "DPMSolverSDEScheduler": "its noise follows no generator, so pictures would depend on their neighbours; take "
    "dpm++:algorithm_type=sde-dpmsolver++",
    "EDMEulerScheduler": "it is for models with preconditioning of their own",
}
_TRAINED = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "sigma_min", "sigma_max", "sigma_data", "flow_shift",
}  # fmt: skip
_MOST = 1000
_MEANS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def find_scheduler(name: str) -> tuple[type[SchedulerMixin], dict[str, Any]]:
    """The diffusers class and settings of a name such as ``ddim`` or ``dpm++:use_karras_sigmas=true``.

    Raises:
        UserError: diffusers has none of that name for models that predict noise, or the class has no such setting.
    """
    base, _, text = name.partition(":")
    called = SCHEDULERS.get(base.lower(), base)
    if called in _REFUSED:
        raise UserError(f"the scheduler {base} cannot be used: {_REFUSED[called]}")
    if called not in {*SCHEDULERS.values(), *_OTHERS}:
        others = sorted(_OTHERS - {*SCHEDULERS.values(), *_REFUSED})
        raise UserError(f"unknown scheduler {base!r}; there are {', '.join([*SCHEDULERS, *others])}")
    kind = getattr(diffusers, called)
    return kind, dict(_setting(base, kind, part) for part in text.split(",") if text)


def make_scheduler(name: str, config: Mapping[str, object]) -> SchedulerMixin:
    """A scheduler of a name, with the noise schedule of another's ``config``.

    Raises:
        UserError: diffusers has none of that name, or no such setting or value.
    """
    kind, settings = find_scheduler(name)
    try:
        scheduler = kind.from_config(config, **settings)
        if settings:  # some values are looked at only here
            scheduler.set_timesteps(2)
            scheduler = kind.from_config(config, **settings)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise UserError(f"the scheduler {name}: {str(error).strip().splitlines()[0]}") from None
    return scheduler


def set_steps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Set a scheduler's steps.

    Raises:
        UserError: it cannot make so many, or so few.
    """
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        name = type(scheduler).__name__
        raise UserError(f"{name} cannot sample in {steps} steps ({error}): take others, or another scheduler") from None


def _setting(base: str, kind: type[SchedulerMixin], text: str) -> tuple[str, Any]:
    """``use_karras_sigmas=true``; what belongs to the model's training is not the sampler's to change."""
    key, _, word = text.strip().partition("=")
    known = {
        name: one.default
        for name, one in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and name not in _TRAINED
    }
    if key not in known:
        raise UserError(f"the scheduler {base} has no setting {key!r}; it has {', '.join(known)}")
    value, like = _value(word), type(known[key])
    if type(value) is not like and not (like is float and type(value) is int) and like in _MEANS:
        raise UserError(f"the setting {key} of {base} is {_MEANS[like]}, got {word!r}")
    if isinstance(value, int | float) and not abs(value) <= _MOST:
        raise UserError(f"the setting {key} of {base} is at most {_MOST}, got {word}")
    return key, value


def _value(word: str) -> bool | int | float | str:
    if word.lower() in {"true", "false"}:
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def noise_level(scheduler: SchedulerMixin, timestep: float) -> float:
    """``sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)`` at a timestep; of flow matching, ``s / (1 - s)`` of its share
    of noise ``s``: in both, noise for each part of signal."""
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None:
        share = timestep / scheduler.config.num_train_timesteps
        return share / (1 - share) if share < 1 else math.inf
    product = float(products[min(round(timestep), len(products) - 1)])
    return math.sqrt((1 - product) / product) if product > 0 else math.inf


def moments(scheduler: SchedulerMixin, timesteps: Tensor) -> list[Moment]:
    """Every step of a run. Made before the first, because on an accelerator a number is waited for."""
    return [
        Moment(index, len(timesteps), timestep, noise_level(scheduler, time), float(time))
        for index, (timestep, time) in enumerate(zip(timesteps, timesteps.tolist(), strict=True))
    ]
