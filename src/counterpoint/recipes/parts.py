"""What the recipes of the tiny family share: scenes, latents, frozen parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from transformers import CLIPTextModel, CLIPTokenizer

from counterpoint.data.shards import SceneShards
from counterpoint.models.load import TINY
from counterpoint.training.config import TrainConfig
from counterpoint.training.stages.codec import pictures


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FamilyConfig(TrainConfig):
    """A member that stands on others: ``pretrained_model_name_or_path`` is the folder that holds them."""

    pretrained_model_name_or_path: Path = TINY
    proportion_empty_prompts: float = 0.1
    snr_gamma: float | None = 5.0
    debiased_estimation_loss: bool = False


def scenes(config: TrainConfig, *fields: str, first: int = 0) -> SceneShards:
    """The scenes that a run learns from, rendered if they are not there yet."""
    shards = SceneShards(config.cache_dir, first, config.max_train_samples, fields).prepare()
    return shards.soft_edges() if "control:hed" in fields else shards


def latents(config: FamilyConfig, *fields: str) -> SceneShards:
    """Scenes with their latents under the family's codec, scaled as the UNet sees them."""
    folder = config.pretrained_model_name_or_path / "vae"
    vae = fast(AutoencoderTiny.from_pretrained(folder, local_files_only=True))

    def make(images: np.ndarray) -> np.ndarray:
        return encode(vae, (torch.from_numpy(part) for part in np.array_split(np.asarray(images), 64)))

    name = f"latents-{mark(folder)}"
    return scenes(config, name, "caption", *fields).derive(name, make).rename(name, "latents")


@torch.no_grad()
def encode(vae: AutoencoderTiny | AutoencoderKL, images: Iterable[torch.Tensor]) -> np.ndarray:
    """Latents in half precision, scaled as the UNet sees them, of batches of images ``(b, h, w, 3)`` uint8."""
    home, device = vae.device, torch.accelerator.current_accelerator() or torch.device("cpu")
    vae.to(device)
    found = [vae.encode(pictures(batch).to(device)) for batch in images]
    vae.to(home)
    latents = [one.latents if isinstance(vae, AutoencoderTiny) else one.latent_dist.mode() for one in found]
    return (torch.cat(latents) * vae.config.scaling_factor).half().cpu().numpy()


def mark(folder: Path) -> str:
    """Tells a model's weights and settings from others."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.*")))).hexdigest()[:8]


def denoising(config: FamilyConfig) -> dict[str, object]:
    """What every stage that denoises takes besides its UNet: the frozen text encoder, Stable Diffusion 1.5's noise
    schedule, and how its loss is weighed."""
    folder = config.pretrained_model_name_or_path
    return {
        "text_encoder": CLIPTextModel.from_pretrained(
            folder / "text_encoder", local_files_only=True, dtype=torch.float32
        ),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        "scheduler": DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            num_train_timesteps=1000,
            clip_sample=False,
            steps_offset=1,
        ),
        "proportion_empty_prompts": config.proportion_empty_prompts,
        "snr_gamma": config.snr_gamma,
        "debiased": config.debiased_estimation_loss,
    }


def unet(config: FamilyConfig) -> UNet2DConditionModel:
    """The family's UNet, laid out for training beside it."""
    host = UNet2DConditionModel.from_pretrained(config.pretrained_model_name_or_path / "unet", local_files_only=True)
    return fast(host)


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
