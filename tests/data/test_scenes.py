"""Scenes: deterministic, exactly annotated, and in the colours they claim."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from counterpoint.data.scenes.caption import caption, words
from counterpoint.data.scenes.layout import CONTENTS
from counterpoint.data.scenes.maps import SEG_PALETTE, control_map
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.data.scenes.vocabulary import ACTIONS, BACKGROUNDS, COLOURS, KINDS, SEG_CLASSES, STYLES, TEXTURES

SCENES = [scene(number) for number in range(200)]

# COCO-MIG's ranges in OpenCV's HSV, from the benchmark's definition: inclusive (low, high) boxes.
COCO_MIG = {
    "red": [((0, 50, 70), (9, 255, 255)), ((159, 50, 70), (180, 255, 255))],
    "blue": [((90, 50, 70), (128, 255, 255))],
    "yellow": [((25, 50, 70), (35, 255, 255))],
    "green": [((36, 50, 70), (89, 255, 255))],
    "black": [((0, 0, 0), (180, 255, 30))],
    "white": [((0, 0, 221), (180, 43, 255))],
    "brown": [((6, 43, 35), (25, 255, 255))],
}


def test_vocabulary_is_rich() -> None:
    assert len(BACKGROUNDS) >= 6
    assert len(KINDS) >= 8
    assert len(TEXTURES) >= 4
    assert set(COCO_MIG) < set(COLOURS)
    assert set(ACTIONS) == {"holding", "kicking", "sitting on", "behind"}


def test_same_number_same_scene() -> None:
    for number in (0, 7, SPLITS["test"].start + 5):
        one, two = scene(number), scene(number)
        for field in ("image", "seg", "depth", "instance"):
            np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
        assert one.caption == two.caption


def test_any_scene_is_reached_directly() -> None:
    np.testing.assert_array_equal(SCENES[150].image, scene(150).image)


def test_splits_are_disjoint() -> None:
    ranges = sorted(SPLITS.values(), key=lambda r: r.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ranges))


def test_everything_occurs() -> None:
    many = [scene(number) for number in range(1000, 1600)]
    assert {one.layout.background for one in many} == set(BACKGROUNDS)
    assert {one.layout.style for one in many} == set(STYLES)
    assert {item.name for one in many for item in one.instances} == {*KINDS, "person"}
    assert {item.colour for one in many for item in one.instances if item.colour} == set(COLOURS)
    assert {item.texture for one in many for item in one.instances if item.texture} == set(TEXTURES)
    assert {action for one in many for _, action, _ in one.triplets} == set(ACTIONS)


@pytest.mark.parametrize("colour", COCO_MIG)
def test_colours_pass_the_benchmarks_rule(colour: str) -> None:
    """At least a fifth of an object's pixels lie in its colour's range: the rule by which COCO-MIG counts a success."""
    seen = 0
    for number in range(3000, 3400):
        one = scene(number, content="thing", style="photo")
        hsv = cv2.cvtColor(one.image, cv2.COLOR_RGB2HSV)
        for place, item in enumerate(one.instances, start=1):
            if item.colour == colour:
                mask = one.instance == place
                inside = np.zeros_like(mask)
                for low, high in COCO_MIG[colour]:
                    inside |= cv2.inRange(hsv, np.array(low), np.array(high)) > 0
                assert inside[mask].mean() >= 0.2, (number, item)
                seen += 1
    assert seen >= 20


def test_annotations_agree() -> None:
    for one in SCENES:
        assert one.image.shape == (128, 128, 3)
        assert one.image.dtype == np.uint8
        assert 0 <= one.depth.min() <= one.depth.max() <= 1
        assert one.seg.max() < len(SEG_CLASSES)
        people = [item for item in one.instances if item.name == "person"]
        assert len(people) == len(one.keypoints)
        for place, item in enumerate(one.instances, start=1):
            rows, columns = np.nonzero(one.instance == place)
            if len(rows):
                x0, y0, x1, y1 = np.array(item.box) * 128
                assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
                names = {list(SEG_CLASSES)[i] for i in one.seg[one.instance == place]}
                assert names == {item.name}
        for subject, action, target in one.triplets:
            assert one.instances[subject].name == "person"
            assert action in ACTIONS
            assert one.instances[target].name in KINDS


def test_keypoints_lie_on_their_person() -> None:
    on, total = 0, 0
    for number in range(60):
        one = scene(number, content="person")
        joints = one.keypoints[0][~np.isnan(one.keypoints[0]).any(1)]
        inside = joints[((joints >= 0) & (joints < 128)).all(1)].astype(int)
        on += int((one.instance[inside[:, 1], inside[:, 0]] == 1).sum())
        total += len(inside)
    assert on / total > 0.97


def test_nearer_is_brighter_and_hides_what_is_behind() -> None:
    for number in range(40):
        one = scene(number, content="interaction")
        if one.triplets[0][1] == "behind":
            person, thing = one.triplets[0][0] + 1, one.triplets[0][2] + 1
            assert one.depth[one.instance == thing].max() > one.depth[one.instance == person].max()


def test_seg_map_uses_its_palette() -> None:
    assert len({tuple(colour) for colour in SEG_PALETTE}) == len(SEG_PALETTE)
    one = SCENES[0]
    np.testing.assert_array_equal(control_map(one, "seg"), SEG_PALETTE[one.seg])


def test_pose_map_is_black_without_people() -> None:
    assert not control_map(scene(0, content="thing"), "pose").any()
    assert control_map(scene(0, content="person"), "pose").any()


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("style", STYLES)
def test_captions_use_known_words_only(content: str, style: str) -> None:
    known = set(words())
    for number in range(30):
        one = scene(number, content=content, style=style)
        for text in (one.caption, caption(one.layout, "brief"), caption(one.layout, "detailed")):
            assert set(text.replace(",", " ,").split()) <= known
            if style == "line drawing":
                assert not set(text.split()) & set(COLOURS)
        assert caption(one.layout, "none") == ""


def test_unknown_control_is_refused() -> None:
    with pytest.raises(KeyError):
        control_map(SCENES[0], "smell")
