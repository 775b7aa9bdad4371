"""What is timed of whole pictures: stock diffusers and every way of ours, on the same weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import PIL.Image
import torch
from diffusers import AutoencoderKL, StableDiffusionControlNetPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from transformers import CLIPTextConfig, CLIPTextModel

from counterpoint.api import DTYPES, find_dtype, load
from counterpoint.apps.benchmark import Case, Timing, ratios, spread
from counterpoint.apps.benchmark_cases import Comparison, chosen, random_models
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.models.openvino import port
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.plan import floor
from counterpoint.types import Notice, UserError

CONTROLS = 2
COUNTS = {1: ", 1 control", 2 * CONTROLS: f", {2 * CONTROLS} controls"}
"""Other numbers of controls, and what the names of their cases end in."""
STOCK = "stock diffusers"
ENOUGH = 4
"""Steps from which on anything can be foretold: three answers tell a line and its error."""


def generate_cases(
    size: str, device: torch.device, dtype: torch.dtype, steps: int | None = None, only: Sequence[str] = ()
) -> Comparison:
    """Pictures with two controls at guidance 7.5, up to the latents: by stock diffusers at its defaults, which count in
    float32, and by every way of ours; the lower qualities with one and four controls as well; and the parts of one
    step. ``steps`` default to those of the size, and with ``only`` nothing else is built besides stock diffusers. Below
    :data:`ENOUGH` steps the lower qualities are left out.

    Raises:
        UserError: another dtype, for each way has its own; or ``only`` names a case that is not there.
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
    hints = drawn(list(pipe.controls) * CONTROLS, side)
    call = {"num_inference_steps": steps, "guidance_scale": 7.5, "output_type": "latent", "width": side, "height": side}

    def ours(way: str, count: int = CONTROLS, **more: object) -> Case:
        def case() -> object:
            one = pipeline(way)
            if count != CONTROLS:
                several = list(enumerate(list(one.controls.items()) * CONTROLS))[:count]
                one = replace(one, controls={f"{kind}:{place}": network for place, (kind, network) in several})
            noise = torch.Generator().manual_seed(0)
            return one("a person", hints[:count], **call, fusion="sum", generator=noise, **more)

        return case

    @cache
    def pipeline(way: str) -> Pipeline:
        if way.startswith("openvino"):
            unet, networks = port(pipe.unet, pipe.controls, way.endswith("bf16"))
            return replace(pipe, unet=unet, controls=networks)
        return pipe if way == "fp32" else _copied(pipe, way)

    half = find_dtype("auto", str(device))
    kinds = list(dict.fromkeys(("fp32", half)))
    ways = kinds + [f"openvino, {kind}" for kind in kinds if device.type == "cpu" and find_spec("openvino")]
    cases: dict[str, Case] = {
        STOCK: lambda: stock("a person", image=hints[:CONTROLS], **call, generator=torch.Generator().manual_seed(0)),
        **{_named("exact", way): ours(way) for way in ways},
    }
    if steps >= ENOUGH:
        for quality in ("balanced", "fast"):
            for way in dict.fromkeys(("fp32", ways[-1])):
                cases[_named(quality, way)] = ours(way, quality=quality)
        for count, ending in COUNTS.items():
            cases[_named("balanced", ways[-1]) + ending] = ours(ways[-1], count, quality="balanced")
    elif foretold := [name for name in only if name.startswith(("balanced", "fast"))]:
        raise UserError(f"--only {foretold[0]!r}: in {steps} steps nothing is foretold; --steps {ENOUGH} or more")
    elif not only:
        warnings.warn(
            f"in {steps} steps nothing is foretold, so balanced and fast are left out: --steps {ENOUGH} or more",
            Notice,
            stacklevel=2,
        )
    parts = _parts(pipe, device)
    cases = chosen(cases | parts, only, STOCK)
    floors = {name: floor(part, device, torch.float32) for name, part in parts.items()}
    low = floors
    if half != "fp32" and _named("exact", half) in cases:
        halved = pipeline(half)
        low = {name: floor(part, device, halved.unet.dtype) for name, part in _parts(halved, device).items()}
    for name in cases:
        if name == STOCK or name.startswith("exact"):  # the others do less arithmetic
            counted = low if name.endswith(("bf16", "fp16")) else floors
            if counted is floors and name.endswith(("bf16", "fp16")):  # nothing was built to count it on
                continue
            whole = sum(counted[part] for part in parts if part not in ("part: hints", "part: decode"))
            # ours are encoded before the first step
            once = 0.0 if name == STOCK else (steps - 1) * counted["part: hints"]
            floors[name] = steps * whole - once
    return Comparison(cases, STOCK, floors, ("fp32",) if low is floors else ("fp32", half))


def notes(timings: Mapping[str, Timing]) -> dict[str, dict[str, Any]]:
    """How far each picture's latents are from stock's, as a share of their length, which share of its answers every
    network was asked for where the others were foretold, and how long several controls took by the measure of one in
    the same round."""
    found: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        latents, wanted = (getattr(one.made, "images", None) for one in (timing, timings[STOCK]))
        if latents is not None and wanted is not None and len(latents) == len(wanted):
            apart = (latents.double() - wanted.double()).norm() / wanted.double().norm()
            thrift = getattr(timing.made, "thrift", None) or ({},)
            found[name] = {"apart": float(apart), "computed": {key: one.share for key, one in thrift[0].items()}}
        one = name.removesuffix(COUNTS[2 * CONTROLS]) + COUNTS[1]
        if one in timings:
            found.setdefault(name, {})["of_one"] = spread(ratios(timing, timings[one]))
    return found


def _named(quality: str, way: str) -> str:
    return quality if way == "fp32" else f"{quality}, {way}"


def drawn(kinds: Sequence[str], side: int) -> list[PIL.Image.Image]:
    """Condition images of scenes with a person, each of another scene: of constant ones networks say the same
    everywhere, which is foretold too easily."""
    scenes = (scene(SPLITS["test"].start + number, content="person") for number in range(len(kinds)))
    maps = (control_map(one, kind) for one, kind in zip(scenes, kinds, strict=True))
    return [PIL.Image.fromarray(one).resize((side, side), PIL.Image.Resampling.NEAREST) for one in maps]


def _copied(pipe: Pipeline, dtype: str) -> Pipeline:
    """In half precision, as ``load`` gives it."""

    def half(network: torch.nn.Module) -> torch.nn.Module:
        return copy.deepcopy(network).to(DTYPES[dtype])

    networks = {name: half(getattr(pipe, name)) for name in ("vae", "text_encoder", "unet")}
    controls = {label: half(one) for label, one in pipe.controls.items()}
    for one in (networks["unet"], *controls.values()):
        one.to(memory_format=torch.channels_last)
    return replace(pipe, **networks, controls=controls)


def _parts(pipe: Pipeline, device: torch.device) -> dict[str, Case]:
    """Of one guided step: every branch, of these the encoding of the hints, the rule, the host; and the decoding of
    the picture."""
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
        "part: hints": torch.no_grad()(lambda: [one.controlnet_cond_embedding(hint) for one in pipe.controls.values()]),
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
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.model_max_length = models.text
    torch.manual_seed(1)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tiny.tokenizer),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=models.text,
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
    parts = {"vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": models.unet.eval()}
    return replace(tiny, **parts, controls=controls), 2


SIZES: dict[str, Callable[[], tuple[Pipeline, int]]] = {"tiny": _tiny, "sd15": _sd15}
"""Size -> a pipeline with two controls, and the steps of a timed picture: two where a step takes many seconds."""
