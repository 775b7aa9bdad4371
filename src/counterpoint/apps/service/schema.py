"""What the service is asked and what it answers: images travel as base64, and no path of the server is ever named."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import PIL.Image
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import Module
from transformers import CLIPTokenizer

from counterpoint.apps.extractors import MODELS
from counterpoint.apps.request import ControlRequest, GenerateRequest, build
from counterpoint.apps.run import BASE
from counterpoint.conditions.image import decode_image
from counterpoint.conditions.layout import MOST_WEIGHT, parse_layout
from counterpoint.conditions.plain import PLAIN
from counterpoint.fusion import get_fusion
from counterpoint.models.load import locate
from counterpoint.sampling.controls import check_foreground
from counterpoint.sampling.prompt import plain_words, subject_places
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.types import CONTROL_KINDS, DEFAULT_FUSION, Image, UserError, kind_of

_ID = "4f1d0c7e9a3b48d2b6e5a1c09f7d3e82"
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
"""A black pixel, for examples."""
_FACTOR = 8
"""Pixels a latent, along each side, of every model that is offered."""
Base64 = Annotated[str, Field(max_length=64_000_000, description="An image file (PNG, JPEG, WebP) in base64.")]
_DATA_URL = re.compile(r"^data:image/[\w.+-]{1,40};base64,")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most.

    Attributes:
        body: bytes of a request.
        pixels: width times height of a picture, also of one that is sent; all that are sent may have as many as one
            for each control that is allowed, and one more.
        controls: of a request; there may be as many subject masks.
        steps: of a request.
        images: of a request.
        queue: jobs that wait or run, of all users.
        queue_each: of one user.
        seconds: that a job may take, by estimate and by the clock.
    """

    body: int = 32_000_000
    pixels: int = 4_194_304
    controls: int = 8
    steps: int = 150
    images: int = 8
    queue: int = 256
    queue_each: int = 64
    seconds: float = 600.0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Control(_Strict):
    """One control of a job."""

    label: str = Field(
        description="pose, depth, seg, canny, hed, ... or kind:name for a second of a kind.", max_length=80
    )
    image: Base64
    photo: bool = Field(False, description="Whether the image is a photo from which the condition is extracted first.")
    weight: Annotated[str, Field(max_length=400)] | float = Field(
        "1", description="A number, or a schedule such as 0:1,0.5:0.4."
    )
    window: tuple[float, float] = (0.0, 1.0)
    mask: Base64 | None = None
    mode: Literal["balanced", "prompt", "control"] = "balanced"


class JobIn(_Strict):
    """What a picture should be."""

    prompt: str = Field(max_length=4000)
    negative_prompt: str = Field("", max_length=4000)
    model: str = Field("tiny", max_length=200, description="One of GET /v1/models.")
    controls: list[Control] = Field(default_factory=list, max_length=64)
    fusion: str = Field(DEFAULT_FUSION, max_length=200)
    gate_silence: bool | None = Field(
        None, description="Default where controls meet, but not under sum and minimal-impact."
    )
    foreground: list[str] = Field(default_factory=list, max_length=64)
    subject: list[str] = Field(default_factory=list, max_length=64)
    subject_mask: list[Base64] = Field(default_factory=list, max_length=64)
    layout: dict[str, Any] | None = Field(None, description="Instances, interactions and a reference in base64.")
    aggregate: list[str] = Field(default_factory=list, max_length=8)
    aggregation: str = Field("", max_length=400)
    scheduler: str | None = Field(None, max_length=100)
    quality: Literal["exact", "balanced", "fast"] = Field(
        "exact",
        description="Whether a part of the controls is foretold within a bound of its estimated error, and guidance "
        "computed at some of the steps, to be faster.",
    )
    steps: int = Field(20, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    seed: int = Field(0, ge=0, lt=2**63)
    n: int = Field(1, ge=1, le=64)
    width: int | None = Field(None, ge=8, le=8192)
    height: int | None = Field(None, ge=8, le=8192)
    resize: Literal["fill", "fit", "stretch"] = "fill"
    init_image: Base64 | None = None
    strength: float = Field(0.8, gt=0, le=1)
    inpaint_mask: Base64 | None = None

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompt": "a photo of a red ball on a meadow", "steps": 20, "seed": 7},
                {
                    "prompt": "a person on a meadow",
                    "controls": [{"label": "pose", "image": _PIXEL, "weight": 0.8, "window": [0, 0.6]}],
                    "fusion": "pix",
                },
            ]
        },
    )


class Problem(BaseModel):
    """Why a request is refused: in a line, or where its JSON is wrong, each place with its own."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"detail": "width: 100 is no multiple of 8"}]})

    detail: str | list[dict[str, Any]]


class Accepted(BaseModel):
    """A job that was queued."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"id": _ID, "state": "queued", "estimated_seconds": 12.5, "waiting_seconds": 3.0}]
        }
    )

    id: str
    state: str
    estimated_seconds: float
    waiting_seconds: float


class JobOut(BaseModel):
    """A job as it is now; times are seconds since the epoch, each of ``images`` has its ``seed``, what the safety
    checker said of it, and the seconds that it took."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": _ID,
                    "state": "done",
                    "step": 20,
                    "steps": 20,
                    "created": 1790000000.0,
                    "started": 1790000003.0,
                    "ended": 1790000015.0,
                    "reason": "",
                    "images": [{"seed": 7, "safety": "unchecked", "seconds": 11.4}],
                }
            ]
        }
    )

    id: str
    state: Literal["queued", "running", "done", "cancelled", "failed"]
    step: int
    steps: int
    created: float
    started: float | None
    ended: float | None
    reason: str
    images: list[dict[str, Any]]


class ExtractIn(_Strict):
    """A photo and the kind of condition image that it should become."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"kind": "canny", "image": _PIXEL}]})

    kind: str = Field(max_length=80, description=f"One of {', '.join(sorted(PLAIN))}; or depth and seg of scenes.")
    image: Base64


def decode(content: str, name: str, limits: Limits) -> Image:
    """An image from base64, or from a data URL as browsers write them.

    Raises:
        UserError: it is none, or too large; nothing too large is decoded.
    """
    try:
        raw = base64.b64decode(_DATA_URL.sub("", content, count=1), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{name} is not base64") from None
    return decode_image(raw, name, limits.pixels)


@dataclass(frozen=True, eq=False)
class Checked:
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


def check(
    job: JobIn, models: Mapping[str, str], sizes: Mapping[str, int], limits: Limits, device: Mapping[str, object]
) -> Checked:
    """Hold a job against the limits before anything is done for it.

    Args:
        job: what was asked.
        models: name -> where the model is.
        sizes: model -> side of its pictures.
        limits: of this service.
        device: ``device``, ``dtype`` and ``compile`` of this service.

    Raises:
        UserError: the first thing that is wrong.
    """
    if job.model not in models:
        raise UserError(f"unknown model {job.model!r}; there are {', '.join(models)}")
    _check_limits(job, sizes[job.model], limits)
    _check_parts(job, models[job.model])
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
    layout = None if job.layout is None else _layout(job.layout, kept)
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
    return Checked(request, files, layout)


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
        if kinds and kind_of(one.label) in CONTROL_KINDS and kind_of(one.label) not in kinds:
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


def _layout(content: dict[str, Any], kept: Any) -> dict[str, Any]:
    """A layout whose reference names files of the job's folder, checked as a file would be."""
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        parse_layout({key: value for key, value in content.items() if key != "reference"}, Path())
    except UserError:
        raise
    except (ValueError, OverflowError, RecursionError):
        raise UserError("layout: it holds a number or a character that there is not, or is nested too deeply") from None
    reference = content.get("reference")
    if reference is None:
        return content
    if isinstance(reference, str):
        reference = {"image": reference}
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
    names = {"image": str(kept(reference["image"], "reference"))}
    if "mask" in reference:
        names["mask"] = str(kept(reference["mask"], "reference-mask"))
    return {**content, "reference": {**reference, **names}}


def extractable(kind: str) -> str:
    """A kind that photos become without a model.

    Raises:
        UserError: it is none.
    """
    if kind not in PLAIN:
        more = f"; {kind} needs a model" if kind in MODELS else ""
        raise UserError(f"nothing here makes {kind!r}; there are {', '.join(sorted(PLAIN))}{more}")
    return kind
