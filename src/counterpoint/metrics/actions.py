"""Who does what: an action read from where a person's joints are and where the thing is.

The four actions are those that scenes draw (``counterpoint.data.scenes``). Who sits has both thighs level, near the
thing; who kicks stretches a foot out to it; who is behind it stands within its width, and being nearer it reaches
further down than the feet; who holds it has it off the ground, at a hand or within a forearm of an elbow, for a hand
behind a thing is not seen. Lengths are shares of the torso, neck to hips. No picture shows two of the four.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float

_NECK, _ELBOWS, _WRISTS, _HIPS, _KNEES, _ANKLES = 1, [3, 6], [4, 7], [8, 11], [9, 12], [10, 13]


def action_shown(
    joints: Float[np.ndarray, "18 2"], person: Bool[np.ndarray, "h w"], thing: Bool[np.ndarray, "h w"]
) -> str | None:
    """``"holding"``, ``"kicking"``, ``"sitting on"``, ``"behind"``, or none of them.

    Args:
        joints: of the person in pixels, x and y, in OpenPose's order of eighteen; ``nan`` where one is not known.
        person: pixels of the person.
        thing: pixels of the thing.
    """
    hips, knees, ankles = joints[_HIPS], joints[_KNEES], joints[_ANKLES]
    torso = float(np.linalg.norm(joints[_NECK] - hips.mean(0)))
    if not (person.any() and thing.any() and torso > 0):  # a torso that is not known is nan
        return None
    rows, columns = np.flatnonzero(thing.any(1)), np.flatnonzero(thing.any(0))
    level = np.abs(knees - hips)[:, 1] / np.linalg.norm(knees - hips, axis=1).clip(min=1e-6)
    if (level < 0.7).all() and _distance(hips.mean(0)[None], thing) < 0.5 * torso:
        return "sitting on"
    if np.abs(ankles - hips)[:, 0].max() > 0.8 * torso and _distance(ankles, thing) < 0.7 * torso:
        return "kicking"
    below = rows[-1] - np.flatnonzero(person.any(1))[-1]
    if below > 0.15 * torso:
        return "behind" if columns[0] <= hips[:, 0].mean() <= columns[-1] + 1 else None
    if below > -0.25 * torso:
        return None
    hand, arm = _distance(joints[_WRISTS], thing), _distance(joints[_ELBOWS], thing)
    return "holding" if hand < 0.3 * torso or arm < 0.6 * torso else None


def _distance(points: Float[np.ndarray, "n 2"], mask: Bool[np.ndarray, "h w"]) -> float:
    """Of the nearest of several points to a mask, in pixels; none is infinitely far."""
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    seen = points[~np.isnan(points).any(1)]
    x, y = np.floor(seen).astype(int).clip(0, np.array(mask.shape)[::-1] - 1).T
    return float(away[y, x].min(initial=np.inf))
