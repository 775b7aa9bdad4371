"""Scenes combined into the situations that several controls meet: conflicting, complementary and silent.

Protocols of Cross-ControlNet (2025, section 4.1: a person from one picture, the background from another; two
conditions of one picture) and Minimal Impact ControlNet (2025, section 5.2: three layouts with silent regions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from counterpoint.data.scenes.caption import LEVELS, caption
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import SPLITS, Scene, scene
from counterpoint.data.scenes.vocabulary import BACKGROUNDS, KINDS, SEG_INDEX, SIZE
from counterpoint.types import CONTROL_KINDS, Image

Layout = Literal["crops", "split", "centre"]
_THINGS = np.array([SEG_INDEX[kind] for kind in KINDS])


@dataclass(frozen=True)
class Case:
    """One generation task: a prompt, a condition image for each control, and the scenes they come from.

    ``active`` says where each control has a voice: ``(128, 128)`` bool, all true unless the case is about silence.
    """

    prompt: str
    images: dict[str, Image]
    scenes: dict[str, Scene]
    active: dict[str, np.ndarray]


def conflicting(number: int, background: str = "seg", split: str = "test") -> Case:
    """A person by ``pose`` from one scene over the ``seg`` or ``depth`` of another without people.

    Of eight candidates for the background, the one whose things the person covers most is taken.
    """
    first = SPLITS[split].start + 9 * number
    person = scene(first, content="person", style="photo")
    others = [scene(first + 1 + i, content="thing" if i % 2 else "things", style="photo") for i in range(8)]
    other = max(others, key=lambda one: int((np.isin(one.seg, _THINGS) & person.person_mask).sum()))
    images = {"pose": control_map(person, "pose"), background: control_map(other, background)}
    prompt = f"a photo of a person {BACKGROUNDS[other.layout.background]}"
    return Case(prompt, images, {"pose": person, background: other}, _everywhere(images))


def complementary(number: int, kinds: tuple[str, ...] = ("hed", "seg"), split: str = "test") -> Case:
    """Several controls of one and the same scene."""
    one = scene(SPLITS[split].start + number, style="photo")
    images = {kind: control_map(one, kind) for kind in kinds}
    return Case(caption(one.layout, "detailed"), images, dict.fromkeys(kinds, one), _everywhere(images))


def silent(
    number: int, layout: Layout, kinds: tuple[str, str] = ("canny", "pose"), level: str = "brief", split: str = "test"
) -> Case:
    """Two controls that each speak in a part of the picture only; elsewhere they show their silent value.

    ``"crops"``: the middle halves of both, side by side; ``"split"``: the left half of one, the right half of the
    other; ``"centre"``: the middle square of one inside the other.

    Args:
        number: of the case.
        layout: where each control speaks.
        kinds: two different kinds that have a silent value.
        level: of the prompt: ``"none"``, ``"brief"`` or ``"detailed"``.
        split: the scenes to take.
    """
    if any(CONTROL_KINDS[kind].silent is None for kind in kinds) or kinds[0] == kinds[1] or level not in LEVELS:
        raise ValueError(
            f"silent cases want two different kinds with a silent value and a level in {LEVELS}, got {kinds} and "
            f"{level!r}"
        )
    start = SPLITS[split].start + 2 * number
    scenes = {kind: scene(start + i, content="interaction", style="photo") for i, kind in enumerate(kinds)}
    full = [control_map(scenes[kind], kind) for kind in kinds]
    half, quarter = SIZE // 2, SIZE // 4
    masks = np.zeros((2, SIZE, SIZE), bool)
    if layout == "centre":
        masks[0, quarter:-quarter, quarter:-quarter] = True
        masks[1] = ~masks[0]
    else:
        masks[0, :, :half] = True
        masks[1, :, half:] = True
    if layout == "crops":
        full = [np.concatenate([one[:, quarter:-quarter]] * 2, 1) for one in full]
    images = {
        kind: np.where(mask[..., None], one, np.uint8(CONTROL_KINDS[kind].silent or 0))
        for kind, mask, one in zip(kinds, masks, full, strict=True)
    }
    prompt = caption(scenes[kinds[0]].layout, level)
    return Case(prompt, images, scenes, dict(zip(kinds, masks, strict=True)))


def _everywhere(images: dict[str, Image]) -> dict[str, np.ndarray]:
    return {kind: np.ones((SIZE, SIZE), bool) for kind in images}
