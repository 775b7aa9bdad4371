"""Recipes for other tools: a diffusers script, a ComfyUI graph. What these cannot say is listed, never dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.control.weight import Weight
from counterpoint.fusion import FUSIONS, get_fusion
from counterpoint.models.load import GUIDANCE, TINY, locate, native_size, own_controls, split_lora
from counterpoint.sampling.prompt import unweighted
from counterpoint.sampling.schedulers import find_scheduler
from counterpoint.types import Fusion, UserError, meaning

_SIDE = 512
"""Of a picture in ComfyUI, where its model is not here to say."""


@dataclass(frozen=True)
class Exported:
    """A recipe in another tool's form, and what of it that tool cannot say."""

    text: str
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Model:
    """What a model is to other tools: where it is, whether it is one file, whether it is of the SDXL layout, the side
    of its pictures, its ControlNets in the controls' order, and what of that is not known here."""

    place: str
    single: bool
    large: bool
    side: int | None
    networks: tuple[str, ...]
    unknown: tuple[str, ...]


def _model(request: GenerateRequest) -> _Model:
    own = [one.label for one in request.controls if one.controlnet is None]
    folder = _here(request.model)
    found: dict[str, str] = {}
    side, unknown = None, []
    try:
        if folder is None:
            raise UserError(f"{request.model} is not here: it is taken for a model of the SD1.5 layout")
        side = native_size(str(folder))
        found = own_controls(folder.parent if folder.is_file() else folder, own, request.model)
    except UserError as error:
        unknown = [str(error)]
    networks = tuple(
        one.controlnet or found.get(one.label, f"CONTROLNET FOR {one.kind.upper()}") for one in request.controls
    )
    unknown += [f"where the ControlNet of {label} is: name it" for label in own if label not in found]
    return _Model(
        request.model if folder is None else str(folder),
        request.model.endswith(".safetensors"),
        folder is not None and (folder / "text_encoder_2").is_dir(),
        side,
        networks,
        tuple(unknown),
    )


def _here(source: str) -> Path | None:
    """A model's place on this machine; nothing is fetched."""
    if source == TINY.name or Path(source).exists():
        return locate(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):
        return None


def to_diffusers(request: GenerateRequest, seed: int) -> Exported:
    """A script for diffusers alone.

    Raises:
        UserError: diffusers has no such scheduler, or the seed is none.
    """
    model, seed = _model(request), _whole(seed)
    left_out = [*_left_out(request, request.fusion), *model.unknown]
    pictures = bool(request.controls or request.init_image)
    device, dtype = request.device, f"torch.{_DTYPES[request.dtype]}"
    if device == "openvino":
        device = "cpu"
        left_out.append("OpenVINO: PyTorch runs on the CPU")
    size = _size(request, model)
    if size is None and pictures:
        left_out.append(f"resizing by {request.resize}: bring images to size first")
    pipeline, (scheduler, settings) = _pipeline(request, model), find_scheduler(request.scheduler)
    loaded = [f"dtype={dtype}", "add_watermarker=False" if model.large else "safety_checker=None"]
    if model.single and request.config:
        loaded.append(f"config={request.config!r}")
    lines = [f"# Left out, diffusers cannot say it: {' '.join(line.split())}" for line in left_out]
    lines += ["import PIL.Image", "import PIL.ImageOps"] if pictures else []
    names = {pipeline, scheduler.__name__, *(["ControlNetModel"] if request.controls else [])}
    lines += ["import torch", f"from diffusers import {', '.join(sorted(names))}"]
    if request.controls:
        loaded.append("controlnet=controlnet")
        lines.append("from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel")
    lines += ["from diffusers.utils import load_image", ""] if pictures else [""]
    if request.controls:
        lines += ["controlnet = MultiControlNetModel([", *(
            f"    ControlNetModel.from_{_form(network)}({network!r}, dtype={dtype})," for network in model.networks
        ), "])"]  # fmt: skip
    lines += [
        f"pipe = {pipeline}.from_{_form(model.place)}({model.place!r}, {', '.join(loaded)}).to({device!r})",
        f"pipe.scheduler = {scheduler.__name__}.from_config("
        f"{', '.join(['pipe.scheduler.config', *(f'{key}={value!r}' for key, value in settings.items())])})",
    ]
    loras = [split_lora(source) for source in request.lora]
    lines += [f"pipe.load_lora_weights({path!r}, adapter_name='lora{i}')" for i, (path, _) in enumerate(loras)]
    if loras:
        lines.append(f"pipe.set_adapters({[f'lora{i}' for i in range(len(loras))]}, {[scale for _, scale in loras]})")
    if request.compile:
        lines.append("pipe.unet.compile()")
        lines += ["for network in controlnet.nets:", "    network.compile()"] if request.controls else []
    lines += [
        "image = pipe(",
        *(f"    {name}={value}," for name, value in _call(request, seed, size).items()),
        ").images[0]",
        f"image.save('seed-{seed}-diffusers.png')",
    ]
    return Exported("\n".join(lines) + "\n", tuple(left_out))


def _call(request: GenerateRequest, seed: int, size: tuple[int, int] | None) -> dict[str, str]:
    """Arguments of the pipeline, as Python."""

    def picture(path: Path, nearest: bool = False) -> str:
        place = path.resolve() if path.exists() else path  # so the script runs in any folder
        loaded, how = f"load_image({str(place)!r})", f"PIL.Image.Resampling.{'NEAREST' if nearest else 'LANCZOS'}"
        if size is None:
            return loaded
        if request.resize == "stretch":
            return f"{loaded}.resize({size}, {how})"
        return f"PIL.ImageOps.{'fit' if request.resize == 'fill' else 'pad'}({loaded}, {size}, {how})"

    call = {
        "prompt": repr(unweighted(request.prompt)),
        "negative_prompt": repr(unweighted(request.negative_prompt)),
    }
    if request.init_image:
        call |= {"image": picture(request.init_image), "strength": repr(request.strength)}
    if request.inpaint_mask:
        call["mask_image"] = picture(request.inpaint_mask)
    if request.controls:
        hints = [picture(one.image, meaning(one.kind).resample == "nearest") for one in request.controls]
        call |= {
            "control_image" if request.init_image else "image": f"[{', '.join(hints)}]",
            "controlnet_conditioning_scale": str([_constant(one) for one in request.controls]),
            "control_guidance_start": str([one.window[0] for one in request.controls]),
            "control_guidance_end": str([one.window[1] for one in request.controls]),
        }
    if size is not None and not request.init_image:
        call |= {"width": str(size[0]), "height": str(size[1])}
    return call | {
        "num_inference_steps": str(request.steps),
        "guidance_scale": repr(GUIDANCE if request.guidance_scale is None else request.guidance_scale),
        "generator": f"torch.Generator().manual_seed({seed})",
    }


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SAMPLERS = {
    "unipc": "uni_pc", "ddim": "ddim", "ddpm": "ddpm", "euler": "euler", "euler-a": "euler_ancestral", "heun": "heun",
    "dpm++": "dpmpp_2m", "deis": "deis", "lms": "lms", "lcm": "lcm",
}  # fmt: skip
_KARRAS = "use_karras_sigmas=true"


def to_comfyui(request: GenerateRequest, seed: int) -> Exported:
    """A graph in ComfyUI's API form, of its own nodes and ours (:mod:`counterpoint.apps.comfyui`).

    Files are called what ComfyUI's folders would call them.

    Raises:
        UserError: the seed is no number.
    """
    fusion, seed = get_fusion(request.fusion), _whole(seed)
    joined = len(request.controls) > 1 and request.fusion != "sum" and all(offerable(rule) for rule in fusion.rules)
    model = _model(request)
    left_out = [*_left_out(request, "sum" if joined else request.fusion), *_left_out_of_comfyui(request, model)]
    nodes: dict[str, dict[str, Any]] = {}

    def node(kind: str, **inputs: Any) -> str:
        nodes[name := str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return name

    width, height = _size(request, model) or (_SIDE, _SIDE)

    def picture(path: Path, nearest: bool = False) -> str:
        return node(
            "ImageScale", image=[node("LoadImage", image=path.name), 0], width=width, height=height,
            upscale_method="nearest-exact" if nearest else "lanczos",
            crop="disabled" if request.resize == "stretch" else "center",
        )  # fmt: skip

    loaded = node("CheckpointLoaderSimple", ckpt_name=_file(request.model))
    parts = [loaded, 0], [loaded, 1]
    for path, strength in map(split_lora, request.lora):
        lora = node(
            "LoraLoader", lora_name=_file(path), strength_model=strength, strength_clip=strength, model=parts[0],
            clip=parts[1],
        )  # fmt: skip
        parts = [lora, 0], [lora, 1]
    positive, negative = (
        [node("CLIPTextEncode", text=_escaped(text), clip=parts[1]), 0]
        for text in (request.prompt, request.negative_prompt)
    )
    for one in request.controls:
        network = node("ControlNetLoader", control_net_name=_file(one.controlnet or one.kind))
        image = picture(one.image, meaning(one.kind).resample == "nearest")
        applied = node(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=[network, 0],
            image=[image, 0], strength=_constant(one), start_percent=one.window[0], end_percent=one.window[1],
        )  # fmt: skip
        positive, negative = [applied, 0], [applied, 1]
    if joined:
        rule = node("CounterpointFusion", positive=positive, negative=negative, fusion=request.fusion)
        positive, negative = [rule, 0], [rule, 1]
    if request.init_image:
        latent = node("VAEEncode", pixels=[picture(request.init_image), 0], vae=[loaded, 2])
        if request.inpaint_mask:
            mask = node("ImageToMask", image=[picture(request.inpaint_mask), 0], channel="red")
            latent = node("SetLatentNoiseMask", samples=[latent, 0], mask=[mask, 0])
    else:
        latent = node("EmptyLatentImage", width=width, height=height, batch_size=1)
    denoise = request.strength if request.init_image else 1.0
    sampler, _, settings = request.scheduler.partition(":")
    sampled = node(
        "KSampler", model=parts[0], positive=positive, negative=negative, latent_image=[latent, 0], seed=seed,
        steps=max(int(request.steps * denoise), 1),  # ComfyUI counts those that it makes, diffusers all of the schedule
        cfg=GUIDANCE if request.guidance_scale is None else request.guidance_scale,
        sampler_name=_SAMPLERS.get(sampler, "uni_pc"), scheduler="karras" if settings == _KARRAS else "normal",
        denoise=denoise,
    )  # fmt: skip
    decoded = node("VAEDecode", samples=[sampled, 0], vae=[loaded, 2])
    node("SaveImage", images=[decoded, 0], filename_prefix=f"seed-{seed}")
    left_out.append(f"the noise of seed {seed}: ComfyUI draws its own, so the picture will be another one")
    return Exported(json.dumps(nodes, indent=1) + "\n", tuple(left_out))


def _left_out_of_comfyui(request: GenerateRequest, model: _Model) -> list[str]:
    said = []
    sampler, _, settings = request.scheduler.partition(":")
    if sampler not in _SAMPLERS:
        said.append(f"the scheduler {sampler}: uni_pc in its place")
    if settings not in {"", _KARRAS}:
        said.append(f"what the scheduler is set to, {settings}")
    if request.compile:
        said.append("compiling: there are nodes for it")
    said += [f"the LoRA {source}: its clip strength is taken to be the same" for source in request.lora]
    if request.resize == "fit" and (request.controls or request.init_image):
        said.append("resizing by fit: what hangs over is cropped")
    if _size(request, model) is None:
        said.append(f"the size of pictures of {request.model}: {_SIDE} x {_SIDE}")
    if not model.single:
        said.append(f"the model {request.model}: ComfyUI wants one file, here called {_file(request.model)}")
    networks = [one.controlnet or one.kind for one in request.controls]
    folders = [_file(network) for network in networks if not network.endswith(".safetensors")]
    if folders:
        said.append(f"where the ControlNets are: as files that are called {', '.join(folders)}")
    return said


FORMS: dict[str, tuple[str, Callable[[GenerateRequest, int], Exported]]] = {
    "diffusers": (".py", to_diffusers),
    "comfyui": (".comfyui.json", to_comfyui),
}
"""Form -> suffix of its files, and what writes it from a request and the picture's seed."""


def _pipeline(request: GenerateRequest, model: _Model) -> str:
    task = "Inpaint" if request.inpaint_mask else "Img2Img" if request.init_image else ""
    layout, controlled = "XL" if model.large else "", "ControlNet" if request.controls else ""
    return f"StableDiffusion{layout}{controlled}{task}Pipeline"


def _size(request: GenerateRequest, model: _Model) -> tuple[int, int] | None:
    """Of the picture, if it is known."""
    width, height = request.width or model.side, request.height or model.side
    return None if width is None or height is None else (width, height)


def _form(source: str) -> str:
    return "single_file" if source.endswith(".safetensors") else "pretrained"


def _file(source: str) -> str:
    """What a file of ComfyUI's folders is called."""
    name = source.rstrip("/").rpartition("/")[2]
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


def _escaped(prompt: str) -> str:
    """Parentheses are ComfyUI's weights."""
    return unweighted(prompt).replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")


def _whole(seed: object) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(f"a seed is a whole number, got {seed!r}")
    return seed


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
        if one.steered:
            said.append(f"the push towards {one.label} as a probe reads it")
        if one.photo:
            said.append(f"how {one.image} becomes the condition image of {one.label}: extract it first")
    if request.gated:
        said.append("gating of silent regions")
    if request.subject or request.subject_mask:
        said.append("the subject, whose keys and values the controls would hear")
    if request.quality != "exact":
        said.append(f"the quality {request.quality}: everything is computed, and the picture differs a little")
    if request.aggregate:
        said.append(f"the aggregation of {', '.join(request.aggregate)} and its layout")
    for what, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        if unweighted(text) != text:
            said.append(f"the weights and parts of the {what}: every word counts the same")
    return tuple(said)
