"""What is in a scene: everything random about it is drawn here, from one number."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from counterpoint.data.scenes.backdrop import ground_depth
from counterpoint.data.scenes.figure import HAIR, POSES, SKIN, Figure, keypoints
from counterpoint.data.scenes.shapes import Thing, dress
from counterpoint.data.scenes.vocabulary import BACKGROUNDS, COLOURS, KINDS, SIZE, STYLES, TEXTURES

Rng = np.random.Generator
CONTENTS = {"thing": 0.26, "person": 0.12, "interaction": 0.36, "things": 0.14, "mixed": 0.12}
"""What a scene is about -> how often. An interaction is a person doing something with a thing."""

_PARTNERS = {
    "holding": ("umbrella", "balloon", "bag", "ball", "box"),
    "kicking": ("ball", "ball", "cone", "box"),
    "sitting on": ("chair", "box"),
    "behind": ("car", "table", "box", "chair"),
}
_WALKS = ("standing", "walking", "running", "waving", "arms up", "arms wide", "hands on hips", "jumping", "crouching")


@dataclass(frozen=True)
class Layout:
    """A scene before it is painted. ``members`` are in painting order; ``triplets`` hold positions in ``members``."""

    background: str
    style: str
    horizon: float
    camera: float
    light: float
    brightness: float
    members: tuple[Figure | Thing, ...]
    triplets: tuple[tuple[int, str, int], ...]

    def metre(self, y: float) -> float:
        """Pixels a metre takes for something that stands on image row ``y``."""
        return (y - self.horizon) / self.camera


def draw_layout(rng: Rng, content: str | None = None, style: str | None = None, things: int | None = None) -> Layout:
    """Draw a layout. ``content`` (a key of :data:`CONTENTS`), ``style`` and of several ``things`` their number fix what
    is otherwise random."""
    content = content or str(rng.choice(list(CONTENTS), p=list(CONTENTS.values())))
    style = style or str(rng.choice(list(STYLES), p=(0.80, 0.10, 0.10)))
    frame = Layout(
        background=str(rng.choice(list(BACKGROUNDS))),
        style=style,
        horizon=rng.uniform(42, 62),
        camera=rng.uniform(1.15, 1.55),
        light=rng.uniform(-1, 1),
        brightness=rng.uniform(0.82, 1.06),
        members=(),
        triplets=(),
    )
    return _draw_things(frame, rng, things) if content == "things" else _DRAW[content](frame, rng)


def _row(frame: Layout, rng: Rng, low: float = 104, high: float = 124) -> float:
    return rng.uniform(max(low, frame.horizon + 36), high)


def _thing(frame: Layout, rng: Rng, kind: str, x: float, y: float, scale: float = 1.0) -> Thing:
    colour = str(rng.choice(list(COLOURS)))
    hsv, dark = dress(rng, colour)
    table, metre = KINDS[kind], frame.metre(y) * scale * rng.uniform(0.9, 1.1)
    shrink = min(1.0, 0.92 * SIZE / (table.width * metre), (y - 3) / (table.height * metre))
    return Thing(
        kind=kind,
        colour=colour,
        texture=str(rng.choice(TEXTURES, p=(0.46, 0.18, 0.18, 0.18))),
        x=x,
        y=y,
        width=table.width * metre * shrink,
        height=table.height * metre * shrink,
        hsv=hsv,
        dark=dark,
        phase=tuple(rng.uniform(0, 1, 2)),
        mirror=bool(rng.random() < 0.5),
        depth=float(ground_depth(y, frame.horizon)),
    )


def _figure(frame: Layout, rng: Rng, pose: str, x: float, y: float) -> Figure:
    cloth = []
    for colour in rng.choice(list(COLOURS), 2):
        (hue, saturation, value), _ = dress(rng, str(colour))
        rgb = cv2.cvtColor(np.uint8([[[hue, saturation, max(value, 44)]]]), cv2.COLOR_HSV2RGB)[0, 0]
        cloth.append(tuple(float(c) for c in rgb))
    if rng.random() < 0.6:
        cloth[1] = ((52, 66, 108), (64, 60, 58), (120, 104, 82))[rng.integers(3)]
    height = min(1.72 * frame.metre(y) * rng.uniform(0.9, 1.1), y - 6)
    return Figure(
        x=x,
        y=y,
        height=height if pose not in {"arms up", "jumping", "waving", "hand high"} else min(height, 0.82 * (y - 6)),
        pose=pose,
        joints=tuple(np.asarray(POSES[pose]) + rng.normal(0, 7, 8)),
        lean=rng.normal(9 if pose in {"running", "kicking", "crouching"} else 0, 4),
        mirror=bool(rng.random() < 0.5),
        skin=SKIN[rng.integers(len(SKIN))],
        hair=HAIR[rng.integers(len(HAIR))],
        shirt=cloth[0],
        trousers=cloth[1],
        long_hair=bool(rng.random() < 0.35),
        depth=float(ground_depth(y, frame.horizon)),
    )


def _inside(member: Thing) -> Thing:
    """Move a thing sideways until it is in the picture."""
    half = member.width / 2
    return replace(member, x=float(np.clip(member.x, half + 1, SIZE - half - 1)))


def _lift(rng: Rng, thing: Thing) -> Thing:
    """Let what floats float."""
    return (
        replace(thing, y=rng.uniform(thing.height + 4, max(thing.height + 5, thing.y - 8)))
        if KINDS[thing.kind].floats
        else thing
    )


def _draw_thing(frame: Layout, rng: Rng) -> Layout:
    kind = str(rng.choice(list(KINDS)))
    thing = _thing(frame, rng, kind, rng.uniform(24, SIZE - 24), _row(frame, rng), rng.uniform(1.0, 1.7))
    return replace(frame, members=(_inside(_lift(rng, thing)),))


def _draw_person(frame: Layout, rng: Rng) -> Layout:
    return replace(
        frame, members=(_figure(frame, rng, str(rng.choice(_WALKS)), rng.uniform(34, SIZE - 34), _row(frame, rng)),)
    )


def _draw_interaction(frame: Layout, rng: Rng) -> Layout:
    action = str(rng.choice(list(_PARTNERS)))
    kind = str(rng.choice(_PARTNERS[action]))
    x, y = rng.uniform(40, SIZE - 40), _row(frame, rng)
    if action == "holding":
        high = kind in {"umbrella", "balloon"}
        pose = "hand low" if kind == "bag" else "hand high" if kind == "balloon" else "holding"
        figure = _figure(frame, rng, pose, x, y)
        thing = _thing(frame, rng, kind, x, y, 0.85 if kind in {"box", "ball"} else 1.0)
        if high:  # leave room above the hand
            figure = replace(figure, height=min(figure.height, (y - 6) / (1.15 if kind == "umbrella" else 1.35)))
        hand = keypoints(figure)[7 if not figure.mirror else 4]
        drop = {"umbrella": 0.06, "balloon": 0.03, "bag": 0.94, "ball": 0.5, "box": 0.5}[kind]
        if high:
            size = min(0.62 * figure.height, hand[1] / (1 - drop) - 3)
            thing = replace(thing, width=size * KINDS[kind].width / KINDS[kind].height, height=size)
        thing = replace(thing, x=float(hand[0]), y=float(hand[1] + drop * thing.height), depth=figure.depth)
        return _fit(frame, figure, thing, action)
    if action == "kicking":
        figure = _figure(frame, rng, "kicking", x, y)
        foot = keypoints(figure)[13]
        thing = _thing(frame, rng, kind, x, y, 0.9)
        way = -1 if figure.mirror else 1
        low = min(y, foot[1] + 0.62 * thing.height)
        thing = replace(thing, x=float(foot[0] + way * (0.05 * figure.height + thing.width / 2)), y=float(low))
        return _fit(frame, figure, thing, action)
    if action == "sitting on":
        figure = _figure(frame, rng, "sitting", x, y)
        hip = y - float(keypoints(figure)[[8, 11], 1].mean())
        thing = _thing(frame, rng, kind, x, y)
        height = (hip - 0.045 * figure.height) / {"chair": 0.50, "box": 1.0}[kind]
        thing = replace(thing, height=height, width=height * (0.62 if kind == "chair" else 1.15), mirror=figure.mirror)
        return _fit(frame, figure, thing, action, thing_first=True)
    figure = _figure(
        frame,
        rng,
        str(rng.choice(("standing", "waving", "arms up", "arms wide", "hands on hips"))),
        x,
        y - rng.uniform(8, 14),
    )
    figure = replace(figure, depth=float(ground_depth(figure.y, frame.horizon)))
    thing = _inside(_thing(frame, rng, kind, x + rng.uniform(-12, 12), y))
    return replace(frame, members=(figure, thing), triplets=((0, action, 1),))


def _fit(frame: Layout, figure: Figure, thing: Thing, action: str, thing_first: bool = False) -> Layout:
    """Move the pair sideways until both are in the picture."""
    xs = keypoints(figure)[:, 0]
    left = min(np.nanmin(xs) - 5, thing.x - thing.width / 2)
    right = max(np.nanmax(xs) + 5, thing.x + thing.width / 2)
    shift = max(0.0, 1 - left) - max(0.0, right - (SIZE - 1))
    figure, thing = replace(figure, x=figure.x + float(shift)), replace(thing, x=thing.x + float(shift))
    if thing_first:
        return replace(frame, members=(thing, figure), triplets=((1, action, 0),))
    return replace(frame, members=(figure, thing), triplets=((0, action, 1),))


def _draw_things(frame: Layout, rng: Rng, things: int | None) -> Layout:
    count = things or int(rng.integers(2, 5))
    places = (np.arange(count) + 0.5 + rng.uniform(-0.18, 0.18, count)) * SIZE / count
    kinds = rng.choice(list(KINDS), count)
    things = []
    for x, kind in zip(rng.permutation(places), kinds, strict=True):
        thing = _thing(frame, rng, str(kind), x, _row(frame, rng, 88))
        shrink = min(1.0, 1.05 * SIZE / count / thing.width)
        things.append(_inside(_lift(rng, replace(thing, width=thing.width * shrink, height=thing.height * shrink))))
    return replace(frame, members=tuple(sorted(things, key=lambda thing: thing.depth)))


def _draw_mixed(frame: Layout, rng: Rng) -> Layout:
    people = int(rng.integers(1, 3))
    places = list(rng.permutation([24.0, 64.0, 104.0]) + rng.uniform(-7, 7, 3))
    members: list[Figure | Thing] = [
        _figure(frame, rng, str(rng.choice(_WALKS[:7])), places.pop(), _row(frame, rng, 92)) for _ in range(people)
    ]
    for x in places[: int(rng.integers(1, 4 - people))]:
        thing = _thing(frame, rng, str(rng.choice(list(KINDS))), x, _row(frame, rng, 92))
        shrink = min(1.0, 52 / thing.width)
        members.append(_inside(_lift(rng, replace(thing, width=thing.width * shrink, height=thing.height * shrink))))
    return replace(frame, members=tuple(sorted(members, key=lambda member: member.depth)))


_DRAW = {
    "thing": _draw_thing,
    "person": _draw_person,
    "interaction": _draw_interaction,
    "mixed": _draw_mixed,
}
