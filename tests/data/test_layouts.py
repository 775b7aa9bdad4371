"""COCO-MIG's file as it is published, and layouts of scenes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from counterpoint.data.layouts import LEAST_SIDE, LayoutCase, Wanted, read_mig_bench, scene_actions, scene_levels
from counterpoint.data.scenes.vocabulary import ACTIONS, COLOURS, KINDS
from counterpoint.types import UserError

ENTRY = {
    "caption": "a photo of a black cat and a white stop sign ",
    "segment": [
        {"bbox": [0.1, 0.2, 0.5, 0.9], "label": "a black cat"},
        {"bbox": [0.5, 0.0, 1.0, 1.0], "label": "a white stop sign"},
    ],
    "image_id": 17,
}


def test_the_published_file(tmp_path: Path) -> None:
    path = tmp_path / "mig_bench.json"
    path.write_text(json.dumps({"0": ENTRY, "1": ENTRY, "7": ENTRY | {"segment": ENTRY["segment"][:1]}}))
    levels = read_mig_bench(path)
    assert list(levels) == [1, 2]
    cat, sign = Wanted("cat", "black", (0.1, 0.2, 0.5, 0.9)), Wanted("stop sign", "white", (0.5, 0, 1, 1))
    prompt = "a photo of a black cat and a white stop sign"
    assert levels[2](10) == [LayoutCase(0, prompt, (cat, sign)), LayoutCase(1, prompt, (cat, sign))]
    assert levels[2](1) == levels[2](10)[:1]
    assert [case.number for case in levels[1](10)] == [7]
    over = ENTRY | {"segment": [{"bbox": [-1e-6, 0.2, 1.0000002, 0.9], "label": "a black cat"}]}
    path.write_text(json.dumps({"0": over}))
    assert read_mig_bench(path)[1](1)[0].wanted[0].box == (0, 0.2, 1, 0.9), "one box that was rounded spoils nothing"


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"0": {"caption": "a cat"}}),
        json.dumps({"0": ENTRY | {"segment": [{"bbox": [0.5, 0, 0.1, 1], "label": "a red cat"}]}}),
        json.dumps({"0": ENTRY | {"segment": [{"bbox": [0, 0, 1, 1], "label": "a golden cat"}]}}),
        json.dumps({"0": ENTRY | {"segment": []}}),
    ],
)
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mig_bench.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"mig_bench\.json"):
        read_mig_bench(path)


def test_scenes_have_layouts_of_every_level() -> None:
    for level, first in scene_levels().items():
        cases = first(4)
        assert len(cases) == len({case.number for case in cases}) == 4
        assert all(case.layout.reference is not None for case in cases), "a style, for what reads one"
        for case in cases:
            assert len(case.wanted) == level
            for one in case.wanted:
                assert one.name in KINDS
                assert one.colour in COLOURS
                assert f"{one.colour} {one.name}" in case.prompt
                assert min(one.box[2] - one.box[0], one.box[3] - one.box[1]) >= LEAST_SIDE


def test_actions_are_told_by_the_layout_alone() -> None:
    cases = scene_actions()(6)
    assert cases[:2] != cases[1:3]
    for case in cases:
        (told,) = case.layout.interactions
        assert told.action == case.action
        assert case.action in ACTIONS
        assert case.action not in case.prompt
        assert case.thing in case.prompt
        assert "a person" in case.prompt
        assert case.layout.reference is not None
