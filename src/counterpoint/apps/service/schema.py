"""What the service is asked and what it answers: images travel as base64, and no path of the server is ever named."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import PIL.Image
from pydantic import BaseModel, ConfigDict, Field

from counterpoint.apps.extractors import MODELS
from counterpoint.apps.request import ControlRequest, GenerateRequest, build
from counterpoint.conditions.image import decode_image
from counterpoint.conditions.layout import parse_layout
from counterpoint.conditions.plain import PLAIN
from counterpoint.types import Image, UserError

_FACTOR = 8
"""Pixels a latent, along each side, of every model that is offered."""
Base64 = Annotated[str, Field(max_length=64_000_000, description="An image file (PNG, JPEG, WebP) in base64.")]


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most.

    Attributes:
        body: bytes of a request.
        pixels: width times height of a picture, also of one that is sent.
        controls: of a request.
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
    weight: str = Field("1", description="A number, or a schedule such as 0:1,0.5:0.4.", max_length=400)
    window: tuple[float, float] = (0.0, 1.0)
    mask: Base64 | None = None
    mode: Literal["balanced", "prompt", "control"] = "balanced"


class JobIn(_Strict):
    """What a picture should be."""

    prompt: str = Field(max_length=4000)
    negative_prompt: str = Field("", max_length=4000)
    model: str = Field("tiny", max_length=200, description="One of GET /v1/models.")
    controls: list[Control] = Field(default_factory=list, max_length=64)
    fusion: str = Field("sum", max_length=200)
    gate_silence: bool = False
    foreground: list[str] = Field(default_factory=list, max_length=64)
    subject: list[str] = Field(default_factory=list, max_length=64)
    subject_mask: list[Base64] = Field(default_factory=list, max_length=64)
    layout: dict[str, Any] | None = Field(None, description="Instances, interactions and a reference in base64.")
    aggregate: list[str] = Field(default_factory=list, max_length=8)
    aggregation: str = Field("", max_length=400)
    scheduler: str | None = Field(None, max_length=100)
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
        json_schema_extra={"examples": [{"prompt": "a photo of a red ball on a meadow", "steps": 20, "seed": 7}]},
    )


class Accepted(BaseModel):
    """A job that was queued."""

    id: str
    state: str
    estimated_seconds: float
    waiting_seconds: float


class JobOut(BaseModel):
    """A job as it is now."""

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

    kind: str = Field(max_length=80, description=f"One of {', '.join(sorted(PLAIN))}; or depth and seg of scenes.")
    image: Base64


def decode(content: str, name: str, limits: Limits) -> Image:
    """An image from base64.

    Raises:
        UserError: it is none, or too large.
    """
    try:
        raw = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{name} is not base64") from None
    picture = decode_image(raw, name)
    if picture.shape[0] * picture.shape[1] > limits.pixels:
        raise UserError(f"{name} has {picture.shape[1]} x {picture.shape[0]} pixels; the limit is {limits.pixels:,}")
    return picture


@dataclass(frozen=True, eq=False)
class Checked:
    """A request that may be queued: what the worker is told, and the files that go with it."""

    request: GenerateRequest
    files: Mapping[str, Image] = field(default_factory=dict)
    layout: dict[str, Any] | None = None

    def write(self, folder: Path) -> GenerateRequest:
        """Put the files into a job's folder; the request that names them there."""
        import json

        folder.mkdir(parents=True)
        for name, picture in self.files.items():
            PIL.Image.fromarray(picture).save(folder / name)
        if self.layout is not None:
            (folder / "layout.json").write_text(json.dumps(self.layout))
        return self.request.inside(folder)


def check(
    job: JobIn, models: Mapping[str, str], sizes: Mapping[str, int], limits: Limits, device: Mapping[str, str]
) -> Checked:
    """Hold a job against the limits before anything is done for it.

    Args:
        job: what was asked.
        models: name -> where the model is.
        sizes: model -> side of its pictures.
        limits: of this service.
        device: ``device`` and ``dtype`` of this service.

    Raises:
        UserError: the first thing that is wrong.
    """
    if job.model not in models:
        raise UserError(f"unknown model {job.model!r}; there are {', '.join(models)}")
    side = sizes[job.model]
    width, height = job.width or side, job.height or side
    for what, value, most in (
        ("controls", len(job.controls), limits.controls),
        ("steps", job.steps, limits.steps),
        ("n", job.n, limits.images),
        ("width times height", width * height, limits.pixels),
    ):
        if value > most:
            raise UserError(f"{what}: {value:,} are more than this service allows, {most:,}")
    for what, value in (("width", job.width), ("height", job.height)):
        if value is not None and value % _FACTOR:
            raise UserError(f"{what}: {value} is no multiple of {_FACTOR}")
    for name in job.aggregate:
        if "/" in name or "\\" in name or name.startswith("."):
            raise UserError(f"aggregate: {name!r} is no name of an adapter")
    files: dict[str, Image] = {}

    def kept(content: str | None, name: str) -> Path | None:
        if content is None:
            return None
        files[f"{name}.png"] = decode(content, name, limits)
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


def _layout(content: dict[str, Any], kept: Any) -> dict[str, Any]:
    """A layout whose reference names files of the job's folder, checked as a file would be."""
    reference = content.get("reference")
    parse_layout({key: value for key, value in content.items() if key != "reference"}, Path())
    if reference is None:
        return content
    if isinstance(reference, str):
        reference = {"image": reference}
    if (
        not isinstance(reference, dict)
        or not all(isinstance(reference.get(key, ""), str) for key in ("image", "mask"))
        or "image" not in reference
    ):
        raise UserError("the reference of a layout is an image in base64, or an object with image, weight and mask")
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
