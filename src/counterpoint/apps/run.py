"""Carrying a request out: read its images, load its models, sample, decode."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch

from counterpoint.api import aggregate, load
from counterpoint.apps.extractors import extractor
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.conditions.image import Fit, read_image, resize
from counterpoint.conditions.layout import Layout, read_layout
from counterpoint.conditions.plain import Extract
from counterpoint.conditions.recognise import check_picture
from counterpoint.sampling.amdm import Aggregation
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.report import Report
from counterpoint.types import Image, UserError

BASE = "base"
"""Among aggregated models, the one without an adapter."""
Listener = Callable[[int, int], None]
"""``(steps done, steps in all)``."""


@dataclass(frozen=True)
class Result:
    """Pictures with their seeds, the control images as the networks saw them, the seconds that sampling took, the
    pipeline that did it, the request with its model's defaults filled in, its layout, and who won where if that was
    asked."""

    images: list[PIL.Image.Image]
    seeds: list[int]
    controls: dict[str, Image]
    seconds: float
    pipe: Pipeline
    request: GenerateRequest
    layout: Layout | None = None
    report: Report | None = None


def load_for(request: GenerateRequest) -> Pipeline:
    """The pipeline that a request asks for."""
    named = {control.label: control.controlnet for control in request.controls if control.controlnet}
    labels = [control.label for control in request.controls]
    if named and len(named) < len(labels):
        raise UserError(f"--controlnet is given for {', '.join(named)} only; name one for each control or for none")
    pipe = load(
        request.model,
        named or labels,
        scheduler=request.scheduler,
        lora=request.lora,
        config=request.config,
        device=request.device,
        dtype=request.dtype,
    )
    return several(pipe, request.aggregate, request.aggregation)


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


def run(
    request: GenerateRequest, pipe: Pipeline | None = None, *, listen: Listener | None = None, report: bool = False
) -> Result:
    """Carry out a request.

    Args:
        request: what to do.
        pipe: its pipeline, if it is loaded already.
        listen: hears every step.
        report: whether to note which control was heard where.

    Raises:
        UserError: an image, model or setting is wrong.
    """
    # Images before models: a wrong path should not cost a minute.
    pictures = [read_image(control.image) for control in request.controls]
    extract = {
        control.label: extractor(control.kind, control.extractor, request.model)
        for control in request.controls
        if control.photo
    }
    start = None if request.init_image is None else read_image(request.init_image)
    mask = None if request.inpaint_mask is None else read_image(request.inpaint_mask)
    subjects = [read_image(path) for path in request.subject_mask]
    layout = None if request.layout is None else read_layout(request.layout)
    regions = [None if control.mask is None else read_image(control.mask) for control in request.controls]
    pipe = pipe or load_for(request)
    if request.guidance_scale is None:
        request = request.model_copy(update={"guidance_scale": pipe.guidance_scale})
    width, height = request.width or pipe.native_size, request.height or pipe.native_size
    controls = {
        control.label: _prepared(control, picture, width, height, request.resize, extract.get(control.label))
        for control, picture in zip(request.controls, pictures, strict=True)
    }
    for control, picture in zip(request.controls, pictures, strict=True):
        check_picture(str(control.image), picture, control.kind, photo=control.photo)
    seeds = [request.seed + i for i in range(request.n)]

    def heard(_: Pipeline, index: int, *__: Any) -> None:
        if listen is not None:
            listen(index + 1, pipe.scheduler.num_inference_steps)

    def sized(picture: Image) -> PIL.Image.Image:
        return PIL.Image.fromarray(resize(picture, width, height, request.resize))

    began = time.perf_counter()
    output = pipe(
        request.prompt,
        [PIL.Image.fromarray(picture) for picture in controls.values()],
        image=None if start is None else sized(start),
        mask_image=None if mask is None else sized(mask),
        strength=request.strength,
        width=width,
        height=height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        negative_prompt=request.negative_prompt,
        num_images_per_prompt=request.n,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        fusion=request.fusion,
        foreground=request.foreground,
        subject=request.subject,
        subject_mask=[sized(one) for one in subjects] or None,
        controlnet_conditioning_scale=[control.weight for control in request.controls],
        control_guidance_start=[control.window[0] for control in request.controls],
        control_guidance_end=[control.window[1] for control in request.controls],
        control_mask=[None if region is None else sized(region) for region in regions],
        control_mode=[control.mode for control in request.controls],
        gate_silence=request.gate_silence,
        layout=layout,
        report=report,
        callback_on_step_end=heard,
    )
    return Result(output.images, seeds, controls, time.perf_counter() - began, pipe, request, layout, output.report)


def image_hashes(controls: dict[str, Image]) -> dict[str, str]:
    """Label -> SHA-256 of the pixels a network saw."""
    return {
        label: hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()
        for label, picture in controls.items()
    }


def _prepared(
    control: ControlRequest, picture: Image, width: int, height: int, rule: Fit, extract: Extract | None
) -> Image:
    if extract is None:
        return resize(picture, width, height, rule, control.kind)
    return extract(resize(picture, width, height, rule))
