"""What a job is held against before it is queued: limits and the model's parts first, images last."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import PIL.Image
from torch.nn import Module
from transformers import CLIPTokenizer

from counterpoint.apps.request import ControlRequest, GenerateRequest, build
from counterpoint.apps.run import BASE
from counterpoint.apps.service.schema import JobIn, Limits, decode
from counterpoint.conditions.layout import MOST_WEIGHT, parse_layout
from counterpoint.fusion import get_fusion
from counterpoint.models.adapter import adapter_kind, check_told
from counterpoint.models.gligen import INSTANCES
from counterpoint.models.load import locate
from counterpoint.sampling.controls import check_foreground
from counterpoint.sampling.prompt import plain_words, subject_places
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.types import Image, UserError, kind_of

_FACTOR = 8
"""Pixels a latent, along each side, of every model that is offered."""
_LAYOUT = 20_000
"""Bytes of a layout beside its reference: many more than as many things as adapters read need."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A request that may be queued: what the worker is told, and the files that go with it."""

    request: GenerateRequest
    files: Mapping[str, Image] = field(default_factory=dict)
    layout: dict[str, Any] | None = None

    def write(self, folder: Path) -> GenerateRequest:
        """Put the files into a job's folder; the request that names them there."""
        folder.mkdir(parents=True)
        for name, picture in self.files.items():
            PIL.Image.fromarray(picture).save(folder / name)
        if self.layout is not None:
            (folder / "layout.json").write_text(json.dumps(self.layout))
        return self.request.inside(folder)


def check(job: JobIn, models: Mapping[str, str], sizes: Mapping[str, int], limits: Limits) -> None:
    """Hold a job against the limits and its model, before anything is done for it and any image is looked at.

    Args:
        job: what was asked.
        models: name -> where the model is.
        sizes: model -> side of its pictures.
        limits: of this service.

    Raises:
        UserError: the first thing that is wrong.
    """
    if job.model not in models:
        raise UserError(f"unknown model {job.model!r}; there are {', '.join(models)}")
    _check_limits(job, sizes[job.model], limits)
    _check_parts(job, models[job.model])
    if job.layout is not None:
        _check_layout(job.layout)
    kinds = [_adapter_kind(models[job.model], name) for name in job.aggregate if name != BASE]
    layout = job.layout or {}
    check_told(kinds, job.layout is not None, bool(layout.get("instances")), layout.get("reference") is not None)


def opened(job: JobIn, models: Mapping[str, str], limits: Limits, device: Mapping[str, object]) -> Opened:
    """Decode the images of a job that was checked.

    Args:
        job: what was asked.
        models: name -> where the model is.
        limits: of this service.
        device: ``device``, ``dtype`` and ``compile`` of this service.

    Raises:
        UserError: the first thing that is wrong.
    """
    files: dict[str, Image] = {}
    budget = (limits.controls + 1) * limits.pixels

    def kept(content: str | None, name: str) -> Path | None:
        if content is None:
            return None
        files[f"{name}.png"] = decode(content, name, limits)
        if sum(one.shape[0] * one.shape[1] for one in files.values()) > budget:
            raise UserError(f"the images of this request have more than {budget:,} pixels together")
        return Path(f"{name}.png")

    controls = tuple(
        build(
            ControlRequest,
            label=one.label,
            image=kept(one.image, f"control-{number}"),
            photo=one.photo,
            weight=one.weight,
            window=one.window,
            mask=kept(one.mask, f"mask-{number}"),
            mode=one.mode,
        )
        for number, one in enumerate(job.controls)
    )
    layout = None if job.layout is None else _opened_layout(job.layout, kept)
    given = job.model_dump(
        exclude={"controls", "init_image", "inpaint_mask", "subject_mask", "layout", "scheduler", "model"}
    )
    request = build(
        GenerateRequest,
        **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()},
        **device,
        model=models[job.model],
        scheduler=job.scheduler or ("ddim" if job.aggregate else "unipc"),
        controls=controls,
        subject_mask=tuple(kept(one, f"subject-{number}") for number, one in enumerate(job.subject_mask)),
        init_image=kept(job.init_image, "start"),
        inpaint_mask=kept(job.inpaint_mask, "repaint"),
        layout=None if layout is None else Path("layout.json"),
    )
    return Opened(request, files, layout)


def _check_limits(job: JobIn, side: int, limits: Limits) -> None:
    width, height = job.width or side, job.height or side
    for what, value, most in (
        ("controls", len(job.controls), limits.controls),
        ("subject_mask", len(job.subject_mask), limits.controls),
        ("steps", job.steps, limits.steps),
        ("n", job.n, limits.images),
        ("width times height", width * height, limits.pixels),
    ):
        if value > most:
            raise UserError(f"{what}: {value:,} are more than this service allows, {most:,}")
    for what, value in (("width", job.width), ("height", job.height)):
        if value is not None and value % _FACTOR:
            raise UserError(f"{what}: {value} is no multiple of {_FACTOR}")


def _check_parts(job: JobIn, source: str) -> None:
    """Hold what a job names against what its model has."""
    if job.scheduler is not None:
        make_scheduler(job.scheduler, {})
    adapters, kinds, networks = _parts(source)
    for name in job.aggregate:
        if name not in adapters:
            raise UserError(f"aggregate: {name!r} is no name of an adapter; {job.model} has {', '.join(adapters)}")
    for one in job.controls:
        if kinds and kind_of(one.label) not in kinds:
            raise UserError(f"{job.model} has no control {kind_of(one.label)!r}; it has {', '.join(kinds)}")
    if job.controls and not kinds and len(job.controls) != networks:
        raise UserError(
            f"controls: {job.model} has {networks} ControlNets, for as many controls, not {len(job.controls)}"
        )
    told = len(job.subject_mask or job.subject)
    check_foreground(get_fusion(job.fusion), {one.label: Module() for one in job.controls}, job.foreground, told)
    if job.subject and (tokenizer := _tokenizer(source)) is not None:
        for words in job.subject:
            subject_places(tokenizer, plain_words(job.prompt), words)


@lru_cache(maxsize=64)
def _parts(source: str) -> tuple[list[str], list[str], int]:
    """A model's adapters, its ControlNets by kind, and how many it has in order if it has none by kind."""
    path = locate(source)
    folder = path.parent if path.is_file() else path
    adapters, kinds = (
        sorted(one.name for one in (folder / part).iterdir()) if (folder / part).is_dir() else []
        for part in ("adapters", "controls")
    )
    return [BASE, *adapters], kinds, len([one for one in folder.glob("controlnet*") if one.is_dir()])


@lru_cache(maxsize=8)
def _tokenizer(source: str) -> CLIPTokenizer | None:
    """What reads a model's prompts first; a single file has none beside it."""
    folder = locate(source) / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True) if folder.is_dir() else None


@lru_cache(maxsize=64)
def _adapter_kind(source: str, name: str) -> str:
    return adapter_kind(locate(source) / "adapters" / name)


def _check_layout(content: dict[str, Any]) -> None:
    """As a file would be, but for what the images of its reference hold."""
    said = {key: value for key, value in content.items() if key != "reference"}
    for part in ("instances", "interactions"):
        if isinstance(listed := said.get(part), list) and len(listed) > INSTANCES:
            raise UserError(f"the layout has {len(listed):,} {part}; adapters read {INSTANCES}")
    try:
        if len(json.dumps(said, ensure_ascii=False, allow_nan=False).encode()) > _LAYOUT:
            raise UserError(f"a layout may have {_LAYOUT:,} bytes beside its reference")
        parse_layout(said, Path())
        reference = _reference(content)
        json.dumps(reference, ensure_ascii=False, allow_nan=False).encode()
    except UserError:
        raise
    except (ValueError, OverflowError, RecursionError):
        raise UserError("layout: it holds a number or a character that there is not, or is nested too deeply") from None
    if reference is None:
        return
    if (
        not isinstance(reference, dict)
        or not all(isinstance(reference.get(key, ""), str) for key in ("image", "mask"))
        or "image" not in reference
        or not set(reference) <= {"image", "weight", "mask"}
    ):
        raise UserError("the reference of a layout is an image in base64, or an object with image, weight and mask")
    weight = reference.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MOST_WEIGHT:
        raise UserError(f"the weight of a reference is a number in 0..{MOST_WEIGHT:g}, got {json.dumps(weight)}")


def _reference(content: dict[str, Any]) -> Any:
    """Of a layout: an object, also where the image stands alone."""
    reference = content.get("reference")
    return {"image": reference} if isinstance(reference, str) else reference


def _opened_layout(content: dict[str, Any], kept: Callable[[str, str], Path | None]) -> dict[str, Any]:
    """A layout whose reference names files of the job's folder."""
    if (reference := _reference(content)) is None:
        return content
    names = {"image": str(kept(reference["image"], "reference"))}
    if "mask" in reference:
        names["mask"] = str(kept(reference["mask"], "reference-mask"))
    return {**content, "reference": {**reference, **names}}
