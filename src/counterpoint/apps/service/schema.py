"""What the service is asked and what it answers: images travel as base64, and no path of the server is ever named."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from counterpoint.apps.extractors import MODELS
from counterpoint.conditions.image import decode_image
from counterpoint.conditions.plain import PLAIN
from counterpoint.types import DEFAULT_FUSION, Image, UserError

_ID = "4f1d0c7e9a3b48d2b6e5a1c09f7d3e82"
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
"""A black pixel, for examples."""
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
    model: str = Field("", max_length=200, description="One of GET /v1/models; default the first.")
    controls: list[Control] = Field(default_factory=list, max_length=64)
    fusion: str = Field(DEFAULT_FUSION, max_length=200)
    gate_silence: bool | None = Field(
        None, description="Default where controls meet, but not under sum and minimal-impact."
    )
    foreground: list[Annotated[str, Field(max_length=80)]] = Field(default_factory=list, max_length=64)
    subject: list[Annotated[str, Field(max_length=400)]] = Field(default_factory=list, max_length=64)
    subject_mask: list[Base64] = Field(default_factory=list, max_length=64)
    layout: dict[str, Any] | None = Field(None, description="Instances, interactions and a reference in base64.")
    aggregate: list[Annotated[str, Field(max_length=200)]] = Field(default_factory=list, max_length=8)
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
    width: int | None = Field(None, ge=8, le=4096)
    height: int | None = Field(None, ge=8, le=4096)
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


def extractable(kind: str) -> str:
    """A kind that photos become without a model.

    Raises:
        UserError: it is none.
    """
    if kind not in PLAIN:
        more = f"; {kind} needs a model" if kind in MODELS else ""
        raise UserError(f"nothing here makes {kind!r}; there are {', '.join(sorted(PLAIN))}{more}")
    return kind
