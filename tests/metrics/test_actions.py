"""Who does what, on scenes, whose annotations are known: yes for what is done, no for the other three."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from counterpoint.apps.readers import family_readers
from counterpoint.data.scenes.render import SPLITS, Scene, scene
from counterpoint.data.scenes.vocabulary import ACTIONS, PERSON, SEG_INDEX
from counterpoint.evaluation.suite import stack
from counterpoint.metrics.actions import action_shown

SCENES = [scene(SPLITS["validation"].start + number, content="interaction", style="photo") for number in range(48)]


def parts(one: Scene) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    _, action, whom = one.triplets[0]
    return action, one.keypoints[0], one.seg == PERSON, one.seg == SEG_INDEX[one.instances[whom].name]


def test_every_scene_shows_what_it_is_about() -> None:
    assert {parts(one)[0] for one in SCENES} == set(ACTIONS)
    for one in SCENES:
        action, joints, person, thing = parts(one)
        assert action_shown(joints, person, thing) == action, one.number
        assert action_shown(joints[:, :] * (-1, 1) + (128, 0), person[:, ::-1], thing[:, ::-1]) == action, "mirrored"


def test_a_judge_reads_it_from_the_picture(tiny: Path) -> None:
    readers = family_readers(tiny)
    pictures = stack([one.image for one in SCENES])
    with torch.no_grad():
        joints, classes = readers.joints(pictures).numpy(), readers.classes(pictures).numpy()
    found = []
    for one, mine, seg in zip(SCENES, joints, classes, strict=True):
        action, *_ = parts(one)
        thing = seg == SEG_INDEX[one.instances[one.triplets[0][2]].name]
        found.append((action, action_shown(mine, seg == PERSON, thing)))
    assert sum(shown == action for action, shown in found) >= 0.85 * len(found)
    assert sum(shown not in {action, None} for action, shown in found) <= 0.05 * len(found)


@pytest.mark.parametrize("missing", ["person", "thing", "joints"])
def test_nobody_does_nothing(missing: str) -> None:
    _, joints, person, thing = parts(SCENES[0])
    none = np.zeros_like(person)
    given = {"joints": joints, "person": person, "thing": thing}
    given[missing] = np.full_like(joints, np.nan) if missing == "joints" else none
    assert action_shown(**given) is None
