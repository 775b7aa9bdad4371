"""Recipes of the family's adapters: who does what where, what stands where in which colour, and in whose style."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from counterpoint.data.described import Described, Subset, Untold, crowded
from counterpoint.data.scenes.vocabulary import SIZE
from counterpoint.data.shards import SceneShards
from counterpoint.models.gligen import with_fusers
from counterpoint.models.interact import InteractionEmbedding
from counterpoint.models.ip_adapter import with_ip_adapter
from counterpoint.models.load import load_image_encoder
from counterpoint.models.migc import with_instances
from counterpoint.recipes import parts
from counterpoint.recipes.recipe import Recipe
from counterpoint.training.stage import Job
from counterpoint.training.stages.adapter import AdapterStage
from counterpoint.types import Samples

INTERACTIONS = 8
"""How many the family's own takes; scenes have four things at most."""
HIDDEN = 128
SITES = ("mid_block.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
"""Where the family's own shades instances: at 4 x 4 and 8 x 8, a quarter and half of the latents' side."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AdapterConfig(parts.FamilyConfig):
    """``interact`` is trained without colours and textures, ``migc`` with them and without actions, both mostly on
    scenes with several things, ``style`` with half of the prompts silent about colours, place and style."""

    adapter: Literal["interact", "migc", "style"] = "interact"


def adapter(config: AdapterConfig) -> Job:
    """One of the three, on the frozen UNet, which it shares with the family."""
    torch.manual_seed(config.seed)
    unet, size, reads = parts.unet(config), (SIZE, SIZE), {}
    if config.adapter == "interact":
        kind, text = "interact", unet.config.cross_attention_dim
        unet = _opened(with_fusers(unet, _heard(InteractionEmbedding(text, text, INTERACTIONS, HIDDEN))))
        scenes = parts.latents(config, "layout", "caption:plain").laid_out()
        samples: Any = _crowded(scenes, Described(scenes, config.seed, mislead=True))
    elif config.adapter == "migc":
        kind, unet = "migc", with_instances(unet, SITES, refined=True, hidden=HIDDEN)
        scenes = parts.latents(config, "layout:detailed", "caption:plain").laid_out()
        samples = _crowded(scenes, Described(scenes.rename("layout:detailed", "layout"), config.seed, mislead=False))
    else:
        family = parts.part(config)
        encoder, processor = load_image_encoder(family, family)
        kind, reads = "ip-adapter", {"image_encoder": encoder, "image_processor": processor}
        unet = with_ip_adapter(unet, encoder.config.projection_dim)
        samples = Untold(parts.latents(config, "image", "layout").laid_out(), config.seed)
    return Job(AdapterStage(kind, size, unet, **reads, **parts.denoising(config)), samples)


def _crowded(scenes: SceneShards, samples: Samples) -> Subset:
    return Subset(samples, crowded(scenes.members()))


def _opened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same function by open gates before layers of zeros: shut gates, with which GLIGEN begins, keep the gradients
    of all that lies behind them small, and those of attention were still below 0.11 after 8,000 steps here."""
    for block in unet.modules():
        if isinstance(block, GatedSelfAttentionDense):
            for gate in (block.alpha_attn, block.alpha_dense):
                torch.nn.init.ones_(gate)
            for last in (block.attn.to_out[0], block.ff.net[-1]):
                torch.nn.init.zeros_(last.weight)
                torch.nn.init.zeros_(last.bias)
    return unet


def _heard(tokens: InteractionEmbedding) -> InteractionEmbedding:
    """Tokens that differ by what they tell: as PyTorch begins, phrases and places are 2 % of a token beside its number
    and its role, and layer norms keep it so."""
    for perceptron in (tokens.linears, tokens.linear_action):
        for layer in perceptron[::2]:
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            torch.nn.init.zeros_(layer.bias)
    for table in (tokens.interaction_embedding, tokens.position_embedding):
        torch.nn.init.normal_(table.emb.weight, std=0.1)
    return tokens


ADAPTER = Recipe(
    "tiny-adapter",
    "what reads a layout (--set adapter=interact, migc or style)",
    AdapterConfig(
        max_train_steps=8000,
        train_batch_size=16,
        learning_rate=1e-3,
        debiased_estimation_loss=True,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        checkpointing_steps=500,
        logging_steps=250,
        max_train_samples=98304,
    ),
    adapter,
)
