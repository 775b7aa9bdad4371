"""Layouts: what stands where, who does what to whom, and whose style it has; one JSON file for every edge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from counterpoint.conditions.image import read_image
from counterpoint.types import Box, Image, UserError

MOST_WEIGHT = 2.0
"""Of a reference; 1 is what adapters are trained with."""
_COLOURS = ((230, 25, 75), (0, 130, 200), (60, 180, 75), (245, 130, 48), (145, 30, 180), (0, 128, 128))


@dataclass(frozen=True)
class Instance:
    """A thing: how a prompt would call it, and where it is. Interactions refer to it by ``name``."""

    phrase: str
    box: Box
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", _box(self.box, self.phrase))
        x0, y0, x1, y1 = self.box
        if not isinstance(self.phrase, str) or not self.phrase.strip():
            raise UserError(f"the thing at {_said(self.box)} has no phrase: say what it is, such as 'a red ball'")
        if not (0 <= x0 <= 1 and 0 <= y0 <= 1 and 0 <= x1 <= 1 and 0 <= y1 <= 1):
            raise UserError(
                f"the box of {self.phrase!r} reaches outside the picture: {_said(self.box)}; boxes are x0, y0, x1, y1 "
                "as shares of the picture, in 0..1"
            )
        if not (x0 < x1 and y0 < y1):
            raise UserError(f"the box of {self.phrase!r} is empty: {_said(self.box)}; boxes are x0, y0, x1, y1")


@dataclass(frozen=True)
class Interaction:
    """Who does what to whom: positions in a layout's instances, and a verb such as ``"kicking"``."""

    subject: int
    action: str
    object: int


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture whose style or content is wanted: how strongly, in 0..2, and where (white; ``None`` is everywhere)."""

    image: Image
    weight: float = 1.0
    mask: Image | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.weight) or not 0 <= self.weight <= MOST_WEIGHT:
            raise UserError(f"the weight of a reference is a number in 0..{MOST_WEIGHT:g}, got {self.weight!r}")
        for what, picture in (("reference", self.image), ("mask of a reference", self.mask)):
            if picture is not None and not _is_picture(picture):
                got = f"{picture.shape} {picture.dtype}" if isinstance(picture, np.ndarray) else type(picture).__name__
                raise UserError(
                    f"the {what} is a picture as an array (h, w, 3) uint8, got {got}: give "
                    "np.asarray(picture.convert('RGB')) of one that PIL has opened"
                )


@dataclass(frozen=True, eq=False)
class Layout:
    """What a picture should show where."""

    instances: tuple[Instance, ...] = ()
    interactions: tuple[Interaction, ...] = ()
    reference: Reference | None = None

    def __post_init__(self) -> None:
        for thing in self.instances:
            if not isinstance(thing, Instance):
                raise UserError(f"the things of a layout are Instance(phrase, box), got {thing!r}")
        if not isinstance(self.reference, Reference | None):
            raise UserError(f"the reference of a layout is Reference(image), got a {type(self.reference).__name__}")
        for one in self.interactions:
            if not isinstance(one.action, str) or not one.action.strip():
                raise UserError("an interaction has no action: say what is done, such as 'kicking'")
            for place in (one.subject, one.object):
                if not isinstance(place, int):
                    raise UserError(
                        f"the interaction {one.action!r} calls things by their place in the layout, got {place!r}"
                    )
                if not 0 <= place < len(self.instances):
                    raise UserError(f"the interaction {one.action!r} is about thing {place} of {len(self.instances)}")


def read_layout(path: str | Path, within: Path | None = None) -> Layout:
    """A layout file::

        {"instances": [{"phrase": "a person", "box": [0.1, 0.2, 0.4, 0.9]},
                       {"phrase": "a red ball", "box": [0.45, 0.7, 0.65, 0.9], "name": "ball"}],
         "interactions": [{"subject": "a person", "action": "kicking", "object": "ball"}],
         "reference": {"image": "style.png", "weight": 0.8, "mask": "where.png"}}

    Interactions call things by name, or by phrase where they have none. Every part may be left out; ``reference`` may
    be the picture's path alone. Paths count from the file's folder.

    Args:
        path: of the file.
        within: the only folder whose pictures it may name, where somebody else wrote it.

    Raises:
        UserError: it cannot be read, has an unknown or missing key, or says something impossible.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the layout {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the layout {path} is not JSON: {error}") from None
    try:
        return parse_layout(content, path.parent, within)
    except UserError as error:
        raise UserError(f"layout {path}: {error}") from None


def parse_layout(content: Any, folder: Path, within: Path | None = None) -> Layout:
    """A layout from what its JSON file holds; paths count from ``folder``, and lie in ``within``, if that is given.

    Raises:
        UserError: as :func:`read_layout`.
    """
    parts = _keys(content, "the layout", {"instances": list, "interactions": list, "reference": (str, dict)})
    instances = tuple(_instance(one) for one in parts.get("instances", []))
    interactions = tuple(_interaction(one, instances) for one in parts.get("interactions", []))
    reference = parts.get("reference")
    if isinstance(reference, str):
        reference = {"image": reference}
    return Layout(instances, interactions, None if reference is None else _reference(reference, folder, within))


def draw_layout(picture: Image, layout: Layout) -> Image:
    """A picture with its layout drawn over it: boxes with their phrases, and an arrow for every interaction."""
    canvas = PIL.Image.fromarray(np.ascontiguousarray(picture))
    draw = PIL.ImageDraw.Draw(canvas)
    width, height = canvas.size
    line = max(1, round(min(width, height) / 160))
    font = PIL.ImageFont.load_default(max(9, min(width, height) / 32))
    corners = [[end * side for end, side in zip(one.box, canvas.size * 2, strict=True)] for one in layout.instances]
    boxes = [[x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)] for x0, y0, x1, y1 in corners]
    for place, (one, box) in enumerate(zip(layout.instances, boxes, strict=True)):
        colour = _COLOURS[place % len(_COLOURS)]
        draw.rectangle(box, outline=colour, width=line)
        _label(draw, (box[0], box[1]), one.phrase, colour, font, canvas.size)
    for action in layout.interactions:
        ends = [((boxes[i][0] + boxes[i][2]) / 2, (boxes[i][1] + boxes[i][3]) / 2)
                for i in (action.subject, action.object)]  # fmt: skip
        colour = _COLOURS[action.subject % len(_COLOURS)]
        draw.line(ends, fill=colour, width=line)
        draw.circle(ends[1], 2 * line, fill=colour)
        middle = ((ends[0][0] + ends[1][0]) / 2, (ends[0][1] + ends[1][1]) / 2)
        _label(draw, middle, action.action, colour, font, canvas.size, anchor=0.5)
    return np.asarray(canvas)


def _label(
    draw: Any, place: tuple[float, float], text: str, colour: Any, font: Any, size: tuple[int, int], anchor: float = 0
) -> None:
    """Words at a place, which they have at a share ``anchor`` of their width and height."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x = min(max(place[0] - anchor * (right + 4), 0), max(size[0] - right - 4, 0))
    y = min(max(place[1] - anchor * (bottom + 4), 0), max(size[1] - bottom - 4, 0))
    draw.rectangle([x, y, x + right + 3, y + bottom + 3], fill=colour)
    draw.text((x + 2 - left, y + 2 - top / 2), text, fill="white", font=font)


def _instance(content: Any) -> Instance:
    parts = _keys(content, "an instance", {"phrase": str, "box": list, "name": str}, ("phrase", "box"))
    return Instance(parts["phrase"], _box(parts["box"], parts["phrase"]), parts.get("name", ""))


def _interaction(content: Any, instances: tuple[Instance, ...]) -> Interaction:
    wanted = ("subject", "action", "object")
    parts = _keys(content, "an interaction", dict.fromkeys(wanted, str), wanted)
    return Interaction(_called(parts["subject"], instances), parts["action"], _called(parts["object"], instances))


def _called(name: str, instances: tuple[Instance, ...]) -> int:
    names = [one.name or one.phrase for one in instances]
    if names.count(name) > 1:
        raise UserError(
            f"an interaction names {name!r}, and {names.count(name)} things are called that: give them names"
        )
    if name not in names:
        raise UserError(
            f"an interaction names {name!r}, and no thing is called that; there are {', '.join(names) or 'none'}"
        )
    return names.index(name)


def _reference(content: Any, folder: Path, within: Path | None) -> Reference:
    parts = _keys(content, "the reference", {"image": str, "weight": (int, float), "mask": str}, ("image",))
    image, mask = (None if name is None else folder / name for name in (parts["image"], parts.get("mask")))
    for path in (image, mask):
        if path and within and not path.resolve().is_relative_to(within.resolve()):
            raise UserError("the reference is a picture elsewhere: give it by itself")
    return Reference(read_image(image), parts.get("weight", 1.0), None if mask is None else read_image(mask))


def _keys(content: Any, what: str, kinds: Mapping[str, Any], wanted: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{what} is an object with {', '.join(kinds)}, got {json.dumps(content)}")
    for key, value in content.items():
        if key not in kinds:
            raise UserError(f"{what} has no {key!r}; it has {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise UserError(f"{key!r} of {what} cannot be {json.dumps(value)}")
    if missing := [key for key in wanted if key not in content]:
        raise UserError(f"{what} lacks {missing[0]!r}: {json.dumps(content)}")
    return content


def _box(given: Any, phrase: Any) -> Box:
    ends = tuple(given) if isinstance(given, Iterable) else ()
    # no float holds some integers of JSON
    if len(ends) != 4 or not all(_is_number(end) and not abs(end) > 1e9 for end in ends):
        raise UserError(f"the box of {phrase!r} is x0, y0, x1, y1, four numbers in 0..1, got {given}")
    return float(ends[0]), float(ends[1]), float(ends[2]), float(ends[3])


def _is_number(given: Any) -> bool:
    return isinstance(given, Real) and not isinstance(given, bool)


def _is_picture(given: Any) -> bool:
    return isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.shape[2:] == (3,) and given.size > 0


def _said(box: Box) -> str:
    return ", ".join(f"{end:g}" for end in box)
