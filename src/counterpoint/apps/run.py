"""Carrying a request out: read its images, load its models, sample, decode."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from counterpoint.api import aggregate, load
from counterpoint.apps.extractors import extractor
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.conditions.image import read_image, resize
from counterpoint.conditions.layout import Layout, read_layout
from counterpoint.conditions.plain import Extract
from counterpoint.conditions.recognise import check_picture
from counterpoint.control.reuse import Thrift
from counterpoint.fusion import get_fusion
from counterpoint.sampling.amdm import Aggregation
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.report import Report
from counterpoint.types import Image

BASE = "base"
"""Among aggregated models, the one without an adapter."""
Listener = Callable[[int, int], None]
"""``(steps done, steps in all)``."""
Look = Callable[[int, Tensor], None]
"""``(step, its latents)``; what it raises ends the sampling."""


@dataclass(frozen=True)
class Result:
    """Pictures with their seeds, the control images as the networks saw them, the seconds that sampling took, the
    pipeline that did it, the request with its model's defaults filled in, its layout, who won where if that was asked,
    how many pictures were made at once, and what each model foretold in place of computing it."""

    images: list[PIL.Image.Image]
    seeds: list[int]
    controls: dict[str, Image]
    seconds: float
    pipe: Pipeline
    request: GenerateRequest
    layout: Layout | None = None
    report: Report | None = None
    batch: int = 1
    thrift: tuple[Mapping[str, Thrift], ...] = ()


def load_for(request: GenerateRequest, residency: str = "all") -> Pipeline:
    """The pipeline that a request asks for, of which so much stays in memory."""
    pipe = load(
        request.model,
        {control.label: control.controlnet for control in request.controls},
        probes={control.label: control.probe for control in request.controls if control.probe},
        scheduler=request.scheduler,
        lora=request.lora,
        config=request.config,
        device=request.device,
        dtype=request.dtype,
        residency=residency,
        compile=request.compile,
    )
    return several(pipe, request.aggregate, request.aggregation)


def model_key(request: GenerateRequest) -> str:
    """What decides which networks are loaded."""
    controls = [(one.label, one.controlnet, one.probe) for one in request.controls]
    return json.dumps(
        [
            request.model,
            request.config,
            request.lora,
            controls,
            request.scheduler,
            request.aggregate,
            request.aggregation,
            request.device,
            request.dtype,
            request.compile,
        ]
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory; of a CPU and some other devices torch says so in words alone."""
    said = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def free_memory() -> None:
    """Give back what a failed attempt had: tensors in reference cycles, and what CUDA keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class OneModel:
    """The pipeline of the latest request: another one's is let go before its own is loaded."""

    def __init__(self) -> None:
        self.key, self.pipe = "", None

    def of(self, request: GenerateRequest) -> Pipeline:
        """The pipeline that a request asks for.

        Raises:
            UserError: it does not load.
        """
        if self.pipe is None or self.key != model_key(request):
            self.pipe = None
            self.pipe, self.key = load_for(request), model_key(request)
        return self.pipe

    def forget(self) -> None:
        """Let it go."""
        self.pipe = None
        free_memory()


def several(pipe: Pipeline, names: Sequence[str], aggregation: str = "") -> Pipeline:
    """A model as it is, with an adapter, or with several that are aggregated; controls are the first one's.

    Args:
        pipe: the model.
        names: adapters as :meth:`~counterpoint.sampling.pipeline.Pipeline.adapted` takes them, or :data:`BASE`.
        aggregation: as :meth:`~counterpoint.sampling.amdm.Aggregation.parse` reads it.

    Raises:
        UserError: there is no such adapter, or the settings make no sense.
    """
    models = [pipe if name == BASE else pipe.adapted(name) for name in names]
    if len(models) < 2:
        return models[0] if models else pipe
    helpers = [replace(model, controls={}) for model in models[1:]]
    return aggregate([models[0], *helpers], **asdict(Aggregation.parse(aggregation)))


@dataclass(frozen=True, eq=False)
class Opened:
    """A request with everything read that it names: nothing is missing, and no model is loaded yet."""

    request: GenerateRequest
    pictures: list[Image]
    extract: dict[str, Extract]
    start: Image | None
    mask: Image | None
    subjects: list[Image]
    regions: list[Image | None]
    layout: Layout | None


def open_request(request: GenerateRequest) -> Opened:
    """Read a request's images before its models: a wrong path should not cost a minute.

    Raises:
        UserError: one is missing or damaged, or nothing extracts what a photo is to become.
    """
    return Opened(
        request,
        [read_image(control.image) for control in request.controls],
        {
            control.label: extractor(control.kind, control.extractor, request.model)
            for control in request.controls
            if control.photo
        },
        None if request.init_image is None else read_image(request.init_image),
        None if request.inpaint_mask is None else read_image(request.inpaint_mask),
        [read_image(path) for path in request.subject_mask],
        [None if control.mask is None else read_image(control.mask) for control in request.controls],
        None if request.layout is None else read_layout(request.layout),
    )


def alike(request: GenerateRequest) -> str:
    """What requests of one batch share: everything but prompts, seeds, images, masks, weights, windows and layouts; and
    of a rule that lends keys the weights and windows too, since it knows one schedule."""
    own = {"prompt", "negative_prompt", "seed", "n", "controls", "init_image", "inpaint_mask", "layout"}
    shared = request.model_dump(mode="json", include=set(GenerateRequest.model_fields) - own)
    keyed = get_fusion(request.fusion).keys is not None
    controls = [
        (
            one.label,
            one.controlnet,
            one.probe,
            one.steer,
            one.mode,
            one.mask is None,
            (one.weight, one.window) if keyed else None,
        )
        for one in request.controls
    ]
    pictures = (request.init_image is None, request.inpaint_mask is None, request.layout is None)
    return json.dumps([shared, controls, pictures])


def run(
    request: GenerateRequest,
    pipe: Pipeline | None = None,
    *,
    listen: Listener | None = None,
    look: Look | None = None,
    report: bool = False,
) -> Result:
    """Carry out a request.

    Args:
        request: what to do.
        pipe: its pipeline, if it is loaded already.
        listen: hears every step.
        look: sees every step.
        report: whether to note which control was heard where.

    Raises:
        UserError: an image, model or setting is wrong.
    """
    opened = open_request(request)
    return run_together([opened], pipe or load_for(request), listen=listen, look=look, report=report)[0]


def run_together(
    several: Sequence[Opened],
    pipe: Pipeline,
    *,
    listen: Listener | None = None,
    look: Look | None = None,
    report: bool = False,
) -> list[Result]:
    """Carry out one request, or several that are :func:`alike` and want one picture each, as one batch.

    Args:
        several: the requests.
        pipe: their pipeline.
        listen: hears every step.
        look: sees every step.
        report: whether to note which control was heard where; of one request only.

    Raises:
        UserError: a setting is wrong.
    """
    first = several[0].request
    width, height = first.width or pipe.native_size, first.height or pipe.native_size
    guidance = pipe.guidance_scale if first.guidance_scale is None else first.guidance_scale
    controls = [conditions(one, width, height) for one in several]
    seeds = [[one.request.seed + i for i in range(one.request.n)] for one in several]

    def heard(_: Pipeline, index: int, __: Tensor, state: dict[str, Tensor]) -> None:
        if listen is not None:
            listen(index + 1, pipe.num_timesteps)
        if look is not None:
            look(index, state["latents"])

    def sized(pictures: Sequence[Image | None]) -> Any:
        made = [PIL.Image.fromarray(resize(one, width, height, first.resize)) for one in pictures if one is not None]
        return (made[0] if len(several) == 1 else made) if made else None

    def settings(read: Callable[[ControlRequest], Any]) -> list[Any]:
        rows = [[read(one) for one in each] for each in zip(*(one.request.controls for one in several), strict=True)]
        return [row[0] if len(set(row)) == 1 else row for row in rows]

    began = time.perf_counter()
    output = pipe(
        [one.request.prompt for one in several],
        [[PIL.Image.fromarray(one[control.label]) for one in controls] for control in first.controls],
        image=sized([one.start for one in several]),
        mask_image=sized([one.mask for one in several]),
        strength=first.strength,
        width=width,
        height=height,
        num_inference_steps=first.steps,
        guidance_scale=guidance,
        negative_prompt=[one.request.negative_prompt or None for one in several],
        num_images_per_prompt=first.n if len(several) == 1 else 1,
        generator=[torch.Generator().manual_seed(seed) for mine in seeds for seed in mine],
        fusion=first.fusion,
        foreground=first.foreground,
        subject=first.subject,
        subject_mask=[PIL.Image.fromarray(resize(one, width, height, first.resize)) for one in several[0].subjects]
        or None,
        controlnet_conditioning_scale=settings(lambda one: one.weight),
        control_guidance_start=settings(lambda one: one.window[0]),
        control_guidance_end=settings(lambda one: one.window[1]),
        control_mask=[sized(masks) for masks in zip(*(one.regions for one in several), strict=True)],
        control_mode=[control.mode for control in first.controls],
        readout_guidance_scale=[control.steer for control in first.controls],
        gate_silence=first.gate_silence,
        layout=[one.layout for one in several for _ in range(one.request.n)] if several[0].layout else None,
        quality=first.quality,
        report=report,
        callback_on_step_end=heard,
    )
    seconds = (time.perf_counter() - began) / len(several)
    images = iter(output.images)
    return [
        Result(
            [next(images) for _ in mine],
            mine,
            shown,
            seconds,
            pipe,
            one.request.model_copy(update={"guidance_scale": guidance}),
            one.layout,
            output.report,
            len(several) * first.n,
            output.thrift,
        )
        for one, mine, shown in zip(several, seeds, controls, strict=True)
    ]


def image_hashes(controls: dict[str, Image]) -> dict[str, str]:
    """Label -> SHA-256 of the pixels a network saw."""
    return {
        label: hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()
        for label, picture in controls.items()
    }


def conditions(opened: Opened, width: int, height: int) -> dict[str, Image]:
    """Label -> condition image, as its network sees it; what looks like something else is warned about."""
    made = {}
    for control, picture in zip(opened.request.controls, opened.pictures, strict=True):
        check_picture(str(control.image), picture, control.kind, photo=control.photo)
        extract, rule = opened.extract.get(control.label), opened.request.resize
        if extract is None:
            made[control.label] = resize(picture, width, height, rule, control.kind)
        else:
            made[control.label] = extract(resize(picture, width, height, rule))
    return made
