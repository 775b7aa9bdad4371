"""What the recipes of the tiny family share: scenes, latents, frozen parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from transformers import CLIPTokenizer

from counterpoint.data.shards import SHARD, SceneShards
from counterpoint.models.load import TINY, load_diffusers, load_tower, locate
from counterpoint.training.config import TrainConfig
from counterpoint.training.stages.codec import pictures
from counterpoint.types import UserError, check_label


def _kind(name: str) -> str:
    check_label(name)
    if ":" in name:
        raise UserError(f"{name!r} is one control of its kind: name the kind")
    return name


AnyKind = Annotated[str, AfterValidator(_kind)]
"""A setting that names a kind of control, be it one that only the data know."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FamilyConfig(TrainConfig):
    """A member that stands on others: ``pretrained_model_name_or_path`` holds them, a folder or a hub id."""

    pretrained_model_name_or_path: Path = TINY
    proportion_empty_prompts: float = Field(0.1, ge=0, le=1)
    snr_gamma: float | None = Field(5.0, gt=0, allow_inf_nan=False)
    debiased_estimation_loss: bool = False


def part(config: FamilyConfig, name: str = "") -> Path:
    """The folder of a part of the model that a configuration names, or the model's own.

    Raises:
        UserError: there is no such model.
    """
    return located(config.pretrained_model_name_or_path, "pretrained_model_name_or_path") / name


def located(place: Path, setting: str) -> Path:
    """Where the model is that a setting names by its folder or hub id.

    Raises:
        UserError: nowhere, and which setting it is.
    """
    try:
        return locate(str(place))
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None


def scenes(config: TrainConfig, *fields: str, first: int = 0) -> SceneShards:
    """The scenes that a run learns from, rendered if they are not there yet.

    Raises:
        UserError: ``max_train_samples`` is no multiple of what a shard holds.
    """
    if config.max_train_samples % SHARD:
        raise UserError(f"max_train_samples={config.max_train_samples}: scenes come in shards of {SHARD}")
    shards = SceneShards(config.cache_dir, first, config.max_train_samples, fields).prepare()
    return shards.soft_edges() if "control:hed" in fields else shards


def latents(config: FamilyConfig, *fields: str) -> SceneShards:
    """Scenes with their latents under the family's codec, scaled as the UNet sees them."""
    folder = part(config, "vae")
    vae = fast(network(AutoencoderTiny, folder))

    def make(images: np.ndarray) -> np.ndarray:
        return encode(vae, (torch.from_numpy(part) for part in np.array_split(np.asarray(images), 64)))

    name = f"latents-{mark(folder)}"
    return scenes(config, name, "caption", *fields).derive(name, make).rename(name, "latents")


@torch.no_grad()
def encode(vae: AutoencoderTiny | AutoencoderKL, images: Iterable[torch.Tensor]) -> np.ndarray:
    """Latents in half precision, scaled as the UNet sees them, of batches of images ``(b, h, w, 3)`` uint8."""
    home, there = vae.device, torch.accelerator.current_accelerator()
    device = torch.device(there.type, int(os.environ.get("LOCAL_RANK", 0))) if there else torch.device("cpu")
    vae.to(device)
    found = [vae.encode(pictures(batch).to(device)) for batch in images]
    vae.to(home)
    latents = [one.latents if isinstance(vae, AutoencoderTiny) else one.latent_dist.mode() for one in found]
    return (torch.cat(latents) * vae.config.scaling_factor).half().cpu().numpy()


def mark(folder: Path) -> str:
    """Tells a model's weights and settings from others."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.*")))).hexdigest()[:8]


def denoising(config: FamilyConfig) -> dict[str, object]:
    """What every stage that denoises takes besides its UNet: the frozen text encoder, the model's own noise schedule
    and prediction type, and how its loss is weighed.

    Raises:
        UserError: the model says nothing of its noise schedule.
    """
    folder = part(config)
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise UserError(f"{folder} has no scheduler/scheduler_config.json: a model's noise schedule stands there")
    return {
        "text_encoder": load_tower(folder / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        "scheduler": DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
        "proportion_empty_prompts": config.proportion_empty_prompts,
        "snr_gamma": config.snr_gamma,
        "debiased": config.debiased_estimation_loss,
    }


def network(kind: type[nn.Module], folder: Path) -> Any:
    """A network of a model in float32, from safetensors alone.

    Raises:
        UserError: it is another one, or its weights are missing, damaged or pickled.
    """
    found = load_diffusers(folder)
    if not isinstance(found, kind):
        raise UserError(f"{folder} holds a {type(found).__name__}, and a {kind.__name__} is wanted")
    return found


def unet(config: FamilyConfig) -> UNet2DConditionModel:
    """The family's UNet, laid out for training beside it."""
    return fast(network(UNet2DConditionModel, part(config, "unet")))


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that starts from a UNet's encoder, behind zero convolutions.

    Only the last layer of its hint encoder does not start at zero: behind two layers of zeros nothing would move for
    hundreds of steps.
    """
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64, 96))
    torch.nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.2)
    return network


def fast(model: torch.nn.Module) -> torch.nn.Module:
    """Laid out for quick convolutions, and with attention spelt out.

    On a CPU, the backward pass of fused bf16 attention over heads this narrow takes half of a training step.
    """
    if isinstance(model, (UNet2DConditionModel, ControlNetModel)):
        model.set_attn_processor(AttnProcessor())
    return model.to(memory_format=torch.channels_last)
