"""Models that are timed: the shipped family's, and published shapes with weights of chance."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from counterpoint.api import load
from counterpoint.metrics.cost import free_bytes
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.plan import plan
from counterpoint.types import UserError

SHIPPED = "tiny"
"""The size whose whole pictures and training steps take seconds."""


@dataclass(frozen=True)
class Shape:
    """What a published UNet sets beyond diffusers' defaults, and its text encoders: width, layers and heads."""

    unet: Mapping[str, Any]
    texts: tuple[tuple[int, int, int], ...]


SHAPES = {
    "sd15": Shape({"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}, ((768, 12, 12),)),
    "sdxl": Shape(
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        ((768, 12, 12), (1280, 32, 20)),
    ),
}
SIZES = (SHIPPED, *SHAPES)
"""``tiny``, the shipped family at 128 x 128; ``sd15`` and ``sdxl``, the shapes of Stable Diffusion 1.5 at 512 x 512 and
of SDXL at 1024 x 1024, random weights."""


def make_model(size: str, device: torch.device, dtype: torch.dtype = torch.float32, copies: float = 0.0) -> Pipeline:
    """A model with two controls.

    Args:
        size: one of :data:`SIZES`.
        device: where.
        dtype: of all networks.
        copies: how often the weights will be there besides, in bytes of ``dtype``.

    Raises:
        UserError: there is no room for it.
    """
    if size == SHIPPED:
        return load("tiny", ["pose", "seg"], dtype=dtype, device=str(device))
    tiny = load("tiny")
    _check_room(size, tiny, device, dtype, copies)
    torch.manual_seed(0)
    made = _random(SHAPES[size], tiny, dtype)
    for network in made.controls.values():
        outspoken(network)
    return made.to(device)


def _check_room(size: str, tiny: Pipeline, device: torch.device, dtype: torch.dtype, copies: float) -> None:
    free = free_bytes(device)
    if free is None:
        return
    with torch.device("meta"):
        shapes_alone = _random(SHAPES[size], tiny, dtype)
    found = plan(shapes_alone, device=device)
    needed = found.memory["all"] + copies * sum(found.weights.values())
    if needed > free:
        raise UserError(
            f"--size {size} needs {needed / 2**30:.0f} GiB for all that is timed, and {free / 2**30:.0f} are free: "
            "time fewer cases (--only), a smaller --size, or on another --device"
        )


def _random(shape: Shape, tiny: Pipeline, dtype: torch.dtype) -> Pipeline:
    """Networks of a shape, with the small family's words."""
    tokenizer, before = copy.deepcopy(tiny.tokenizer), torch.get_default_dtype()
    tokenizer.model_max_length = 77
    torch.set_default_dtype(dtype)  # made in float32 first, large ones would not fit
    try:
        unet = UNet2DConditionModel(**shape.unet).eval()
        controls = {kind: ControlNetModel.from_unet(unet, load_weights_from_unet=False) for kind in ("pose", "depth")}
        first, *second = (_config(tokenizer, *sizes) for sizes in shape.texts)
        texts = {"text_encoder": CLIPTextModel(first).eval()}
        for config in second:
            texts["text_encoder_2"] = CLIPTextModelWithProjection(config).eval()
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        ).eval()
    finally:
        torch.set_default_dtype(before)
    words = {"tokenizer": tokenizer, **({"tokenizer_2": tokenizer, "zero_empty_prompt": True} if second else {})}
    return replace(tiny, vae=vae, unet=unet, controls={k: one.eval() for k, one in controls.items()}, **texts, **words)


def _config(tokenizer: Any, width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def outspoken(network: ControlNetModel) -> ControlNetModel:
    """Its convolutions of zeros filled: what says nothing at all would be foretold for nothing."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return network


def added(pipe: Pipeline, rows: int, **where: Any) -> dict[str, torch.Tensor] | None:
    """What SDXL's networks read besides, of noise."""
    if pipe.text_encoder_2 is None:
        return None
    pooled = torch.randn(rows, pipe.text_encoder_2.config.projection_dim, **where)
    return {"text_embeds": pooled, "time_ids": torch.full((rows, 6), 512.0, **where)}
