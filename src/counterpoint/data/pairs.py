"""Scenes combined into the situations that several controls meet: conflicting, complementary and silent.

Protocols of Cross-ControlNet (2025, section 4.1: a person from one picture, the background from another; two
conditions of one picture) and Minimal Impact ControlNet (2025, section 5.2: three layouts with silent regions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from counterpoint.data.scenes.caption import LEVELS, caption, phrase
from counterpoint.data.scenes.layout import Layout as SceneLayout
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.data.scenes.vocabulary import BACKGROUNDS, KINDS, SEG_CLASSES, SEG_INDEX
from counterpoint.types import CONTROL_KINDS, Image

Layout = Literal["crops", "split", "centre"]
SILENT_KINDS = ("canny", "pose")
"""What :func:`silent` combines unless told."""
CLASSES = len(SEG_CLASSES)
"""Classes of the segmentations."""
_START = SPLITS["test"].start
_THINGS = np.array([SEG_INDEX[kind] for kind in KINDS])


@dataclass(frozen=True, eq=False)
class Case:
    """One generation task with what is needed to score it.

    Attributes:
        prompt: what the picture shows.
        images: label -> condition image.
        active: label -> where the control has a voice, ``(h, w)`` bool; all true unless the case is about silence.
        photos: label -> the picture that the control was read from.
        person: where the person of the pose stands, ``(h, w)`` bool, if the case has one.
        subject: the word of the prompt for what the first control shows, if it shows something that the prompt names.
        names: label -> how the publisher of its photo calls it.
        classes: the class of each place ``(h, w)`` where it was published, -1 where it is unlabelled.
    """

    prompt: str
    images: dict[str, Image]
    active: dict[str, np.ndarray]
    photos: dict[str, Image]
    person: np.ndarray | None = None
    subject: str = ""
    names: dict[str, str] = field(default_factory=dict)
    classes: np.ndarray | None = None


def conflicting(number: int, background: str = "seg") -> Case:
    """A person by ``pose`` from one scene over the ``seg`` or ``depth`` of another without people.

    Of eight candidates for the background, the one whose things the person covers most is taken.
    """
    first = _START + 9 * number
    person = scene(first, content="person", style="photo")
    others = [scene(first + 1 + i, content="thing" if i % 2 else "things", style="photo") for i in range(8)]
    other = max(others, key=lambda one: int((np.isin(one.seg, _THINGS) & person.person_mask).sum()))
    images = {"pose": control_map(person, "pose"), background: control_map(other, background)}
    prompt = f"a photo of a person {BACKGROUNDS[other.layout.background]}"
    photos = {"pose": person.image, background: other.image}
    return Case(prompt, images, everywhere(images), photos, person.person_mask, "person")


def complementary(number: int, kinds: tuple[str, ...] = ("hed", "seg")) -> Case:
    """Several controls of one and the same scene."""
    one = scene(_START + number, style="photo")
    images = {kind: control_map(one, kind) for kind in kinds}
    photos = dict.fromkeys(kinds, one.image)
    return Case(caption(one.layout, "detailed"), images, everywhere(images), photos, subject=_noun(one.layout))


def alone(number: int, kind: str) -> Case:
    """One control of one scene; poses come from scenes with a person."""
    one = scene(_START + number, content="interaction" if kind == "pose" else None, style="photo")
    images = {kind: control_map(one, kind)}
    return Case(caption(one.layout, "detailed"), images, everywhere(images), {kind: one.image}, one.person_mask)


def silent(number: int, layout: Layout, kinds: tuple[str, str] = SILENT_KINDS, level: str = "brief") -> Case:
    """Two controls that each speak in a part of the picture only; elsewhere they show their silent value.

    ``"crops"``: the middle halves of both, side by side; ``"split"``: the left half of one, the right half of the
    other; ``"centre"``: the middle square of one inside the other.

    Args:
        number: of the case.
        layout: where each control speaks.
        kinds: two different kinds that have a silent value.
        level: of the prompt: ``"none"``, ``"brief"`` or ``"detailed"``.
    """
    if any(CONTROL_KINDS[kind].silent is None for kind in kinds) or kinds[0] == kinds[1] or level not in LEVELS:
        raise ValueError(
            f"silent cases want two different kinds with a silent value and a level in {LEVELS}, got {kinds} and "
            f"{level!r}"
        )
    start = _START + 2 * number
    scenes = {kind: scene(start + i, content="interaction", style="photo") for i, kind in enumerate(kinds)}
    full = [(control_map(scenes[kind], kind), scenes[kind].image) for kind in kinds]
    first = scenes[kinds[0]].layout
    case = silenced(caption(first, level), kinds, full, layout)
    return case if level == "none" else replace(case, subject=_noun(first))


def _noun(layout: SceneLayout) -> str:
    """Who or what a caption names first."""
    return phrase(layout.members[0], texture=False, colour=False).split()[-1]


def silenced(prompt: str, kinds: tuple[str, str], full: Sequence[tuple[Image, Image]], layout: Layout) -> Case:
    """A case in which each of two controls speaks in its part of the picture only.

    Args:
        prompt: of the case.
        kinds: of the controls.
        full: condition image and photo of each, square and of one size.
        layout: see :func:`silent`.
    """
    size = full[0][0].shape[0]
    half, quarter = size // 2, size // 4
    masks = np.zeros((2, size, size), bool)
    if layout == "centre":
        masks[0, quarter:-quarter, quarter:-quarter] = True
        masks[1] = ~masks[0]
    else:
        masks[0, :, :half] = True
        masks[1, :, half:] = True
    if layout == "crops":
        full = [tuple(np.concatenate([one[:, quarter:-quarter]] * 2, 1) for one in pair) for pair in full]
    images = {
        kind: np.where(mask[..., None], image, np.uint8(CONTROL_KINDS[kind].silent or 0))
        for kind, mask, (image, _) in zip(kinds, masks, full, strict=True)
    }
    photos = {kind: photo for kind, (_, photo) in zip(kinds, full, strict=True)}
    return Case(prompt, images, dict(zip(kinds, masks, strict=True)), photos)


def everywhere(images: dict[str, Image]) -> dict[str, np.ndarray]:
    """A voice for every control in the whole picture."""
    return {kind: np.ones(image.shape[:2], bool) for kind, image in images.items()}
