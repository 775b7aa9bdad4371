"""People: eighteen keypoints from joint angles, and the body painted around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from counterpoint.data.scenes.canvas import Array, Canvas, Shader
from counterpoint.data.scenes.vocabulary import PERSON

KEYPOINTS = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
    "right eye", "left eye", "right ear", "left ear",
)  # fmt: skip
"""OpenPose's COCO-18 order. Right and left are the person's own."""

# Joint angles in degrees from hanging straight down; positive turns towards the image's right.
# (right upper arm, right forearm, left upper arm, left forearm, right thigh, right shin, left thigh, left shin)
# A person who faces the camera has the right side on the image's left.
POSES: dict[str, tuple[float, ...]] = {
    "standing": (-12, -6, 12, 6, -4, -2, 4, 2),
    "walking": (28, 45, -28, -8, -24, -32, 24, 8),
    "running": (45, 110, -50, 25, -32, -95, 52, -12),
    "waving": (-150, -172, 14, 8, -5, -3, 5, 3),
    "arms up": (-152, -165, 152, 165, -8, -5, 8, 5),
    "arms wide": (-88, -92, 88, 92, -10, -8, 10, 8),
    "hands on hips": (-42, 38, 42, -38, -9, -7, 9, 7),
    "jumping": (-125, -150, 125, 150, -38, 18, 38, -18),
    "crouching": (35, 80, 20, 70, 62, -42, 78, -28),
    "sitting": (30, 62, 22, 58, 76, -4, 84, 4),
    "kicking": (-48, -30, -30, 20, -6, -8, 62, 48),
    "holding": (-14, -8, 52, 98, -6, -4, 6, 4),
    "hand high": (-14, -8, 128, 150, -6, -4, 6, 4),
    "hand low": (-12, -6, 24, 18, -6, -4, 6, 4),
}
PROFILE = {"walking", "running", "crouching", "sitting", "kicking"}
"""Poses seen from the side."""

_TORSO, _NECK, _UPPER_ARM, _FOREARM, _THIGH, _SHIN, _HEAD = 0.30, 0.085, 0.165, 0.155, 0.235, 0.235, 0.068
SKIN = ((244, 208, 177), (224, 172, 134), (196, 138, 98), (141, 92, 60), (96, 60, 42))
HAIR = ((40, 28, 22), (92, 58, 34), (196, 156, 88), (150, 72, 40), (120, 116, 112))


@dataclass(frozen=True)
class Figure:
    """One person: pose, build and clothes.

    ``height`` is in pixels, head to foot when standing; ``mirror`` swaps the image's left and right;
    ``joints`` are the eight angles of :data:`POSES` after jitter; colours are RGB in 0..255.
    """

    x: float
    y: float
    height: float
    pose: str
    joints: tuple[float, ...]
    lean: float
    mirror: bool
    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    shirt: tuple[float, float, float]
    trousers: tuple[float, float, float]
    long_hair: bool
    depth: float = 0.0


def keypoints(figure: Figure) -> Array:
    """Pixel positions ``(18, 2)`` in the order of :data:`KEYPOINTS`, ``nan`` where the head hides a keypoint.

    The lowest point of the feet stands at ``(figure.x, figure.y)``; a sitting person's hip is at ``figure.x``.
    """
    side = figure.pose in PROFILE
    shoulder, hip = (0.035, 0.028) if side else (0.105, 0.062)
    angles = np.radians(figure.joints)
    lean = np.radians(figure.lean)
    down = np.stack([np.sin(angles), np.cos(angles)], -1)
    up = np.array([np.sin(lean), -np.cos(lean)])
    across = np.array([np.cos(lean), np.sin(lean)])
    points = np.full((18, 2), np.nan)
    neck = up * _TORSO
    points[1] = neck
    for base, sign, arm, leg in ((2, -1, 0, 4), (5, 1, 2, 6)):
        points[base] = neck + sign * shoulder * across - up * 0.012
        points[base + 1] = points[base] + _UPPER_ARM * down[arm]
        points[base + 2] = points[base + 1] + _FOREARM * down[arm + 1]
        points[base + 6] = sign * hip * across
        points[base + 7] = points[base + 6] + _THIGH * down[leg]
        points[base + 8] = points[base + 7] + _SHIN * down[leg + 1]
    head = neck + up * (_NECK + 0.012)
    if side:  # profile, facing the image's right: the far eye and ear are hidden
        points[0] = head + 0.060 * across
        points[15] = head + 0.036 * across + 0.022 * up
        points[17] = head - 0.014 * across + 0.006 * up
    else:
        points[0] = head - 0.010 * up
        points[14], points[15] = head - 0.026 * across + 0.014 * up, head + 0.026 * across + 0.014 * up
        points[16], points[17] = head - 0.056 * across, head + 0.056 * across
    foot = np.nanmax(points[[10, 13], 1]) + 0.03
    points *= (-1 if figure.mirror else 1, 1)
    points = points * figure.height + (figure.x, figure.y - foot * figure.height)
    if figure.mirror and not side:  # mirrored about the image: the person's own right and left change places
        points = points[[0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16]]
    return points


def paint_figure(canvas: Canvas, figure: Figure, instance: int, light: float) -> Array:
    """Paint the person and return the keypoints ``(18, 2)`` in pixels. ``light`` in -1..1 is the side it comes from."""
    points, unit = keypoints(figure), figure.height

    def shaded(colour: tuple[float, ...]) -> Shader:
        base = np.asarray(colour, np.float32)
        return lambda x, y: (
            base * (1 + 0.16 * light * np.clip((x - figure.x) / (0.16 * unit), -1, 1) + 0 * y)[..., None]
        )

    def limb(a: int, b: int, r0: float, r1: float, paint: Shader) -> None:
        canvas.capsule(points[a], points[b], r0 * unit, r1 * unit, paint, PERSON, figure.depth, instance)

    def blob(centre: Array, rx: float, ry: float, paint: Shader) -> None:
        canvas.ellipse(*centre, rx * unit, ry * unit, paint, PERSON, figure.depth, instance)

    skin, hair, shirt, trousers = (shaded(c) for c in (figure.skin, figure.hair, figure.shirt, figure.trousers))
    shirt_far, trousers_far, shoe = (
        shaded(tuple(0.8 * c for c in colour)) for colour in (figure.shirt, figure.trousers, (70, 60, 58))
    )
    side = figure.pose in PROFILE
    facing = (-1 if figure.mirror else 1) * unit

    def arm(shoulder: int, cloth: Shader) -> None:
        limb(shoulder, shoulder + 1, 0.036, 0.030, cloth)
        limb(shoulder + 1, shoulder + 2, 0.028, 0.022, skin)
        blob(points[shoulder + 2], 0.028, 0.028, skin)

    def leg(hip: int, cloth: Shader) -> None:
        limb(hip, hip + 1, 0.050, 0.040, cloth)
        limb(hip + 1, hip + 2, 0.040, 0.030, cloth)
        toe = 0.022 * facing if side else 0.0
        blob(points[hip + 2] + (toe, 0.008 * unit), 0.048 if side else 0.036, 0.024, shoe)

    far, near = (2, 5)
    leg(far + 6, trousers_far if side else trousers)
    if side or figure.pose not in {"hands on hips"}:
        arm(far, shirt_far if side else shirt)
    leg(near + 6, trousers)
    across = np.array([0.02 * unit, 0])
    hips = (
        [points[11] + across, points[8] - across]
        if points[11][0] > points[8][0]
        else [points[11] - across, points[8] + across]
    )
    swell = 0.035 * unit * np.sign(points[5][0] - points[2][0]) if side else 0.0
    torso = np.array([points[2] - (swell, 0), points[5] + (swell, 0), *hips])
    centre = torso.mean(0)
    canvas.polygon(torso + np.sign(torso - centre) * 0.022 * unit, shirt, PERSON, figure.depth, instance)
    limb(1, 1, 0.034, 0.034, skin)
    head = np.nanmean(points[[14, 15, 16, 17]], 0) if not side else points[17] + (0.014 * facing, 0)
    limb_head = points[1] + 0.55 * (head - points[1])
    canvas.capsule(points[1], limb_head, 0.026 * unit, 0.026 * unit, skin, PERSON, figure.depth, instance)
    if figure.long_hair:
        blob(head + (-0.02 * facing if side else 0, 0.035 * unit), 0.074, 0.092, hair)
    blob(head + (0, -0.012 * unit), 0.071, 0.080, hair)
    blob(head + ((0.014 * facing, 0.012 * unit) if side else (0, 0.014 * unit)), 0.055, 0.064, skin)
    if not side and figure.pose == "hands on hips":
        arm(far, shirt)
    arm(near, shirt)
    return points
