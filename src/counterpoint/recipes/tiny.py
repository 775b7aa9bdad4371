"""The recipes of the tiny family, in the order in which its members need each other.

Each trains on procedural scenes and states its cost on two cores. ``docs/tiny-family.md`` has the log of what was
tried.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import CLIPConfig, CLIPModel

from counterpoint.data.scenes.caption import words
from counterpoint.data.scenes.vocabulary import SEG_CLASSES, SIZE
from counterpoint.models.perception import PerceptionModel
from counterpoint.models.tokenizer import END, START, word_tokenizer
from counterpoint.recipes import parts
from counterpoint.recipes.recipe import Recipe
from counterpoint.training.config import TrainConfig
from counterpoint.training.stage import Job
from counterpoint.training.stages.codec import CodecStage, initialise
from counterpoint.training.stages.diffusion import ControlNetStage, DiffusionStage
from counterpoint.training.stages.judge import JudgeStage
from counterpoint.training.stages.towers import TowersStage

TOKENS = 40
"""Tokens of a prompt, start and end included; no caption of a scene takes more than 31."""
LATENT_CHANNELS = 16
TEXT_WIDTH = 128
KINDS = Literal["canny", "hed", "depth", "lineart", "pose", "seg"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ControlConfig(parts.FamilyConfig):
    """A ControlNet for one kind of control."""

    control_type: KINDS = "pose"
    noises_per_sample: int = Field(1, gt=0)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class JudgeConfig(TrainConfig):
    """One of two judges. A only evaluates, B only rewards, so that a reward is never marked by its own judge."""

    judge: Literal["a", "b"] = "a"


def codec(config: TrainConfig) -> Job:
    """Stride 8, 16 latent channels, 1.1 M parameters: 30.6 dB on test scenes after 92 minutes."""
    torch.manual_seed(config.seed)
    model = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(48,) * 4,
        decoder_block_out_channels=(48,) * 4,
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(4, 3, 2, 0),
    )
    initialise(model)
    return Job(CodecStage(parts.fast(model)), parts.scenes(config, "image"))


def towers(config: TrainConfig) -> Job:
    """A CLIP of two four-layer transformers, 1.8 M parameters, with a tokenizer that knows the scenes' words."""
    torch.manual_seed(config.seed)
    tokenizer = word_tokenizer(words(), TOKENS)
    shape = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    }
    ends = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(START),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
    }
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **shape,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": TOKENS,
                "projection_dim": 128,
                "pad_token_id": ends["eos_token_id"],
                **ends,
            },
            vision_config={**shape, "image_size": SIZE, "patch_size": 16, "projection_dim": 128},
            projection_dim=128,
        )
    )
    return Job(TowersStage(model, tokenizer), parts.scenes(config, "image", "caption"))


def base(config: parts.FamilyConfig) -> Job:
    """A Stable-Diffusion-shaped UNet with attention at every level."""
    torch.manual_seed(config.seed)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(48, 64, 80),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    return Job(DiffusionStage(parts.fast(unet), **parts.denoising(config)), parts.latents(config))


def controlnet(config: ControlConfig) -> Job:
    """A ControlNet on the frozen UNet."""
    torch.manual_seed(config.seed)
    unet = parts.unet(config)
    network = parts.new_controlnet(unet)
    settings = {"noises_per_sample": config.noises_per_sample, **parts.denoising(config)}
    stage = ControlNetStage(parts.fast(network), config.control_type, unet, **settings)
    return Job(stage, parts.latents(config, f"control:{config.control_type}"))


def judge(config: JudgeConfig) -> Job:
    """Reads segmentation, depth, pose and soft edges from a picture. Judge B has other widths, noise and scenes."""
    second = config.judge == "b"
    torch.manual_seed(config.seed + second)
    model = PerceptionModel(len(SEG_CLASSES), widths=(32, 48, 80, 112) if second else (24, 48, 96, 128), depth=2)
    fields = ("image", "seg", "depth", "keypoints", "control:hed")
    scenes = parts.scenes(config, *fields, first=second * config.max_train_samples).rename("seg", "segments")
    return Job(JudgeStage(parts.fast(model)), scenes)


CODEC = Recipe(
    "tiny-codec",
    "the autoencoder of the tiny family",
    TrainConfig(
        max_train_steps=55000,
        train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        adam_weight_decay=0,
        checkpointing_steps=2000,
        logging_steps=500,
    ),
    codec,
)
TOWERS = Recipe(
    "tiny-towers",
    "its text and image towers",
    TrainConfig(
        max_train_steps=6000,
        train_batch_size=128,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        adam_beta2=0.98,
        adam_weight_decay=0.05,
        checkpointing_steps=500,
        max_train_samples=98304,
    ),
    towers,
)
BASE = Recipe(
    "tiny-base",
    "its UNet",
    parts.FamilyConfig(
        max_train_steps=60000,
        train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=500,
        torch_compile=True,
        checkpointing_steps=1000,
        logging_steps=250,
        ema_decay=0.9995,
        max_train_samples=98304,
    ),
    base,
)
CONTROLNET = Recipe(
    "tiny-controlnet",
    "a ControlNet for it (--set control_type=pose)",
    ControlConfig(
        max_train_steps=20000,
        train_batch_size=16,
        learning_rate=2e-3,
        debiased_estimation_loss=True,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        torch_compile=True,
        checkpointing_steps=500,
        logging_steps=250,
        max_train_samples=98304,
    ),
    controlnet,
)
JUDGE = Recipe(
    "tiny-judge",
    "a judge, which reads controls back from pictures (--set judge=b)",
    JudgeConfig(
        max_train_steps=16000,
        train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        checkpointing_steps=1000,
        max_train_samples=98304,
    ),
    judge,
)
