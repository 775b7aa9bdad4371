"""What is timed of whole pictures: stock diffusers and every way of ours, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, StableDiffusionControlNetPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from transformers import CLIPTextConfig, CLIPTextModel

from counterpoint.api import DTYPES, find_dtype, load
from counterpoint.apps.benchmark import Case
from counterpoint.apps.benchmark_cases import Comparison, random_models
from counterpoint.models.openvino import port
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.plan import floor
from counterpoint.types import UserError

CONTROLS = 2
STOCK = "stock diffusers"


def generate_cases(size: str, device: torch.device, dtype: torch.dtype, steps: int | None = None) -> Comparison:
    """Pictures with two controls at guidance 7.5, up to the latents: by stock diffusers at its defaults, which count in
    float32, and by every way of ours; the lower qualities with one and four controls as well; and the parts of one
    step. ``steps`` default to those of the size.

    Raises:
        UserError: another dtype, for each way has its own.
    """
    if dtype != torch.float32:
        raise UserError("benchmark generate compares dtypes itself: leave out --dtype")
    pipe, usual = SIZES[size]()
    pipe.to(device)
    steps = steps or usual
    stock = StableDiffusionControlNetPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=pipe.unet,
        scheduler=copy.deepcopy(pipe.scheduler),
        controlnet=MultiControlNetModel(list(pipe.controls.values())),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    side = pipe.native_size
    hints = [PIL.Image.fromarray(np.full((side, side, 3), 80 * i, np.uint8)) for i in range(CONTROLS)]
    call = {"num_inference_steps": steps, "guidance_scale": 7.5, "output_type": "latent", "width": side, "height": side}

    def ours(one: Pipeline, count: int = CONTROLS, **more: object) -> Case:
        images = (hints * CONTROLS)[:count]
        return lambda: one("a person", images, **call, generator=torch.Generator().manual_seed(0), **more)

    cases: dict[str, Case] = {
        STOCK: lambda: stock("a person", image=hints, **call, generator=torch.Generator().manual_seed(0)),
        "exact": ours(pipe),
    }
    half = find_dtype("auto", str(device))
    quickest = halved = pipe if half == "fp32" else _copied(pipe, half)
    if halved is not pipe:
        cases[f"exact, {half}"] = ours(halved)
    if device.type == "cpu":
        for kind in dict.fromkeys(("fp32", half)):
            try:
                unet, networks = port(pipe.unet, pipe.controls, kind == "bf16")
            except UserError:
                break
            quickest = replace(pipe, unet=unet, controls=networks)
            cases[f"exact, openvino, {kind}"] = ours(quickest)
    for quality in ("balanced", "fast"):
        cases[quality] = ours(pipe, quality=quality)
        cases[f"{quality}, quickest way"] = ours(quickest, quality=quality)
    for count in (1, 2 * CONTROLS):
        few = list(quickest.controls.values()) * CONTROLS
        several = replace(quickest, controls={f"canny:{i}": few[i] for i in range(count)})
        cases[f"balanced, quickest way, {count} controls"] = ours(several, count, quality="balanced")
    parts = _parts(pipe, device)
    floors = {name: floor(part, device, torch.float32) for name, part in parts.items()}
    low = floors
    if halved is not pipe:
        low = {name: floor(part, device, halved.unet.dtype) for name, part in _parts(halved, device).items()}
    for name in cases:
        if name == STOCK or name.startswith("exact"):  # the others do less arithmetic
            counted = low if name.endswith(("bf16", "fp16")) else floors
            floors[name] = steps * sum(counted[part] for part in parts if part != "part: decode")
    return Comparison(cases | parts, STOCK, floors)


def _copied(pipe: Pipeline, dtype: str) -> Pipeline:
    kind = DTYPES[dtype]
    networks = {name: copy.deepcopy(getattr(pipe, name)).to(kind) for name in ("vae", "text_encoder", "unet")}
    controls = {label: copy.deepcopy(one).to(kind) for label, one in pipe.controls.items()}
    return replace(pipe, **networks, controls=controls)


def _parts(pipe: Pipeline, device: torch.device) -> dict[str, Case]:
    """Of one guided step: every branch, the rule, the host; and the decoding of the picture."""
    side, config = pipe.native_size // pipe.factor, pipe.unet.config
    where: dict[str, Any] = {"device": device, "dtype": pipe.unet.dtype}
    latents = torch.randn(2, config.in_channels, side, side, **where)
    text = torch.randn(2, pipe.tokenizer.model_max_length, config.cross_attention_dim, **where)
    hint = torch.rand(2, 3, pipe.native_size, pipe.native_size, **where)

    def branch(network: torch.nn.Module) -> Case:
        return torch.no_grad()(lambda: network(latents, 500, text, hint, return_dict=False))

    with torch.no_grad():
        down, mid = next(iter(pipe.controls.values()))(latents, 500, text, hint, return_dict=False)
    heard = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
    branches = {f"part: branch {i}": branch(one) for i, one in enumerate(pipe.controls.values())}
    return {
        **branches,
        "part: sum": lambda: [one + one for one in (*down, mid)],
        "part: host": torch.no_grad()(
            lambda: pipe.unet(latents, 500, encoder_hidden_states=text, return_dict=False, **heard)
        ),
        "part: decode": torch.no_grad()(lambda: pipe.decode(latents[:1], "pt")),
    }


def _tiny() -> tuple[Pipeline, int]:
    return load("tiny", ["pose", "seg"]), 20


def _sd15() -> tuple[Pipeline, int]:
    models, tiny = random_models(), load("tiny")
    torch.manual_seed(1)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tiny.tokenizer),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=tiny.tokenizer.model_max_length,
            bos_token_id=tiny.tokenizer.bos_token_id,
            eos_token_id=tiny.tokenizer.eos_token_id,
            pad_token_id=tiny.tokenizer.pad_token_id,
        )
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    controls = {name: one.eval() for name, one in zip(("pose", "depth"), models.controls, strict=True)}
    return replace(tiny, vae=vae, text_encoder=text, unet=models.unet.eval(), controls=controls), 2


SIZES: dict[str, Callable[[], tuple[Pipeline, int]]] = {"tiny": _tiny, "sd15": _sd15}
"""Size -> a pipeline with two controls, and the steps of a timed picture: two where a step takes many seconds."""
