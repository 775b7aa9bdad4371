"""The ten kinds of things: how each is painted, in its colour and with its surface texture."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from counterpoint.data.scenes.canvas import Array, Canvas, Shader
from counterpoint.data.scenes.vocabulary import COLOURS, SEG_INDEX


@dataclass(frozen=True)
class Thing:
    """One object: where it stands, how large it is and what it looks like.

    ``(x, y)`` is the middle of its lower edge and ``width, height`` its extent, in pixels; ``hsv`` is the colour at
    full light (OpenCV units) and ``dark`` the value in shadow; ``phase`` shifts and turns the texture; ``mirror``
    swaps left and right.
    """

    kind: str
    colour: str
    texture: str
    x: float
    y: float
    width: float
    height: float
    hsv: tuple[int, int, int]
    dark: int
    phase: tuple[float, float]
    mirror: bool = False
    depth: float = 0.0

    def at(self, u: float | Array, v: float | Array) -> Array:
        """Pixel position of ``u`` in -1..1 (left to right) and ``v`` in 0..1 (bottom to top)."""
        half = -0.5 * self.width if self.mirror else 0.5 * self.width
        return np.stack(np.broadcast_arrays(self.x + half * np.asarray(u), self.y - self.height * np.asarray(v)), -1)


def surface(thing: Thing, light: float, shade: float = 0.0) -> Shader:
    """The paint of a thing: its colour between shadow and light, broken up by its texture.

    Hue and saturation are constant and V stays between ``dark`` and ``hsv[2]``, so the colour never leaves its
    interval; the other half of a pattern is a neutral tone that contrasts with it.
    """
    hue, saturation, value = thing.hsv
    pure = cv2.cvtColor(np.uint8([[[hue, saturation, 255]]]), cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32) / 255
    other = np.float32(
        {"white": (96, 96, 104), "black": (214, 210, 204), "yellow": (92, 60, 40)}.get(thing.colour, (244, 240, 232))
    )
    period = max(7.0, 0.28 * min(thing.width, thing.height))

    def paint(x: Array, y: Array) -> Array:
        u, v = (x - thing.x) / (0.5 * thing.width), (thing.y - y) / thing.height
        lit = np.clip(0.62 + 0.34 * light * u + 0.22 * (v - 0.5) - shade, 0, 1)
        colour = (thing.dark + (value - thing.dark) * lit)[..., None] * pure
        if thing.texture == "plain":
            return colour
        p, q = (x - thing.x) / period + thing.phase[0], (thing.y - y) / period + thing.phase[1]
        if thing.texture == "striped":
            wave = np.sin(2 * np.pi * (q + 0.35 * p * (1 if thing.phase[0] < 0.5 else -1)))
        elif thing.texture == "checkered":
            wave = np.sin(np.pi * p) * np.sin(np.pi * q) * 1.6
        else:
            wave = (np.cos(2 * np.pi * p) + np.cos(2 * np.pi * q) - 0.62) * 1.2
        blend = np.clip(0.5 + 1.6 * wave, 0, 1)[..., None]
        return colour + blend * ((0.72 + 0.28 * lit[..., None]) * other - colour)

    return paint


def paint_thing(canvas: Canvas, thing: Thing, instance: int, light: float) -> None:
    """Paint a thing on every layer of the canvas. ``light`` in -1..1 is the side it comes from."""
    PAINTERS[thing.kind](_Brush(canvas, thing, instance, light))


@dataclass(frozen=True)
class _Brush:
    canvas: Canvas
    thing: Thing
    instance: int
    light: float

    def shape(
        self, u: list[float], v: list[float], shade: float = 0.0, plain: tuple[int, int, int] | None = None
    ) -> None:
        """Polygon in the thing's own coordinates; ``plain`` paints a fixed tone instead of the surface."""
        self._paint(self.thing.at(np.array(u), np.array(v)), shade, plain)

    def round(
        self, u: float, v: float, ru: float, rv: float, shade: float = 0.0, plain: tuple[int, int, int] | None = None
    ) -> None:
        angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        self._paint(self.thing.at(u + ru * np.cos(angle), v + rv * np.sin(angle)), shade, plain)

    def stroke(
        self,
        a: tuple[float, float],
        b: tuple[float, float],
        radius: float,
        shade: float = 0.0,
        plain: tuple[int, int, int] | None = None,
    ) -> None:
        thing = self.thing
        paint = surface(thing, self.light, shade) if plain is None else np.float32(plain)
        radius = max(radius * thing.height, 0.7)
        self.canvas.capsule(
            thing.at(*a), thing.at(*b), radius, radius, paint, SEG_INDEX[thing.kind], thing.depth, self.instance
        )

    def _paint(self, points: Array, shade: float, plain: tuple[int, int, int] | None) -> None:
        paint = surface(self.thing, self.light, shade) if plain is None else np.float32(plain)
        self.canvas.polygon(points, paint, SEG_INDEX[self.thing.kind], self.thing.depth, self.instance)


def _ball(b: _Brush) -> None:
    b.round(0, 0.5, 1, 0.5)


def _box(b: _Brush) -> None:
    b.shape([-1, 1, 1, -1], [0, 0, 0.78, 0.78])
    b.shape([-1, 1, 0.78, -0.78], [0.78, 0.78, 1, 1], shade=-0.3)
    b.stroke((-1, 0.78), (1, 0.78), 0.018, plain=(66, 58, 52))


def _chair(b: _Brush) -> None:
    for u in (-0.55, 0.80):
        b.stroke((u, 0.02), (u, 0.40), 0.030, shade=0.3)
    b.stroke((-0.84, 0.02), (-0.84, 0.96), 0.038, shade=0.1)
    b.stroke((0.42, 0.02), (0.42, 0.40), 0.030, shade=0.3)
    b.shape([-1, -0.62, -0.62, -1], [0.44, 0.44, 1, 1])
    b.shape([-1, 1, 1, -1], [0.36, 0.36, 0.50, 0.50], shade=-0.1)


def _table(b: _Brush) -> None:
    for u in (-0.84, 0.84):
        b.stroke((u, 0.03), (u, 0.8), 0.05, shade=0.2)
    for u in (-0.55, 0.55):
        b.stroke((u, 0.12), (u, 0.8), 0.04, shade=0.4)
    b.shape([-1, 1, 1, -1], [0.66, 0.66, 0.82, 0.82])
    b.shape([-1, 1, 0.8, -0.8], [0.82, 0.82, 1, 1], shade=-0.25)


def _car(b: _Brush) -> None:
    b.shape(
        [-1, -1, -0.9, -0.55, -0.32, 0.34, 0.62, 0.94, 1, 1],
        [0.16, 0.46, 0.56, 0.60, 0.98, 0.98, 0.60, 0.52, 0.42, 0.16],
    )
    b.shape([-0.42, -0.26, -0.02, -0.02], [0.60, 0.90, 0.90, 0.60], plain=(170, 206, 222))
    b.shape([0.06, 0.06, 0.29, 0.49], [0.60, 0.90, 0.90, 0.60], plain=(170, 206, 222))
    for u in (-0.56, 0.56):
        b.round(u, 0.19, 0.20, 0.20, plain=(36, 34, 38))
        b.round(u, 0.19, 0.085, 0.085, plain=(176, 178, 184))


def _umbrella(b: _Brush) -> None:
    b.stroke((0, 0.02), (0, 0.9), 0.022, plain=(84, 66, 52))
    b.stroke((0, 0.02), (0.12, 0.02), 0.022, plain=(84, 66, 52))
    angle = np.linspace(0, np.pi, 16)
    u = [*np.cos(angle), -0.66, -0.33, 0.0, 0.33, 0.66]
    v = [*(0.54 + 0.44 * np.sin(angle)), 0.60, 0.54, 0.60, 0.54, 0.60]
    b.shape(u, v)


def _balloon(b: _Brush) -> None:
    b.stroke((0, 0.01), (0, 0.5), 0.010, plain=(110, 104, 100))
    b.shape([-0.14, 0.14, 0], [0.44, 0.44, 0.52], shade=0.3)
    b.round(0, 0.74, 0.92, 0.26)


def _bag(b: _Brush) -> None:
    angle = np.linspace(0, np.pi, 9)
    ends = list(zip(0.42 * np.cos(angle), 0.62 + 0.34 * np.sin(angle), strict=True))
    for start, stop in itertools.pairwise(ends):
        b.stroke(start, stop, 0.035, shade=0.25)
    b.shape([-0.9, 0.9, 1, 0.8, -0.8, -1], [0, 0, 0.2, 0.66, 0.66, 0.2])
    b.shape([-0.8, 0.8, 0.72, -0.72], [0.58, 0.58, 0.70, 0.70], shade=0.3)


def _cone(b: _Brush) -> None:
    b.shape([-0.66, 0.66, 0.12, -0.12], [0.1, 0.1, 1, 1])
    b.shape([-1, 1, 0.9, -0.9], [0, 0, 0.13, 0.13], shade=0.15)


def _lamp(b: _Brush) -> None:
    b.stroke((0, 0.03), (0, 0.7), 0.018, plain=(92, 88, 92))
    b.round(0, 0.025, 0.62, 0.03, plain=(92, 88, 92))
    b.shape([-1, 1, 0.56, -0.56], [0.62, 0.62, 1, 1])


PAINTERS: dict[str, Callable[[_Brush], None]] = {
    "ball": _ball,
    "box": _box,
    "chair": _chair,
    "table": _table,
    "car": _car,
    "umbrella": _umbrella,
    "balloon": _balloon,
    "bag": _bag,
    "cone": _cone,
    "lamp": _lamp,
}


def dress(rng: np.random.Generator, colour: str) -> tuple[tuple[int, int, int], int]:
    """Draw a full-light HSV and a shadow V from a named colour's interval."""
    table = COLOURS[colour]
    low, high = table.value
    top = int(rng.integers(low + (3 * (high - low)) // 4, high + 1))
    bottom = int(rng.integers(low, low + (high - low) // 4 + 1))
    hue, saturation = (int(rng.integers(a, b + 1)) for a, b in (table.hue, table.saturation))
    return (hue, saturation, top), bottom
