"""What the page's fields say, and the requests that follow from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from counterpoint.apps.record import write_text, write_whole
from counterpoint.apps.request import ControlRequest, GenerateRequest, build
from counterpoint.conditions.layout import read_layout
from counterpoint.fusion import get_fusion
from counterpoint.types import DEFAULT_FUSION, Image, UserError

SLOTS = 4
"""Controls that the page has room for."""
GATES = {"as the rule has it": None, "silent": True, "heard": False}
"""What the page calls gating of silence -> what a request does."""


@dataclass(frozen=True)
class Offer:
    """What pictures are made with.

    Attributes:
        model: as ``generate`` takes it.
        size: of its pictures.
        guidance: its own.
        networks: kind -> ControlNet, besides the model's own.
        device: where it runs.
        dtype: of its numbers.
        compile: whether torch compiles its networks.
    """

    model: str
    size: int
    guidance: float
    networks: Mapping[str, str]
    device: str
    dtype: str
    compile: bool = False


@dataclass(frozen=True, eq=False)
class Slot:
    """One control's card; without a kind it is empty."""

    kind: str | None
    image: Image | None
    photo: bool
    weight: float
    start: float
    end: float
    mode: str
    mask: Image | None


@dataclass(frozen=True, eq=False)
class Form:
    """The whole page.

    ``boxes`` are rows ``(phrase, left, top, right, bottom)`` in 0..1, ``actions`` rows ``(subject, action, object)``
    that call boxes as :func:`called` does.
    """

    prompt: str
    negative_prompt: str
    slots: Sequence[Slot]
    fusions: Sequence[str]
    gate_silence: str
    foreground: str | None
    subject: Sequence[str]
    adapters: Sequence[str]
    boxes: Sequence[Sequence[object]]
    actions: Sequence[Sequence[object]]
    reference: Image | None
    scheduler: str
    quality: str
    steps: int
    guidance_scale: float
    seed: int
    n: int
    size: int


def requests(form: Form, folder: Path, offer: Offer) -> list[GenerateRequest]:
    """One request for each rule that is asked for, with the same seed.

    Args:
        form: the page.
        folder: where its pictures are kept, so that recipes can name them.
        offer: what the requests are for.

    Raises:
        UserError: something is missing or makes no sense.
    """
    if not form.prompt.strip():
        raise UserError("the prompt is empty: say what the picture shows")
    controls = tuple(
        build(
            ControlRequest,
            label=label,
            image=keep(slot.image, folder),
            photo=slot.photo,
            weight=f"{slot.weight:g}",
            window=(slot.start, slot.end),
            mode=slot.mode,
            mask=None if slot.mask is None else keep(slot.mask, folder),
            controlnet=offer.networks.get(str(slot.kind)),
        )
        for label, slot in labelled(form.slots).items()
    )
    made = []
    for name in form.fusions or [DEFAULT_FUSION]:
        lends = get_fusion(name).keys is not None and bool(form.subject)
        made.append(
            build(
                GenerateRequest,
                prompt=form.prompt,
                negative_prompt=form.negative_prompt,
                model=offer.model,
                controls=controls,
                fusion=name,
                gate_silence=GATES[form.gate_silence],
                foreground=(form.foreground,) if lends and form.foreground else (),
                subject=(" ".join(form.subject),) if lends else (),
                aggregate=tuple(form.adapters),
                layout=keep_layout(form.boxes, form.actions, form.reference, folder) if form.adapters else None,
                scheduler="ddim" if form.adapters else form.scheduler,
                quality=form.quality,
                steps=form.steps,
                guidance_scale=form.guidance_scale,
                seed=form.seed,
                n=form.n,
                width=form.size,
                height=form.size,
                device=offer.device,
                dtype=offer.dtype,
                compile=offer.compile,
            )
        )
    return made


def labelled(slots: Sequence[Slot]) -> dict[str, Slot]:
    """Label -> the cards that are in use; a second one of a kind is called ``kind:2``.

    Raises:
        UserError: one has a kind and no image.
    """
    found: dict[str, Slot] = {}
    for number, slot in enumerate(slots, 1):
        if not slot.kind:
            continue
        if slot.image is None:
            raise UserError(f"control {number} ({slot.kind}) has no image: upload or draw one, or set its kind to none")
        label, count = slot.kind, 2
        while label in found:
            label, count = f"{slot.kind}:{count}", count + 1
        found[label] = slot
    return found


def keep(picture: Image | None, folder: Path) -> Path:
    """Write a picture under a name that its pixels decide."""
    assert picture is not None
    pixels = np.ascontiguousarray(picture)
    path = folder / "inputs" / f"{hashlib.sha256(pixels.tobytes() + repr(pixels.shape).encode()).hexdigest()[:20]}.png"
    if not path.exists():
        write_whole(path, lambda file: PIL.Image.fromarray(pixels).save(file, "PNG"))
    return path.resolve()


def keep_layout(
    boxes: Sequence[Sequence[object]], actions: Sequence[Sequence[object]], reference: Image | None, folder: Path
) -> Path:
    """Write the boxes as a layout file, and hold it against what layouts can be.

    Raises:
        UserError: a box or an action is not one.
    """
    content = layout_content(boxes, actions)
    if reference is not None:
        content["reference"] = str(keep(reference, folder))
    text = json.dumps(content, indent=1)
    path = folder / "inputs" / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
    write_text(path, text)
    read_layout(path)
    return path.resolve()


def layout_content(boxes: Sequence[Sequence[object]], actions: Sequence[Sequence[object]]) -> dict[str, object]:
    """What a layout file holds that says the same as the tables.

    Raises:
        UserError: a box is incomplete.
    """
    rows = [row for row in boxes if str(row[0] or "").strip()]
    for phrase, *box in rows:
        if any(edge in (None, "") for edge in box):
            raise UserError(f"the box of {phrase!r} is incomplete: click two opposite corners")
    phrases = [str(row[0]) for row in rows]
    return {
        "instances": [
            {"phrase": phrase, "box": [float(edge) for edge in row[1:]], **({} if name == phrase else {"name": name})}  # type: ignore[arg-type]
            for row, phrase, name in zip(rows, phrases, called(phrases), strict=True)
        ],
        "interactions": [
            {"subject": str(who), "action": str(what), "object": str(whom)}
            for who, what, whom in actions
            if str(what or "").strip()
        ],
    }


def called(phrases: Sequence[str]) -> list[str]:
    """How things are called in the table of who does what: by their phrase, and numbered where several have it."""
    return [
        f"{phrase} {phrases[: place + 1].count(phrase)}" if phrases.count(phrase) > 1 else phrase
        for place, phrase in enumerate(phrases)
    ]
