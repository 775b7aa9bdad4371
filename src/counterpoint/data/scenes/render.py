"""Scenes by number: the picture, its exact annotations and its condition images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from counterpoint.data.scenes.backdrop import paint_backdrop
from counterpoint.data.scenes.canvas import Array, Canvas
from counterpoint.data.scenes.caption import draw_caption, phrase
from counterpoint.data.scenes.figure import Figure, paint_figure
from counterpoint.data.scenes.layout import Layout, draw_layout
from counterpoint.data.scenes.shapes import paint_thing
from counterpoint.data.scenes.style import apply_style
from counterpoint.data.scenes.vocabulary import SEG_INDEX, SIZE

SPLITS = {
    "train": range(0, 10_000_000),
    "validation": range(10_000_000, 11_000_000),
    "test": range(11_000_000, 12_000_000),
}
"""Split -> its scene numbers. They never meet."""


@dataclass(frozen=True)
class Instance:
    """A person or thing as an annotation: name, phrase, attributes (empty for people), visible box xyxy in 0..1."""

    name: str
    phrase: str
    colour: str
    texture: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A finished scene.

    ``image`` ``(128, 128, 3)`` uint8 RGB; ``seg`` class indices; ``depth`` disparity in 0..1, 1 = nearest; ``instance``
    numbers from 1, position in ``instances`` plus one, 0 = background; ``keypoints`` one ``(18, 2)`` array in pixels a
    person, ``nan`` where hidden; ``triplets`` hold positions in ``instances``.
    """

    number: int
    layout: Layout
    caption: str
    image: Array
    seg: Array
    depth: Array
    instance: Array
    instances: tuple[Instance, ...]
    keypoints: tuple[Array, ...]
    triplets: tuple[tuple[int, str, int], ...]

    @property
    def person_mask(self) -> Array:
        """Pixels of people, ``(128, 128)`` bool."""
        return self.seg == SEG_INDEX["person"]


def scene(number: int, *, content: str | None = None, style: str | None = None, things: int | None = None) -> Scene:
    """The scene of a number: the same on every call, independent of every other.

    Args:
        number: 0..11,999,999; :data:`SPLITS` says which are for what.
        content: fixes what the scene is about: a key of :data:`~counterpoint.data.scenes.layout.CONTENTS`.
        style: fixes the style.
        things: of ``content="things"``, fixes how many.
    """
    rng = np.random.Generator(np.random.PCG64(number))
    layout = draw_layout(rng, content, style, things)
    canvas = Canvas()
    paint_backdrop(canvas, layout.background, layout.horizon, rng)
    np.clip(canvas.rgb, 0, 250, out=canvas.rgb)
    canvas.rgb *= layout.brightness
    poses = []
    for place, member in enumerate(layout.members, start=1):
        _cast_shadow(canvas, layout, member)
        if isinstance(member, Figure):
            poses.append(paint_figure(canvas, member, place, layout.light))
        else:
            paint_thing(canvas, member, place, layout.light)
    return Scene(
        number=number,
        layout=layout,
        image=apply_style(canvas.rgb, layout.style, rng),
        caption=draw_caption(layout, rng),
        seg=canvas.seg,
        depth=canvas.depth,
        instance=canvas.instance,
        instances=tuple(
            _annotate(canvas.instance, place, member) for place, member in enumerate(layout.members, start=1)
        ),
        keypoints=tuple(poses),
        triplets=layout.triplets,
    )


def _cast_shadow(canvas: Canvas, layout: Layout, member: object) -> None:
    if isinstance(member, Figure):
        canvas.shadow(
            member.x - 0.05 * layout.light * member.height,
            member.y - 0.5,
            0.20 * member.height,
            0.035 * member.height,
            0.35,
        )
    elif not layout.triplets or layout.triplets[0][1] != "holding":
        ground = layout.horizon + member.depth * (SIZE - layout.horizon)
        canvas.shadow(
            member.x - 0.1 * layout.light * member.width, ground - 0.5, 0.52 * member.width, 0.09 * member.width, 0.35
        )


def _annotate(instance: Array, place: int, member: object) -> Instance:
    mask = instance == place
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (
        (columns[0] / SIZE, rows[0] / SIZE, (columns[-1] + 1) / SIZE, (rows[-1] + 1) / SIZE)
        if len(rows)
        else (0.0, 0.0, 0.0, 0.0)
    )
    if isinstance(member, Figure):
        return Instance("person", phrase(member), "", "", box)
    return Instance(member.kind, phrase(member), member.colour, member.texture, box)
