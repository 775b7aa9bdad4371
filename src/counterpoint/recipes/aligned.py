"""Methods that make a ControlNet follow its control more closely: ControlNet++ (arXiv:2404.07987), Ctrl-U
(arXiv:2410.11236), InnerControl, and the probes that the last one needs.

Settings are called as in the authors' scripts; one that is left open is the InnerControl paper's for the kind of
control (table 4), so that methods differ in nothing but what they add.
"""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from counterpoint.recipes.worlds import TunedFields, World
from counterpoint.training.losses.reward import Window
from counterpoint.training.stage import Job
from counterpoint.training.stages.probe import AlignmentStage, ProbeStage, Target
from counterpoint.training.stages.reward import Reward, RewardStage

Kind = Literal["depth", "hed", "lineart", "seg"]


@plain_dataclass(frozen=True)
class Paper:
    """InnerControl's table 4, and Ctrl-U's scale of uncertainty, for a kind of control."""

    reward: float
    rewarded: int
    alignment: float
    aligned: Window
    uncertainty: float
    loss: str


PAPER = {
    "depth": Paper(0.5, 400, 1.0, (0, 920), 0.1, "map"),
    "hed": Paper(1.0, 400, 0.1, (0, 800), 0.1, "sparse"),
    "lineart": Paper(10.0, 200, 2.0, (0, 700), 0.1, "map"),
    "seg": Paper(0.5, 200, 0.05, (450, 980), 1.0, "classes"),
}
"""Kind of control -> its settings."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AlignedFields(TunedFields):
    """Settings of a tuned ControlNet; ``None`` is the paper's."""

    control_type: Kind = "depth"
    grad_scale: float | None = None
    max_timestep_rewarding: int | None = None
    u_scale: float | None = None
    aligning_alpha: float | None = None
    min_timestep_readout: int | None = None
    max_timestep_readout: int | None = None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ProbeFields:
    """A probe for one kind of control."""

    control_type: Kind = "depth"


def probe(world: World, config: Any) -> Job:
    """A probe that reads a control from the frozen denoiser's features, at every timestep."""
    torch.manual_seed(config.seed)
    kind, unet = config.control_type, world.unet(config)
    target = _target(world, kind)
    stage = ProbeStage(world.new_probe(unet, target.layers, kind), target, unet, **world.denoising(config))
    return Job(stage, world.samples(config, kind))


def controlnet_plus_plus(world: World, config: Any) -> Job:
    """The control is read back from one-step estimates of the picture, at timesteps at which those show it."""
    return Job(RewardStage(*_rewarded(world, config), **_reward(world, config)), _samples(world, config))


def ctrl_u(world: World, config: Any) -> Job:
    """... where two estimates agree: disagreement makes the reward count less, and has a price."""
    uncertainty = _or(config.u_scale, PAPER[config.control_type].uncertainty)
    stage = RewardStage(*_rewarded(world, config), uncertainty=uncertainty, **_reward(world, config))
    return Job(stage, _samples(world, config))


def innercontrol(world: World, config: Any) -> Job:
    """ControlNet++, and a probe reads the control from inner features at nearly every timestep."""
    kind, paper = config.control_type, PAPER[config.control_type]
    stage = AlignmentStage(
        world.probe(config, kind),
        _target(world, kind),
        *_rewarded(world, config),
        alignment_weight=_or(config.aligning_alpha, paper.alignment),
        alignment_window=(
            _or(config.min_timestep_readout, paper.aligned[0]),
            _or(config.max_timestep_readout, paper.aligned[1]),
        ),
        **_reward(world, config),
    )
    return Job(stage, _samples(world, config))


def _target(world: World, kind: str) -> Target:
    """Depth is read from self-attention, the others from convolutions (appendix A.1)."""
    layers = "attention" if kind == "depth" else "convolution"
    return Target(layers, world.wanted(kind), PAPER[kind].loss)  # type: ignore[arg-type]


def _rewarded(world: World, config: Any) -> tuple[Any, ...]:
    """What every stage with a reward begins with."""
    torch.manual_seed(config.seed)
    kind = config.control_type
    reader = world.reader(config, kind)
    reward = Reward(reader, world.wanted(kind), kind == "seg")
    return reward, reader, world.vae(config), world.controlnet(config, kind), kind, world.unet(config)


def _reward(world: World, config: Any) -> dict[str, Any]:
    paper = PAPER[config.control_type]
    window = (0, _or(config.max_timestep_rewarding, paper.rewarded))
    return {"weight": _or(config.grad_scale, paper.reward), "window": window, **world.denoising(config)}


def _samples(world: World, config: Any) -> Any:
    return world.samples(config, config.control_type)


def _or(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given
