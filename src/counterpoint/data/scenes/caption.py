"""Captions: from nothing to every detail, in several forms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from counterpoint.data.scenes.figure import POSES, Figure
from counterpoint.data.scenes.layout import Layout
from counterpoint.data.scenes.shapes import Thing
from counterpoint.data.scenes.vocabulary import ACTIONS, BACKGROUNDS, COLOURS, KINDS, STYLES, TEXTURES

LEVELS = ("none", "brief", "detailed")
_DOING = {
    "arms up": "with arms up",
    "arms wide": "with arms wide",
    "hands on hips": "with hands on hips",
    "holding": "standing",
    "hand high": "standing",
    "hand low": "standing",
}


def phrase(member: Figure | Thing, *, texture: bool = True, colour: bool = True, doing: bool = False) -> str:
    """How a caption names a person or a thing, article first: ``a red striped ball``."""
    if isinstance(member, Figure):
        return f"a person {_DOING.get(member.pose, member.pose)}" if doing else "a person"
    words = [
        member.colour if colour else "",
        member.texture if texture and member.texture != "plain" else "",
        member.kind,
    ]
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def content(layout: Layout, *, detailed: bool) -> str:
    """Who and what is in the picture, without the place. A line drawing has no colours to speak of."""
    colour = layout.style != "line drawing"
    said = [
        phrase(member, texture=detailed, colour=colour, doing=detailed and not layout.triplets)
        for member in layout.members
    ]
    if layout.triplets:
        (subject, action, target) = layout.triplets[0]
        return f"{said[subject]} {action} {said[target]}"
    return listed(said)


def listed(said: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(said[:-1])} and {said[-1]}" if len(said) > 1 else "".join(said)


def caption(layout: Layout, level: str) -> str:
    """The caption of a level in its standard form: ``a photo of a red ball on a meadow``."""
    if level == "none":
        return ""
    return f"{STYLES[layout.style]} {content(layout, detailed=level == 'detailed')} {BACKGROUNDS[layout.background]}"


def draw_caption(layout: Layout, rng: np.random.Generator) -> str:
    """A caption in a random form, as a training set would have it."""
    what, where, style = (
        content(layout, detailed=bool(rng.random() < 0.6)),
        BACKGROUNDS[layout.background],
        layout.style,
    )
    form = rng.integers(6)
    if form <= 1:
        return f"{STYLES[style]} {what} {where}"
    if form == 2 and style == "photo":
        return f"{what} {where}"
    if form == 3:
        return f"{where}, {what}" + ("" if style == "photo" else f", {style}")
    if form == 4 and style == "photo":
        return f"{what} {where}, photo"
    return f"{what} {where}, {style}"


def words() -> list[str]:
    """Every word that a caption can contain."""
    text = [
        *STYLES,
        *STYLES.values(),
        *BACKGROUNDS,
        *BACKGROUNDS.values(),
        *KINDS,
        *COLOURS,
        *TEXTURES,
        *ACTIONS,
        *POSES,
        *_DOING.values(),
    ]
    return sorted(
        {word for phrase in text for word in phrase.split()} | {"a", "an", "and", "person", "people", "photo", ","}
    )
