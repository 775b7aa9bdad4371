"""A request for images: what every edge turns a user's wishes into, and what a picture's recipe holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from counterpoint.types import CONTROL_KINDS, DEFAULT_FUSION, UserError, check_label, kind_of, known_kind


class Strict(BaseModel):
    """Frozen, no key is unknown, and every text can be written down."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _written(cls, value: object) -> object:
        for text in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("a text has half a character, which no file can hold")
        return value


class ControlRequest(Strict):
    """One control: ``label`` is its kind, or ``kind:name`` for a second of the kind."""

    label: str
    image: Path
    photo: bool = False
    extractor: str | None = None
    weight: str = "1"
    window: tuple[float, float] = (0.0, 1.0)
    controlnet: str | None = None
    mask: Path | None = None
    mode: Literal["balanced", "prompt", "control"] = "balanced"
    probe: str | None = None
    steer: str = "0"

    @property
    def kind(self) -> str:
        return kind_of(self.label)

    @property
    def steered(self) -> bool:
        return self.steer != "0"

    @field_validator("label")
    @classmethod
    def _label(cls, label: str) -> str:
        check_label(label)
        return label

    @model_validator(mode="after")
    def _extracted(self) -> Self:
        if self.photo:
            known_kind(self.kind)
        return self

    @field_validator("window")
    @classmethod
    def _ordered(cls, window: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= window[0] < window[1] <= 1:
            raise ValueError(f"a window is START:END with 0 <= START < END <= 1, got {window[0]:g}:{window[1]:g}")
        return window

    @field_validator("weight", "steer", mode="before")
    @classmethod
    def _weight(cls, weight: object) -> object:
        """A number or a schedule; what is neither is left for the type to refuse."""
        from counterpoint.control.weight import Weight

        known = isinstance(weight, (str, int, float)) and not isinstance(weight, bool)
        return str(Weight.parse(str(weight))) if known else weight


class GenerateRequest(Strict):
    """Everything that decides the pictures."""

    prompt: str
    negative_prompt: str = ""
    model: str = "tiny"
    config: str | None = None
    lora: tuple[str, ...] = ()
    controls: tuple[ControlRequest, ...] = ()
    fusion: str = DEFAULT_FUSION
    gate_silence: bool | None = None
    foreground: tuple[str, ...] = ()
    subject: tuple[str, ...] = ()
    subject_mask: tuple[Path, ...] = ()
    layout: Path | None = None
    aggregate: tuple[str, ...] = ()
    aggregation: str = ""
    scheduler: str = "unipc"
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance_scale: Annotated[float | None, Field(ge=0, le=100)] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    n: Annotated[int, Field(ge=1, le=64)] = 1
    width: Annotated[int | None, Field(ge=8, le=4096)] = None
    height: Annotated[int | None, Field(ge=8, le=4096)] = None
    resize: Literal["fill", "fit", "stretch"] = "fill"
    init_image: Path | None = None
    strength: Annotated[float, Field(gt=0, le=1)] = 0.8
    inpaint_mask: Path | None = None
    quality: Literal["exact", "balanced", "fast"] = "exact"
    device: str = "cpu"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: dict[str, object]) -> dict[str, object]:
        """What "auto" means here is written down, so that a recipe says what was used."""
        if isinstance(values, dict) and values.get("dtype") == "auto":
            from counterpoint.api import find_dtype

            return {**values, "dtype": find_dtype("auto", str(values.get("device", "cpu")))}
        return values

    @property
    def gated(self) -> bool:
        """Whether silence is gated, asked for or not."""
        from counterpoint.control.coverage import gates
        from counterpoint.control.weight import Weight
        from counterpoint.fusion import get_fusion

        speaking = [control.label for control in self.controls if Weight.parse(control.weight).speaks]
        return gates(self.gate_silence, get_fusion(self.fusion), speaking)

    @property
    def inputs(self) -> list[Path]:
        """The files that the pictures are made from."""
        pictures = [path for one in self.controls for path in (one.image, one.mask)]
        others = [self.init_image, self.inpaint_mask, self.layout, *self.subject_mask]
        return [path for path in (*pictures, *others) if path is not None]

    def inside(self, folder: Path) -> Self:
        """The same with the paths of its inputs counted from a folder."""
        controls = tuple(
            one.model_copy(
                update={"image": folder / one.image, "mask": None if one.mask is None else folder / one.mask}
            )
            for one in self.controls
        )
        single = {name: folder / path for name in ("init_image", "inpaint_mask", "layout")
                  if (path := getattr(self, name)) is not None}  # fmt: skip
        masks = tuple(folder / one for one in self.subject_mask)
        return self.model_copy(update={"controls": controls, "subject_mask": masks, **single})

    @field_validator("fusion")
    @classmethod
    def _fusion(cls, name: str) -> str:
        from counterpoint.fusion import get_fusion

        return get_fusion(name).name

    @field_validator("aggregation")
    @classmethod
    def _aggregation(cls, text: str) -> str:
        from counterpoint.sampling.amdm import Aggregation

        Aggregation.parse(text)
        return text

    @field_validator("lora", "foreground", "subject", "subject_mask", "aggregate", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    def _check_own(self, control: ControlRequest) -> None:
        """A kind that nobody knows may be the model's own."""
        from counterpoint.models.load import own_control

        if not own_control(Path(self.model), control.label).is_dir():
            known = f"{', '.join(CONTROL_KINDS)}, and any other whose controlnet is given"
            raise ValueError(f"unknown control {control.kind!r}; there are {known}")

    @field_validator("guidance_scale", "strength")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GenerateRequest:
        labels = [control.label for control in self.controls]
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise ValueError(
                f"two controls are called {min(twice)!r}; name the second one {kind_of(min(twice))}:SOMETHING"
            )
        for one in self.controls:
            if one.kind not in CONTROL_KINDS and one.controlnet is None:
                self._check_own(one)
        if self.subject and self.subject_mask:
            raise ValueError("a subject and a subject mask both say where the foreground is; give one of them")
        if self.aggregation and len(self.aggregate) < 2:
            raise ValueError("aggregation says how several models work together: name them with aggregate")
        if self.init_image is None:
            if self.inpaint_mask is not None:
                raise ValueError("an inpaint mask needs an init image, the picture to repaint")
            if self.strength != type(self).model_fields["strength"].default:
                raise ValueError("strength says how far an init image is noised, and there is none")
        return self


def build(kind: type[Strict], **values: object) -> Strict:
    """Make a request.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        message = first["msg"].removeprefix("Value error, ")
        spoken = message[:1].lower() + message[1:]
        if first["type"] == "missing":
            spoken = f"{place}: it is wanted"
        elif first["type"] == "extra_forbidden":
            inner = ControlRequest if len(first["loc"]) > 1 else kind
            spoken = f"{place}: {no_such_key(str(first['loc'][-1]), inner.model_fields)}"
        elif place and not message.startswith(("--", "a ", "two ", "unknown ")):
            spoken = f"--{place.replace('_', '-')}: {spoken.replace('tuple', 'list')}, got {first['input']!r}"
        raise UserError(spoken) from None


def no_such_key(key: str, known: Iterable[str]) -> str:
    """What is said of a key that a request does not have, with the nearest that it has."""
    near = get_close_matches(key, known)
    return f"there is no such key{f'; {near[0]}?' if near else ''}"
