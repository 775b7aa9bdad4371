"""Recipes that make a ControlNet of the tiny family follow its control more closely.

ControlNet++ (arXiv:2404.07987), Ctrl-U (arXiv:2410.11236) and InnerControl on procedural scenes, and the probes that
the last one needs. Settings are called as in the authors' scripts. Judge B rewards; judge A only judges.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import AutoencoderTiny
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from counterpoint.control.features import widths
from counterpoint.data.scenes.vocabulary import SEG_CLASSES
from counterpoint.models.perception import PerceptionModel, Reading
from counterpoint.models.probe import Probe
from counterpoint.recipes import parts
from counterpoint.recipes.recipe import Recipe
from counterpoint.training.stage import Batch, Job
from counterpoint.training.stages.probe import AlignmentStage, ProbeStage, Target
from counterpoint.training.stages.reward import Reward, RewardStage
from counterpoint.types import UserError

Kind = Literal["depth", "hed", "seg"]
EDGES, MAPS = 64, 32
"""Side of what a probe reads: thin lines want more (InnerControl, appendix A.1)."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ProbeConfig(parts.FamilyConfig):
    """A probe for one kind of control."""

    control_type: Kind = "depth"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AlignedConfig(parts.TunedConfig):
    """A ControlNet that is tuned with a reward, and with alignment if ``aligning_alpha`` is not 0."""

    control_type: Kind = "depth"
    grad_scale: float = 0.5
    max_timestep_rewarding: int = 400
    u_scale: float | None = None
    aligning_alpha: float = 0.0
    min_timestep_readout: int = 0
    max_timestep_readout: int = 920


def _wanted(kind: Kind, batch: Batch) -> Tensor:
    """Classes of a segmentation; of other kinds the map, ``(b, 1, h, w)`` in 0..1."""
    if kind == "seg":
        classes: Tensor = batch["seg"].long()
        return classes
    maps: Tensor = batch[f"control:{kind}"][..., 0].float()[:, None] / 255
    return maps


def _fields(kind: Kind) -> list[str]:
    return [f"control:{kind}", *["seg"] * (kind == "seg")]


def _target(kind: Kind) -> Target:
    """Depth is read from self-attention, the others from convolutions (appendix A.1)."""
    sort = {"depth": "map", "hed": "sparse", "seg": "classes"}[kind]
    return Target("attention" if kind == "depth" else "convolution", lambda batch: _wanted(kind, batch), sort)


def probe(config: ProbeConfig) -> Job:
    """Reads a control from the frozen UNet's features."""
    torch.manual_seed(config.seed)
    kind, unet = config.control_type, parts.unet(config)
    target = _target(kind)
    network = Probe(
        widths(unet, target.layers),
        time_width=unet.time_embedding.linear_2.out_features,
        width=64,
        head=(48, 24),
        out=len(SEG_CLASSES) if kind == "seg" else 1,
        bounded=kind != "seg",
        size=EDGES if kind == "hed" else MAPS,
    )
    stage = ProbeStage(parts.fast(network), target, unet, **parts.denoising(config))
    return Job(stage, parts.latents(config, *_fields(kind)))


def aligned(config: AlignedConfig) -> Job:
    """Goes on with the family's ControlNet.

    Raises:
        UserError: the family lacks judge B, or the probe.
    """
    torch.manual_seed(config.seed)
    family, kind = config.pretrained_model_name_or_path, config.control_type
    needed = ["judges/b", *[f"probes/{kind}"] * (config.aligning_alpha != 0)]
    if missing := [place for place in needed if not (family / place).is_dir()]:
        raise UserError(f"{family} has no {', '.join(missing)}: train it first (tiny-judge or -probe)")
    judge = PerceptionModel.from_pretrained(family / "judges" / "b", local_files_only=True)
    vae = AutoencoderTiny.from_pretrained(family / "vae", local_files_only=True)

    def read(pictures: Tensor) -> Tensor:
        reading: Reading = judge(pictures)
        return {"depth": reading.depth, "hed": reading.edge, "seg": reading.seg}[kind]

    reward = Reward(read, lambda batch: _wanted(kind, batch), kind == "seg")
    host = (parts.fast(judge), parts.fast(vae), parts.tuned_controlnet(config, kind), kind, parts.unet(config))
    settings = {
        "weight": config.grad_scale,
        "window": (0, config.max_timestep_rewarding),
        "uncertainty": config.u_scale,
        **parts.denoising(config),
    }
    stage: RewardStage
    if config.aligning_alpha == 0:
        stage = RewardStage(reward, *host, **settings)
    else:
        reader = Probe.from_pretrained(family / "probes" / kind, local_files_only=True)
        window = config.min_timestep_readout, config.max_timestep_readout
        stage = AlignmentStage(
            parts.fast(reader), _target(kind), reward, *host,
            alignment_weight=config.aligning_alpha, alignment_window=window, **settings,
        )  # fmt: skip
    return Job(stage, parts.latents(config, *_fields(kind)))


PROBE = Recipe(
    "tiny-probe",
    "a probe that reads a control from inner features (--set control_type=depth)",
    ProbeConfig(
        max_train_steps=5000,
        train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        checkpointing_steps=500,
        logging_steps=250,
        max_train_samples=98304,
    ),
    probe,
)
ALIGNED = Recipe(
    "tiny-aligned",
    "a ControlNet tuned with rewards (u_scale: Ctrl-U; aligning_alpha: InnerControl)",
    AlignedConfig(
        max_train_steps=2000,
        train_batch_size=32,
        learning_rate=2e-4,
        lr_scheduler="constant",
        lr_warmup_steps=10,
        checkpointing_steps=250,
        logging_steps=50,
        max_train_samples=98304,
    ),
    aligned,
)
