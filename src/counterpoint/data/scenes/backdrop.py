"""The eight backgrounds, painted on every layer of the canvas."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from counterpoint.data.scenes.canvas import Array, Canvas, noise
from counterpoint.data.scenes.vocabulary import SEG_INDEX, SIZE

Rng = np.random.Generator
_ROWS = np.arange(SIZE, dtype=np.float32)[:, None]


def ground_depth(y: float | Array, horizon: float) -> float | Array:
    """Disparity of the ground plane at image row ``y``: 0 at the horizon, 1 at the lower edge (linear in ``y``)."""
    return np.clip((y - horizon) / (SIZE - horizon), 0, 1)


def paint_backdrop(canvas: Canvas, background: str, horizon: float, rng: Rng) -> float:
    """Paint a background and return the highest image row on which things may stand."""
    return BACKDROPS[background](canvas, horizon, rng)


def _gradient(
    canvas: Canvas,
    top: Array,
    bottom: Array,
    start: float,
    stop: float,
    seg: str,
    depth: float | None,
    grain: Array,
    rough: float,
) -> None:
    """Fill the rows ``start`` to ``stop`` with a gradient and noise; ``depth=None`` is the ground from ``start`` on."""
    first, last = round(start), round(stop)
    rows = _ROWS[first:last]
    t = ((rows - start) / max(stop - start, 1))[..., None]
    canvas.rgb[first:last] = np.float32(top) * (1 - t) + np.float32(bottom) * t + rough * grain[first:last, :, None]
    canvas.seg[first:last] = SEG_INDEX[seg]
    canvas.depth[first:last] = ground_depth(rows, start) if depth is None else depth


def _sky(canvas: Canvas, horizon: float, rng: Rng, top: Array, bottom: Array, clouds: float) -> None:
    puff = noise(rng, 16) * 0.7 + noise(rng, 32) * 0.3
    _gradient(canvas, top, bottom, 0, horizon, "sky", 0.0, puff, 0)
    if clouds:
        rows = round(horizon)
        cover = np.clip(puff[:rows] - 0.35, 0, 1)[..., None] * clouds
        canvas.rgb[:rows] += cover * (np.float32((250, 250, 252)) - canvas.rgb[:rows])


def _ground(
    canvas: Canvas, horizon: float, rng: Rng, far: Array, near: Array, seg: str, coarse: float, fine: float
) -> None:
    grain = coarse * noise(rng, 32) + fine * noise(rng, 128)
    _gradient(canvas, far, near, horizon, SIZE, seg, None, grain * (0.35 + 0.65 * ground_depth(_ROWS, horizon)), 1)


def _ridge(
    canvas: Canvas,
    rng: Rng,
    base: float,
    height: float,
    near: Array,
    far: Array,
    seg: str,
    depth: float,
    lumps: int = 7,
) -> None:
    """A row of hills or mountains that stand on row ``base``."""
    x = np.linspace(-6, SIZE + 6, lumps * 2 + 1)
    y = base - height * np.where(np.arange(len(x)) % 2, rng.uniform(0.55, 1, len(x)), rng.uniform(0.15, 0.5, len(x)))
    points = np.concatenate([np.stack([x, y], -1), [[SIZE + 6, base + 1], [-6, base + 1]]])

    def paint(_: Array, yy: Array) -> Array:
        t = np.clip((base - yy) / height, 0, 1)[..., None]
        return np.broadcast_to(np.float32(near) * (1 - t) + np.float32(far) * t, (yy.shape[0], _.shape[1], 3))

    canvas.polygon(points, paint, SEG_INDEX[seg], depth)


def _tones(rng: Rng, *colours: tuple[int, int, int]) -> list[Array]:
    """The colours, all moved by the same small amount: two scenes of a kind never match exactly."""
    return [np.float32(c) + shift for shift in [rng.normal(0, 7, 3).astype(np.float32)] for c in colours]


def _meadow(canvas: Canvas, horizon: float, rng: Rng) -> float:
    blue, haze, far, near = _tones(rng, (110, 170, 226), (206, 226, 238), (132, 176, 84), (74, 132, 46))
    _sky(canvas, horizon, rng, blue, haze, 0.8)
    _ridge(canvas, rng, horizon, rng.uniform(8, 18), far * 0.86, far * 0.8 + 30, "mountain", 0.02, 5)
    _ground(canvas, horizon, rng, far, near, "grass", 7, 6)
    for x, y, lean in rng.uniform((0, horizon + 8, -2.5), (SIZE, SIZE, 2.5), (34, 3)):
        size = 2 + 6 * ground_depth(y, horizon)
        cv2.line(
            canvas.rgb,
            (int(x), int(y)),
            (int(x + lean), int(y - size)),
            (near * rng.uniform(0.72, 1.35)).tolist(),
            1,
            cv2.LINE_AA,
        )
    return horizon + 10


def _beach(canvas: Canvas, horizon: float, rng: Rng) -> float:
    blue, haze, deep, shallow, wet, dry = _tones(
        rng, (92, 176, 236), (220, 236, 240), (24, 104, 168), (72, 176, 190), (206, 180, 132), (236, 214, 164)
    )
    _sky(canvas, horizon, rng, blue, haze, 0.6)
    _ground(canvas, horizon, rng, wet, dry, "sand", 5, 5)
    shore = horizon + (SIZE - horizon) * rng.uniform(0.20, 0.34)
    waves = 9 * np.sin(_ROWS * 1.35 + 2.2 * noise(rng, 32))
    first, last = round(horizon), round(shore)
    t = ((_ROWS[first:last] - horizon) / (shore - horizon))[..., None]
    canvas.rgb[first:last] = deep * (1 - t) + shallow * t + waves[first:last, :, None]
    canvas.seg[first:last] = SEG_INDEX["sea"]
    x = np.linspace(0, SIZE, 9)
    foam = np.stack([x, shore + rng.uniform(-1.6, 1.6, 9)], -1)
    cv2.polylines(canvas.rgb, [np.round(foam * 16).astype(np.int32)], False, (246, 250, 250), 2, cv2.LINE_AA, 4)
    return shore + 4


def _snow(canvas: Canvas, horizon: float, rng: Rng) -> float:
    top, haze, far, near, rock = _tones(
        rng, (150, 178, 206), (222, 230, 238), (224, 232, 242), (240, 244, 250), (122, 138, 164)
    )
    _sky(canvas, horizon, rng, top, haze, 0.5)
    _ridge(canvas, rng, horizon, rng.uniform(22, 36), rock, np.float32((238, 242, 248)), "mountain", 0.02, 4)
    _ground(canvas, horizon, rng, far, near, "snow", 5, 3)
    for x in rng.uniform(0, SIZE, rng.integers(2, 6)):
        base = horizon + rng.uniform(1, 9)
        size = 12 + 2.2 * (base - horizon)
        for level in (0.0, 0.3, 0.6):
            points = np.array(
                [
                    [x - size * 0.3 * (1 - level), base - size * level],
                    [x + size * 0.3 * (1 - level), base - size * level],
                    [x, base - size * (level + 0.45)],
                ]
            )
            canvas.polygon(points, np.float32((62, 92, 84)), SEG_INDEX["tree"], float(ground_depth(base, horizon)))
    return horizon + 14


def _desert(canvas: Canvas, horizon: float, rng: Rng) -> float:
    top, haze, lit, dark, near = _tones(
        rng, (240, 178, 112), (250, 222, 172), (226, 160, 92), (186, 116, 66), (222, 168, 106)
    )
    _sky(canvas, horizon, rng, top, haze, 0)
    sun = rng.uniform((12, 10), (SIZE - 12, max(horizon - 14, 12)))
    canvas.ellipse(*sun, 8, 8, np.float32((255, 246, 214)), SEG_INDEX["sky"], 0.0)
    _ridge(canvas, rng, horizon, rng.uniform(10, 20), dark, lit, "mountain", 0.02, 3)
    _ground(canvas, horizon, rng, dark * 0.4 + lit * 0.6, near, "sand", 4, 3)
    first = round(horizon)
    ripple = np.sin(26 * np.sqrt(ground_depth(_ROWS, horizon)) + 1.6 * noise(rng, 16))
    canvas.rgb[first:] += (8 * ripple * (horizon < _ROWS))[first:, :, None]
    return horizon + 10


def _street(canvas: Canvas, horizon: float, rng: Rng) -> float:
    top, haze, far, near = _tones(rng, (150, 176, 202), (214, 220, 224), (124, 124, 128), (92, 92, 98))
    _sky(canvas, horizon, rng, top, haze, 0.4)
    _ground(canvas, horizon, rng, far, near, "road", 2, 4)
    kerb = horizon + (SIZE - horizon) * 0.14
    x = -4.0
    while x < SIZE:
        wide, tall = rng.uniform(22, 40), rng.uniform(0.55, 1.05) * horizon
        wall = np.float32(
            rng.choice(((184, 104, 82), (206, 186, 150), (140, 146, 158), (170, 130, 104), (196, 196, 190)))
        ) + rng.normal(0, 6)
        corners = np.array([[x, kerb], [x, kerb - tall], [x + wide, kerb - tall], [x + wide, kerb]])
        canvas.polygon(corners, wall, SEG_INDEX["building"], 0.14)
        glass = np.float32((74, 92, 116)) if rng.random() < 0.7 else np.float32((240, 220, 150))
        for wx in np.arange(x + 5, x + wide - 6, 9):
            for wy in np.arange(kerb - tall + 5, kerb - 10, 12):
                canvas.rgb[max(int(wy), 0) : max(int(wy) + 6, 0), max(int(wx), 0) : max(int(wx) + 5, 0)] = glass
        x += wide
    walk = slice(int(kerb), int(kerb + 4))
    canvas.rgb[walk] = np.float32((190, 188, 184))
    middle = horizon + (SIZE - horizon) * rng.uniform(0.52, 0.66)
    shift = rng.uniform(0, 26)
    for dash in np.arange(-shift, SIZE, 26):
        corners = np.array([[dash, middle], [dash + 14, middle], [dash + 14, middle + 3], [dash, middle + 3]])
        canvas.polygon(corners, np.float32((232, 226, 196)), SEG_INDEX["road"], float(ground_depth(middle, horizon)))
    return kerb + 6


def _room(canvas: Canvas, horizon: float, rng: Rng) -> float:
    edge = horizon + (SIZE - horizon) * rng.uniform(0.16, 0.30)
    paper = np.float32(
        rng.choice(((214, 196, 170), (182, 204, 198), (206, 186, 196), (196, 200, 222), (226, 214, 160)))
    ) + rng.normal(0, 6)
    wood, dark = _tones(rng, (178, 128, 84), (150, 102, 64))
    depth = float(ground_depth(edge, horizon))
    _ground(canvas, horizon, rng, dark, wood, "floor", 3, 3)
    _gradient(canvas, paper * 0.9, paper, 0, edge, "wall", depth, noise(rng, 32), 2)
    period, phase = rng.uniform(9, 16), rng.uniform(0, 16)
    stripe = np.sin(2 * np.pi * (np.arange(SIZE) + phase) / period) > 0.2
    canvas.rgb[: int(edge), stripe] *= 0.93
    x, y, w, h = rng.uniform((10, 6, 26, 24), (SIZE - 48, 18, 40, 38))
    frame = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
    canvas.polygon(frame, np.float32((244, 240, 232)), SEG_INDEX["window"], depth)
    inner = frame + np.sign(frame.mean(0) - frame) * 2.5
    canvas.polygon(inner, np.float32((150, 200, 236)), SEG_INDEX["window"], depth)
    canvas.rgb[int(y + h / 2) : int(y + h / 2) + 2, int(x) : int(x + w)] = (244, 240, 232)
    canvas.rgb[int(edge) - 3 : int(edge)] = (236, 228, 214)
    vanish = SIZE / 2 + rng.uniform(-20, 20)
    for foot in np.arange(-SIZE, 2 * SIZE, 26) + rng.uniform(0, 26):
        start = vanish + (foot - vanish) * (edge - horizon) / (SIZE - horizon)
        cv2.line(canvas.rgb, (int(start), int(edge)), (int(foot), SIZE), (dark * 0.82).tolist(), 1, cv2.LINE_AA)
    return edge + 5


def _forest(canvas: Canvas, horizon: float, rng: Rng) -> float:
    mist, leaf, soil, near = _tones(rng, (132, 164, 128), (52, 92, 52), (98, 92, 60), (76, 78, 44))
    crown = noise(rng, 32) * 0.6 + noise(rng, 64) * 0.6
    _gradient(canvas, leaf, mist, 0, horizon, "tree", 0.01, crown, 12)
    _ground(canvas, horizon, rng, soil, near, "earth", 7, 6)
    for base in np.sort(rng.uniform(horizon + 2, horizon + (SIZE - horizon) * 0.36, rng.integers(4, 8))):
        depth = float(ground_depth(base, horizon))
        x, r = rng.uniform(0, SIZE), 1.6 + 11 * depth
        bark = np.float32((104, 76, 52)) * (0.66 + 0.7 * depth) + mist * 0.18
        lean = rng.uniform(-4, 4)
        trunk = np.array([[x - r, base], [x + r, base], [x + lean + r * 0.7, -2], [x + lean - r * 0.7, -2]])

        def paint(xx: Array, yy: Array, x: float = x, r: float = r, bark: Array = bark) -> Array:
            return bark * (1 - 0.22 * np.clip((xx - x) / r, -1, 1) + 0.05 * np.sin(yy * 0.9))[..., None]

        canvas.polygon(trunk, paint, SEG_INDEX["tree"], depth)
    rows = int(horizon * 0.30)
    cover = np.clip(crown[: rows * 2] * 0.9 + np.linspace(2.2, -1.6, rows * 2)[:, None], 0, 1)[..., None]
    canvas.rgb[: rows * 2] += cover * (leaf * 0.9 + 10 * crown[: rows * 2, :, None] - canvas.rgb[: rows * 2])
    return horizon + (SIZE - horizon) * 0.34


def _night(canvas: Canvas, horizon: float, rng: Rng) -> float:
    top, glow, hill, far, near = _tones(rng, (14, 18, 48), (58, 62, 108), (30, 34, 62), (46, 54, 72), (34, 40, 54))
    _sky(canvas, horizon, rng, top, glow, 0)
    for x, y, level in rng.uniform((0, 0, 120), (SIZE - 1, horizon - 10, 250), (26, 3)):
        canvas.rgb[int(y), int(x)] = level
        canvas.rgb[int(y), int(x) + 1] += (level - canvas.rgb[int(y), int(x) + 1]) * 0.4
    moon = rng.uniform((14, 10), (SIZE - 14, 26))
    canvas.ellipse(*moon, 8, 8, np.float32((240, 236, 210)), SEG_INDEX["sky"], 0.0)
    canvas.ellipse(moon[0] + 2, moon[1] - 1.5, 2, 2, np.float32((216, 210, 184)), SEG_INDEX["sky"], 0.0)
    _ridge(canvas, rng, horizon, rng.uniform(10, 20), hill, hill * 0.8, "mountain", 0.02, 5)
    _ground(canvas, horizon, rng, far, near, "earth", 4, 3)
    return horizon + 10


BACKDROPS: dict[str, Callable[[Canvas, float, Rng], float]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "desert": _desert,
    "street": _street,
    "room": _room,
    "forest": _forest,
    "night": _night,
}
