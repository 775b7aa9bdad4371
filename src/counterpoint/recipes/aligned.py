"""Methods that make a ControlNet follow its control more closely: ControlNet++ (arXiv:2404.07987), Ctrl-U
(arXiv:2410.11236), InnerControl, and the probes that the last one needs.

Settings are called as in the authors' scripts; one that is left open is the InnerControl paper's for the kind of
control (table 4), so that methods differ in nothing but what they add.
"""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from counterpoint.control.features import Layers, read_by
from counterpoint.models.probe import check_reads, span_of
from counterpoint.models.trained_for import remember_kind
from counterpoint.recipes.worlds import TunedFields, World
from counterpoint.training.config import check_window, filled
from counterpoint.training.losses.reward import Window
from counterpoint.training.stage import Job
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.stages.probe import AlignmentStage, ProbeStage, Target
from counterpoint.training.stages.reward import Reward, RewardStage

Kind = Literal["depth", "hed", "lineart", "seg", "canny", "pose"]
EDGES = ("hed", "lineart", "canny")
LOSSES = {
    "depth": "map",
    "hed": "sparse",
    "lineart": "map",
    "seg": "classes",
    "canny": "sparse",
    "pose": "sparse",
}
"""Kind of control -> how a probe's reading of it is compared (table 4; canny and pose as Readout Guidance has them)."""
TAUGHT = {**LOSSES, "hed": "map"}
"""... while the probe itself is trained (appendix A.1)."""


@plain_dataclass(frozen=True)
class Paper:
    """InnerControl's table 4, and Ctrl-U's scale of uncertainty, for a kind of control."""

    reward: float
    rewarded: int
    alignment: float
    aligned: Window
    uncertainty: float


PAPER = {
    "canny": Paper(1.0, 200, 0.1, (0, 800), 0.1),
    "depth": Paper(0.5, 400, 1.0, (0, 920), 0.1),
    "hed": Paper(1.0, 400, 0.1, (0, 800), 0.1),
    "lineart": Paper(10.0, 200, 2.0, (0, 700), 0.1),
    "seg": Paper(0.5, 200, 0.05, (450, 980), 1.0),
    "pose": Paper(20.0, 400, 0.1, (0, 800), 0.1),
}
"""Kind of control -> its settings. Canny and pose are not in that table. Canny's reward is ControlNet++'s, its
alignment that of the other sparse lines; of poses nobody published a reward."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PlainFields(TunedFields):
    """A ControlNet that goes on with the diffusion loss alone: what the others are compared with."""

    control_type: Kind = "depth"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AlignedFields(TunedFields):
    """Settings of a tuned ControlNet; ``None`` is the paper's. ``reward_ramp_steps`` is Ctrl-U's (5000 in its code for
    depth and seg). ``probe_model_name_or_path`` is the folder of a probe or a published readout head;
    ``reversed_timestep_readout`` tells it timesteps as those had them."""

    control_type: Kind = "depth"
    probe_model_name_or_path: Path | None = None
    grad_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    max_timestep_rewarding: int | None = Field(None, ge=0, le=999)
    reward_ramp_steps: int = Field(0, ge=0)
    u_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    aligning_alpha: float | None = Field(None, ge=0, allow_inf_nan=False)
    min_timestep_readout: int | None = Field(None, ge=0, le=999)
    max_timestep_readout: int | None = Field(None, ge=0, le=999)
    reversed_timestep_readout: bool = False

    def resolved(self) -> Any:
        """With the paper's settings for the kind of control."""
        paper = PAPER[self.control_type]
        found = filled(
            super().resolved(),  # type: ignore[misc]
            grad_scale=paper.reward,
            max_timestep_rewarding=paper.rewarded,
            u_scale=paper.uncertainty,
            aligning_alpha=paper.alignment,
            min_timestep_readout=paper.aligned[0],
            max_timestep_readout=paper.aligned[1],
        )
        check_window("timestep_readout", found.min_timestep_readout, found.max_timestep_readout)
        return found


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ProbeFields:
    """A probe for one kind of control; steps that are left open are the paper's, 10000 for edges and else 5000."""

    control_type: Kind = "depth"
    max_train_steps: int | None = Field(None, gt=0)

    def resolved(self) -> Any:
        """With the paper's steps for the kind of control."""
        return filled(super().resolved(), max_train_steps=10000 if self.control_type in EDGES else 5000)


def probe(world: World, config: Any) -> Job:
    """A probe that reads a control from the frozen denoiser's features, at every timestep."""
    torch.manual_seed(config.seed)
    kind, unet = config.control_type, world.unet(config)
    target = Target(usual_layers(kind), world.wanted(kind), TAUGHT[kind])
    network = world.new_probe(unet, target.layers, kind)
    remember_kind(network, kind)
    stage = ProbeStage(network, target, unet, **world.denoising(config))
    return Job(stage, world.samples(config, kind))


def plain(world: World, config: Any) -> Job:
    """The diffusion loss goes on, for as many steps as the methods take: the papers' row called ControlNet."""
    torch.manual_seed(config.seed)
    kind = config.control_type
    stage = ControlNetStage(world.controlnet(config, kind), kind, world.unet(config), **world.denoising(config))
    return Job(stage, world.samples(config, kind))


def controlnet_plus_plus(world: World, config: Any) -> Job:
    """The control is read back from one-step estimates of the picture, at timesteps at which those show it."""
    return Job(RewardStage(*_rewarded(world, config), **_reward(world, config)), _samples(world, config))


def ctrl_u(world: World, config: Any) -> Job:
    """... where two estimates agree: disagreement makes the reward count less, and has a price."""
    stage = RewardStage(*_rewarded(world, config), uncertainty=config.u_scale, **_reward(world, config))
    return Job(stage, _samples(world, config))


def innercontrol(world: World, config: Any) -> Job:
    """ControlNet++, and a probe reads the control from inner features at nearly every timestep."""
    kind, reads = config.control_type, world.probe(config, config.control_type)
    check_reads(reads, kind, world.classes, config.probe_model_name_or_path or "the probe")
    *rewarded, unet = _rewarded(world, config)
    layers = read_by(reads, unet, usual_layers(kind))
    stage = AlignmentStage(
        reads,
        Target(
            layers,
            world.wanted(kind),
            LOSSES[kind],
            span_of(reads, kind, layers),
            config.reversed_timestep_readout,
        ),
        *rewarded,
        unet,
        alignment_weight=config.aligning_alpha,
        alignment_window=(config.min_timestep_readout, config.max_timestep_readout),
        **_reward(world, config),
    )
    return Job(stage, _samples(world, config))


def usual_layers(kind: str) -> Layers:
    """Depth is read from self-attention, the others from convolutions (appendix A.1)."""
    return "attention" if kind == "depth" else "convolution"


def _rewarded(world: World, config: Any) -> tuple[Any, ...]:
    """What every stage with a reward begins with; nothing reads where rewards weigh nothing."""
    torch.manual_seed(config.seed)
    kind = config.control_type
    reward = reader = vae = None
    if config.grad_scale:
        reader, vae = world.reader(config, kind), world.vae(config)
        reward = Reward(reader, world.seen(kind), kind == "seg")
    return reward, reader, vae, world.controlnet(config, kind), kind, world.unet(config)


def _reward(world: World, config: Any) -> dict[str, Any]:
    window = (0, config.max_timestep_rewarding)
    return {
        "weight": config.grad_scale,
        "window": window,
        "ramp": config.reward_ramp_steps,
        **world.denoising(config),
    }


def _samples(world: World, config: Any) -> Any:
    return world.samples(config, config.control_type)
