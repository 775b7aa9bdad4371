"""What is timed of whole pictures: stock diffusers and every way of ours, on the same weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import PIL.Image
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from counterpoint.api import DTYPES, check_compile, find_dtype
from counterpoint.apps.benchmark import Case, Timing, ratios, spread
from counterpoint.apps.benchmark_cases import Comparison
from counterpoint.apps.benchmark_models import SHIPPED, added, make_model
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.models.openvino import port
from counterpoint.sampling.economy import ENCODER, GUIDANCE
from counterpoint.sampling.floor import Operation, Operations, uncounted
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.plan import plan
from counterpoint.types import Notice, UserError

CONTROLS = 2
COUNTS = {1: ", 1 control", 2 * CONTROLS: f", {2 * CONTROLS} controls"}
"""Other numbers of controls, and what the names of their cases end in."""
STOCK = "stock diffusers"
PARTS = tuple(f"part: {part}" for part in ("branch 0", "branch 1", "hints", "sum", "host", "decode"))
"""Of one guided step: every branch, of these the encoding of the hints, the rule, the host; and the decoding of the
picture."""
ENOUGH = 4
"""Steps from which on anything can be foretold: three answers tell a line and its error."""


def generate_cases(
    size: str, device: torch.device, dtype: torch.dtype, steps: int | None = None, only: Sequence[str] = ()
) -> Comparison:
    """Pictures with two controls at guidance 7.5, up to the latents: by stock diffusers at its defaults, which count in
    float32, and by every way of ours; the lower qualities with one and four controls as well; and the parts of one
    step. ``steps`` default to 20, or 2 where a step takes many seconds; with ``only`` nothing else is built besides
    stock diffusers, and what takes minutes to compile is timed only if it is named there. Below :data:`ENOUGH` steps
    the lower qualities are left out.

    Raises:
        UserError: another dtype, for each way has its own; ``only`` names a case that is not there; or there is no
            room.
    """
    if dtype != torch.float32:
        raise UserError("benchmark generate compares dtypes itself: leave out --dtype")
    steps = steps or (20 if size == SHIPPED else 2)
    asked = _asked(device, steps, only)
    others = {way.removeprefix("compiled, ") for way, _, _ in asked.values()} - {"fp32"}
    pipe = make_model(size, device, copies=sum(1.0 if way.endswith("fp32") else 0.5 for way in others))
    stock = stock_pipeline(pipe)
    side, labels = pipe.native_size, list(pipe.controls)
    hints = drawn(labels * CONTROLS, side)
    call = {"num_inference_steps": steps, "guidance_scale": 7.5, "output_type": "latent", "width": side, "height": side}

    @cache
    def pipeline(way: str) -> Pipeline:
        backend, _, kind = way.rpartition(", ")
        if backend == "openvino":
            unet, networks = port(pipe.unet, pipe.controls, kind == "bf16")
            return replace(pipe, unet=unet, controls=networks)
        one = pipe if kind == "fp32" else _copied(pipe, kind)
        return _compiled(one) if backend == "compiled" else one

    def ours(way: str, quality: str, count: int) -> Case:
        def case() -> object:
            with uncounted():
                one = pipeline(way)
            if count != CONTROLS:
                several = list(enumerate(list(one.controls.items()) * CONTROLS))[:count]
                one = replace(one, controls={f"{kind}:{place}": network for place, (kind, network) in several})
            noise = torch.Generator().manual_seed(0)
            return one("a person", hints[:count], **call, fusion="sum", generator=noise, quality=quality)

        return case

    cases: dict[str, Case] = {
        STOCK: lambda: stock("a person", image=hints[:CONTROLS], **call, generator=torch.Generator().manual_seed(0)),
        **{name: ours(*one) for name, one in asked.items()},
    }
    closed = {name: count for name, (way, _, count) in asked.items() if way.startswith(("openvino", "compiled"))}
    unseen: dict[str, Any] = {}
    if closed:
        parts = plan(pipe, quality="balanced", device=device).parts  # of what may be foretold too
        unseen = {name: partial(operations, parts, labels, count, steps) for name, count in closed.items()}
    if not only or set(only) & set(PARTS):
        cases |= {name: part for name, part in _parts(pipe, device).items() if name in (only or PARTS)}
    return Comparison(cases, STOCK, unseen)


def _asked(device: torch.device, steps: int, only: Sequence[str]) -> dict[str, tuple[str, str, int]]:
    """Name of a picture that is timed -> the way that it is made, its quality, and how many controls it has."""
    kinds = list(dict.fromkeys(("fp32", find_dtype("auto", str(device)))))
    ways = kinds + [f"openvino, {kind}" for kind in kinds if device.type == "cpu" and find_spec("openvino")]
    usual = {_named("exact", way): (way, "exact", CONTROLS) for way in ways}
    if steps >= ENOUGH:
        for quality in ("balanced", "fast"):
            for way in dict.fromkeys(("fp32", ways[-1])):
                usual[_named(quality, way)] = way, quality, CONTROLS
        for count, ending in COUNTS.items():
            usual[_named("balanced", ways[-1]) + ending] = ways[-1], "balanced", count
    elif foretold := [name for name in only if name.startswith(("balanced", "fast"))]:
        raise UserError(f"--only {foretold[0]!r}: in {steps} steps nothing is foretold; --steps {ENOUGH} or more")
    elif not only:
        warnings.warn(
            f"in {steps} steps nothing is foretold, so balanced and fast are left out: --steps {ENOUGH} or more",
            Notice,
            stacklevel=3,
        )
    slow = {_named("exact", f"compiled, {kind}"): (f"compiled, {kind}", "exact", CONTROLS) for kind in kinds}
    names = (STOCK, *usual, *slow, *PARTS)
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only {unknown[0]!r}: there are {', '.join(map(repr, names))}")
    if set(only) & slow.keys():
        check_compile(str(device))
    return {name: one for name, one in (usual | slow).items() if name in (only or usual)}


def stock_pipeline(pipe: Pipeline) -> Any:
    """Stock diffusers' pipeline of a model's networks."""
    names = ("vae", "text_encoder", "tokenizer", "unet")
    parts = {name: getattr(pipe, name) for name in names} | {"scheduler": copy.deepcopy(pipe.scheduler)}
    parts["controlnet"] = MultiControlNetModel(list(pipe.controls.values()))
    if pipe.text_encoder_2 is None:
        plain = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        stock = StableDiffusionControlNetPipeline(**parts, **plain)
    else:
        second = {"tokenizer_2": pipe.tokenizer_2, "text_encoder_2": pipe.text_encoder_2}
        zeros = pipe.zero_empty_prompt
        stock = StableDiffusionXLControlNetPipeline(
            **parts, **second, force_zeros_for_empty_prompt=zeros, add_watermarker=False
        )
    stock.set_progress_bar_config(disable=True)
    return stock


def operations(parts: Mapping[str, Operations], labels: Sequence[str], count: int, steps: int, made: Any) -> Operations:
    """Of a picture whose networks torch does not run, by those of single calls of the guided batch.

    Args:
        parts: of a plan for one picture.
        labels: of its controls, which take turns.
        count: controls of the picture.
        steps: of the picture.
        made: the output, which says what was computed.
    """
    saved = dict(made.thrift[0]) if made.thrift else {}
    guidance, encoder = saved.pop(GUIDANCE, None), saved.pop(ENCODER, None)
    asked = [one.asked / 2 for one in saved.values()] or [float(steps)] * count
    often = {"text": 1.0, "denoiser": steps if guidance is None else (guidance.wanted + guidance.asked) / 2}
    if encoder is not None:
        often[ENCODER] = (encoder.asked - encoder.wanted) / 2  # of what the denoiser does
    for label, times in zip(cycle(labels), asked, strict=False):
        often[f"hint {label}"] = often.get(f"hint {label}", 0.0) + 1
        often[f"control {label}"] = often.get(f"control {label}", 0.0) + times
    found: dict[Operation, float] = {}
    for part, times in often.items():
        for one, number in parts[part].items():
            found[one] = found.get(one, 0.0) + times * number
    return found


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
    """What :data:`PARTS` names."""
    side, config = pipe.native_size // pipe.factor, pipe.unet.config
    where: dict[str, Any] = {"device": device, "dtype": pipe.unet.dtype}
    latents = torch.randn(2, config.in_channels, side, side, **where)
    text = torch.randn(2, pipe.tokenizer.model_max_length, config.cross_attention_dim, **where)
    hint = torch.rand(2, 3, pipe.native_size, pipe.native_size, **where)
    more = {"added_cond_kwargs": added(pipe, 2, **where), "return_dict": False}
    networks = list(pipe.controls.values())

    def branch(network: torch.nn.Module) -> Case:
        return lambda: network(latents, 500, text, hint, **more)

    with torch.no_grad():
        down, mid = networks[0](latents, 500, text, hint, **more)
    heard = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
    parts = (
        *map(branch, networks),
        lambda: [one.controlnet_cond_embedding(hint) for one in networks],
        lambda: [one + one for one in (*down, mid)],
        lambda: pipe.unet(latents, 500, encoder_hidden_states=text, **heard, **more),
        lambda: pipe.decode(latents[:1], "pt"),
    )
    return {name: torch.no_grad()(part) for name, part in zip(PARTS, parts, strict=True)}


def _compiled(pipe: Pipeline) -> Pipeline:
    """With networks that torch compiles, of the same weights."""

    def one(network: torch.nn.Module) -> torch.nn.Module:
        twin = copy.copy(network)
        twin.compile()
        return twin

    return replace(
        pipe, unet=one(pipe.unet), controls={label: one(network) for label, network in pipe.controls.items()}
    )
