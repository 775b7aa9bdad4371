"""Stock pipelines of other families, of small width, with random weights and control networks that really speak."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    FluxTransformer2DModel,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.conftest import noise

SIZE = 64
Call = Callable[..., torch.Tensor]
SDXL_SHAPE = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}


def speak(network: nn.Module) -> nn.Module:
    """Let a network's zero convolutions say something."""
    for name, parameter in network.named_parameters():
        if "controlnet_" in name and "weight" in name and parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network.eval()


def hints(count: int = 2) -> list[Image.Image]:
    return [noise((SIZE, SIZE), 60 + 40 * i) for i in range(count)]


def caller(pipe: Any, *args: Any, **settings: Any) -> Call:
    pipe.set_progress_bar_config(disable=True)
    same = {"num_inference_steps": 3, "width": SIZE, "height": SIZE, "output_type": "latent", "return_dict": False}

    def call(**more: Any) -> torch.Tensor:
        return pipe(*args, generator=torch.manual_seed(3), **{**same, **settings, **more})[0]

    return call


def _sdxl_parts(parts: dict) -> dict[str, Any]:
    torch.manual_seed(1)
    text = parts["text_encoder"].config
    second = CLIPTextModelWithProjection(CLIPTextConfig(**{**text.to_dict(), "projection_dim": 16})).eval()
    unet = UNet2DConditionModel(sample_size=8, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **SDXL_SHAPE).eval()
    return {
        **{name: parts[name] for name in ("vae", "tokenizer", "text_encoder", "scheduler")},
        "tokenizer_2": parts["tokenizer"],
        "text_encoder_2": second,
        "unet": unet,
        "add_watermarker": False,
    }


def sdxl(parts: dict, count: int = 2) -> tuple[Any, Call]:
    shared = _sdxl_parts(parts)
    networks = [
        speak(ControlNetModel.from_unet(shared["unet"], conditioning_embedding_out_channels=(8, 8, 16, 16)))
        for _ in range(count)
    ]
    pipe = StableDiffusionXLControlNetPipeline(**shared, controlnet=networks if count > 1 else networks[0])
    images = hints(count)
    return pipe, caller(pipe, "a person on meadow", image=images if count > 1 else images[0])


def union(parts: dict, count: int = 2) -> tuple[Any, Call]:
    """Two union networks, each asked for one kind; or one that is asked for ``-count`` kinds."""
    shared = _sdxl_parts(parts)
    networks = []
    for _ in range(max(count, 1)):
        network = ControlNetUnionModel(
            **SDXL_SHAPE,
            conditioning_embedding_out_channels=(8, 8, 16, 16),
            num_trans_channel=16,
            num_trans_head=2,
            num_proj_channel=16,
        )
        networks.append(speak(network))
    pipe = StableDiffusionXLControlNetUnionPipeline(
        **shared, controlnet=MultiControlNetUnionModel(networks) if count > 1 else networks[0]
    )
    return pipe, caller(
        pipe, "a person on meadow", control_image=hints(abs(count)), control_mode=list(range(abs(count)))
    )


def flux(parts: dict, count: int = 2, kinds: int | None = None) -> tuple[Any, Call]:
    """With ``kinds``, union networks of so many."""
    torch.manual_seed(2)
    shape = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    transformer = FluxTransformer2DModel(**shape).eval()
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    with warnings.catch_warnings():  # of diffusers to itself
        warnings.filterwarnings("ignore", "`FluxPosEmbed`", FutureWarning)
        networks = [speak(FluxControlNetModel(**shape, num_mode=kinds)) for _ in range(count)]
    pipe = FluxControlNetPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae,
        None,
        None,
        None,
        None,
        transformer,
        FluxMultiControlNetModel(networks),
    )
    said = {"prompt_embeds": torch.randn(1, 12, 32), "pooled_prompt_embeds": torch.randn(1, 16)}
    return pipe, caller(
        pipe, control_image=hints(count), controlnet_conditioning_scale=[1.0] * count, height=SIZE, width=96, **said
    )


def from_picture(parts: dict, kind: str, task: str) -> tuple[Any, Call]:
    """Image-to-image or inpainting: ``kind`` is sdxl, union, flux or "flux union"; ``task`` Img2Img or Inpaint."""
    family = {"sdxl": "StableDiffusionXLControlNet", "union": "StableDiffusionXLControlNetUnion"}
    build = {"sdxl": sdxl, "union": union}.get(kind, partial(flux, kinds=3 if "union" in kind else None))
    first, _ = build(parts)
    pipe_class = getattr(diffusers, f"{family.get(kind, 'FluxControlNet')}{task}Pipeline")
    taken = inspect.signature(pipe_class.__init__).parameters
    pipe = pipe_class(**{name: part for name, part in first.components.items() if name in taken})
    more: dict[str, Any] = {"prompt": "a person on meadow"}
    if "flux" in kind:
        generator = torch.manual_seed(5)
        more = {
            "prompt_embeds": torch.randn(1, 12, 32, generator=generator),
            "pooled_prompt_embeds": torch.randn(1, 16, generator=generator),
        }
    if kind != "sdxl":
        more["control_mode"] = [0, 2] if "union" in kind else [None, None]
    if task == "Inpaint":
        more["mask_image"] = Image.new("L", (SIZE, SIZE), 255)
    return pipe, caller(
        pipe,
        image=noise((SIZE, SIZE), 90),
        control_image=hints(2),
        controlnet_conditioning_scale=[1.0, 0.6],
        strength=0.9,
        **more,
    )


def adapters(parts: dict, count: int = 2) -> tuple[Any, Call]:
    torch.manual_seed(4)
    several = [T2IAdapter(channels=[16, 32], num_res_blocks=1).eval() for _ in range(count)]
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    pipe = StableDiffusionAdapterPipeline(
        **{name: parts[name] for name in names},
        adapter=MultiAdapter(several) if count > 1 else several[0],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    images, scale = (hints(count), [0.8] * count) if count > 1 else (hints(1)[0], 0.8)
    return pipe, caller(pipe, "a person on meadow", images, adapter_conditioning_scale=scale)
