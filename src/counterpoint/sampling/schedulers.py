"""Schedulers by name."""

from __future__ import annotations

import diffusers
from diffusers import SchedulerMixin

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


def make_scheduler(name: str, config: dict[str, object]) -> SchedulerMixin:
    """A scheduler of a name, with the noise schedule of another's ``config``.

    Raises:
        UserError: diffusers has none of that name, or this machine lacks what it needs.
    """
    kind = getattr(diffusers, SCHEDULERS.get(name.lower(), name), None)
    if kind is None or not ((isinstance(kind, type) and name.lower() in SCHEDULERS) or name.endswith("Scheduler")):
        raise UserError(
            f"unknown scheduler {name!r}; there are {', '.join(SCHEDULERS)}, and every diffusers class such as "
            "UniPCMultistepScheduler"
        )
    try:
        return kind.from_config(config)
    except ImportError as error:
        raise UserError(
            f"scheduler {name!r} needs a package that is not installed: {str(error).strip().splitlines()[0]}"
        ) from None
