"""Recipes for other tools: a diffusers script, a ComfyUI graph. What these cannot say is listed, never dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.control.stack import Weight
from counterpoint.fusion import FUSIONS, get_fusion
from counterpoint.sampling.schedulers import SCHEDULERS
from counterpoint.types import Fusion


@dataclass(frozen=True)
class Exported:
    """A recipe in another tool's form, and what of it that tool cannot say."""

    text: str
    left_out: tuple[str, ...]


def to_diffusers(request: GenerateRequest, seed: int) -> Exported:
    """A script for diffusers alone."""
    left_out = _left_out(request, request.fusion)
    networks = [one.controlnet or f"CONTROLNET FOR {one.kind.upper()}" for one in request.controls]
    task = "Inpaint" if request.inpaint_mask else "Img2Img" if request.init_image else ""
    pipeline = f"StableDiffusionControlNet{task}Pipeline" if networks else f"StableDiffusion{task}Pipeline"
    scheduler = SCHEDULERS.get(request.scheduler, request.scheduler)
    hints = [f"load_image({str(one.image)!r})" for one in request.controls]
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[request.dtype]
    sizes = {"width": request.width, "height": request.height}
    if request.init_image:
        sizes = {}
    call: dict[str, str] = {
        "prompt": repr(request.prompt),
        "negative_prompt": repr(request.negative_prompt),
        **({"image": f"load_image({str(request.init_image)!r})"} if request.init_image else {}),
        **({"mask_image": f"load_image({str(request.inpaint_mask)!r})"} if request.inpaint_mask else {}),
        **({"strength": f"{request.strength:g}"} if request.init_image else {}),
    }
    if hints:
        call |= {
            "control_image" if task else "image": f"[{', '.join(hints)}]",
            "controlnet_conditioning_scale": str([_constant(one) for one in request.controls]),
            "control_guidance_start": str([one.window[0] for one in request.controls]),
            "control_guidance_end": str([one.window[1] for one in request.controls]),
        }
    call |= {
        **{name: str(value) for name, value in sizes.items() if value},
        "num_inference_steps": str(request.steps),
        "guidance_scale": "7.5" if request.guidance_scale is None else f"{request.guidance_scale:g}",
        "generator": f"torch.Generator().manual_seed({seed})",
    }
    loras = [source.rpartition(":") if ":" in source else (source, "", "1") for source in request.lora]
    names = sorted({pipeline, scheduler, *(["ControlNetModel"] if networks else [])})
    lines = [
        *(f"# Left out, diffusers cannot say it: {line}" for line in left_out),
        "import torch",
        f"from diffusers import {', '.join(names)}",
    ]
    if networks:
        lines.append("from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel")
    if hints or request.init_image:
        lines.append("from diffusers.utils import load_image")
    lines.append("")
    loaded = f"dtype=torch.{dtype}, safety_checker=None"
    if networks:
        made = f"ControlNetModel.from_pretrained(path, dtype=torch.{dtype})"
        lines.append(f"controlnet = MultiControlNetModel([{made} for path in {networks!r}])")
        loaded += ", controlnet=controlnet"
    lines += [
        f"pipe = {pipeline}.from_pretrained({request.model!r}, {loaded}).to({request.device!r})",
        f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)",
    ]
    if loras:
        called = [f"lora{number}" for number in range(len(loras))]
        strengths = [float(strength) for _, _, strength in loras]
        lines += [f"pipe.load_lora_weights({path!r}, adapter_name={name!r})"
                  for name, (path, _, _) in zip(called, loras, strict=True)]  # fmt: skip
        lines.append(f"pipe.set_adapters({called}, {strengths})")
    lines += [
        "image = pipe(",
        *(f"    {name}={value}," for name, value in call.items()),
        ").images[0]",
        f"image.save('seed-{seed}.png')",
    ]
    return Exported("\n".join(lines) + "\n", left_out)


_SAMPLERS = {
    "unipc": "uni_pc", "ddim": "ddim", "ddpm": "ddpm", "euler": "euler", "euler-a": "euler_ancestral", "heun": "heun",
    "dpm++": "dpmpp_2m", "dpm++-sde": "dpmpp_sde", "deis": "deis", "lms": "lms", "lcm": "lcm",
}  # fmt: skip


def to_comfyui(request: GenerateRequest, seed: int) -> Exported:
    """A graph in ComfyUI's API form, of its own nodes and ours (:mod:`counterpoint.apps.comfyui`).

    Files are called what ComfyUI's folders would call them.
    """
    fusion = get_fusion(request.fusion)
    joined = len(request.controls) > 1 and request.fusion != "sum" and all(offerable(rule) for rule in fusion.rules)
    left_out = list(_left_out(request, "sum" if joined else request.fusion))
    if request.scheduler not in _SAMPLERS:
        left_out.append(f"the scheduler {request.scheduler}: uni_pc in its place")
    if request.lora:
        left_out += [f"the LoRA {source}: its clip strength is taken to be the same" for source in request.lora]
    nodes: dict[str, dict[str, Any]] = {}

    def node(kind: str, **inputs: Any) -> str:
        nodes[name := str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return name

    loaded = node("CheckpointLoaderSimple", ckpt_name=f"{request.model.rstrip('/').rpartition('/')[2]}.safetensors"
                  if not request.model.endswith(".safetensors") else request.model.rpartition("/")[2])  # fmt: skip
    model, clip = [loaded, 0], [loaded, 1]
    for source in request.lora:
        path, _, strength = source.rpartition(":") if ":" in source else (source, "", "1")
        lora = node(
            "LoraLoader", lora_name=path.rpartition("/")[2], strength_model=float(strength),
            strength_clip=float(strength), model=model, clip=clip,
        )  # fmt: skip
        model, clip = [lora, 0], [lora, 1]
    positive = [node("CLIPTextEncode", text=request.prompt, clip=clip), 0]
    negative = [node("CLIPTextEncode", text=request.negative_prompt, clip=clip), 0]
    for one in request.controls:
        network = node(
            "ControlNetLoader", control_net_name=(one.controlnet or f"{one.kind}.safetensors").rpartition("/")[2]
        )
        image = node("LoadImage", image=one.image.name)
        applied = node(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=[network, 0],
            image=[image, 0], strength=_constant(one), start_percent=one.window[0], end_percent=one.window[1],
        )  # fmt: skip
        positive, negative = [applied, 0], [applied, 1]
    if joined:
        rule = node("CounterpointFusion", positive=positive, negative=negative, fusion=request.fusion)
        positive, negative = [rule, 0], [rule, 1]
    if request.init_image:
        picture = node("LoadImage", image=request.init_image.name)
        latent = node("VAEEncode", pixels=[picture, 0], vae=[loaded, 2])
        if request.inpaint_mask:
            mask = node("LoadImageMask", image=request.inpaint_mask.name, channel="red")
            latent = node("SetLatentNoiseMask", samples=[latent, 0], mask=[mask, 0])
    else:
        latent = node("EmptyLatentImage", width=request.width or 512, height=request.height or 512, batch_size=1)
    sampled = node(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=[latent, 0], seed=seed,
        steps=request.steps, cfg=7.5 if request.guidance_scale is None else request.guidance_scale,
        sampler_name=_SAMPLERS.get(request.scheduler, "uni_pc"), scheduler="normal",
        denoise=request.strength if request.init_image else 1.0,
    )  # fmt: skip
    decoded = node("VAEDecode", samples=[sampled, 0], vae=[loaded, 2])
    node("SaveImage", images=[decoded, 0], filename_prefix=f"seed-{seed}")
    left_out.append(f"the noise of seed {seed}: ComfyUI draws its own, so the picture will be another one")
    return Exported(json.dumps(nodes, indent=1) + "\n", tuple(left_out))


FORMS: dict[str, tuple[str, Callable[[GenerateRequest, int], Exported]]] = {
    "diffusers": (".py", to_diffusers),
    "comfyui": (".comfyui.json", to_comfyui),
}
"""Form -> suffix of its files, and what writes it from a request and the picture's seed."""


def _constant(control: ControlRequest) -> float:
    """A control's weight where a schedule cannot be said: the one that it begins with."""
    return Weight.parse(control.weight).at(0.0)


def offerable(rule: Fusion) -> bool:
    """Whether a rule needs no more of the networks than what they say."""
    return rule.exchange is None and rule.keys is None and rule.inject is torch.add


def offered() -> list[str]:
    """The rules of ComfyUI's node."""
    return [name for name, rule in FUSIONS.items() if offerable(rule)]


def _left_out(request: GenerateRequest, fusion: str) -> tuple[str, ...]:
    """What no tool but this one says; ``fusion`` is the rule, or a sum where the tool can say it."""
    said = []
    if len(request.controls) > 1 and fusion != "sum":
        said.append(f"the fusion {fusion}: the controls are added")
    for one in request.controls:
        if len(Weight.parse(one.weight).knots) > 1:
            said.append(f"the weight schedule {one.weight} of {one.label}: {_constant(one):g} throughout")
        if one.mask is not None:
            said.append(f"the mask {one.mask} of {one.label}: it speaks everywhere")
        if one.mode != "balanced":
            said.append(f"the mode {one.mode} of {one.label}: it is balanced")
        if one.photo:
            said.append(f"how {one.image} becomes the condition image of {one.label}: extract it first")
    if request.gate_silence:
        said.append("gating of silent regions")
    if request.subject or request.subject_mask:
        said.append("the subject, whose keys and values the controls would hear")
    if request.aggregate:
        said.append(f"the aggregation of {', '.join(request.aggregate)} and its layout")
    if request.resize != "fill":
        said.append(f"resizing by {request.resize}: bring images to size first")
    return tuple(said)
