"""Layout files: what they say, what is wrong with them in one line, and how they look over a picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from counterpoint.conditions.layout import Instance, Interaction, Layout, Reference, _box, draw_layout, read_layout
from counterpoint.types import UserError

PERSON = {"phrase": "a person", "box": [0.1, 0.2, 0.4, 0.9]}
BALL = {"phrase": "a red ball", "box": [0.45, 0.7, 0.65, 0.9], "name": "ball"}
KICK = {"subject": "a person", "action": "kicking", "object": "ball"}


def written(folder: Path, content: Any) -> Path:
    path = folder / "layout.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    for name, value in (("style.png", 90), ("where.png", 255)):
        PIL.Image.new("RGB", (8, 6), (value,) * 3).save(tmp_path / name)
    reference = {"image": "style.png", "weight": 0.5, "mask": "where.png"}
    layout = read_layout(
        written(tmp_path, {"instances": [PERSON, BALL], "interactions": [KICK], "reference": reference})
    )
    assert layout.instances == (
        Instance("a person", (0.1, 0.2, 0.4, 0.9)),
        Instance("a red ball", (0.45, 0.7, 0.65, 0.9), "ball"),
    )
    assert layout.interactions == (Interaction(0, "kicking", 1),)
    assert layout.reference is not None
    assert layout.reference.weight == 0.5
    assert layout.reference.image.shape == (6, 8, 3)
    assert layout.reference.mask is not None
    short = read_layout(written(tmp_path, {"reference": "style.png"}))
    assert short.reference is not None
    assert short.reference.weight == 1
    assert short.reference.mask is None
    assert short.instances == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ({"instances": [{**PERSON, "box": [10**400, 0, 1, 1]}]}, "four numbers"),
        ([PERSON], "the layout is an object with instances, interactions, reference"),
        ({"things": []}, "the layout has no 'things'"),
        ({"instances": {}}, "'instances' of the layout cannot be {}"),
        ({"instances": ["a person"]}, "an instance is an object with phrase, box, name"),
        ({"instances": [{"phrase": "a person"}]}, "an instance lacks 'box'"),
        ({"instances": [{**PERSON, "box": [0, 0, 1]}]}, "four numbers"),
        ({"instances": [{**PERSON, "box": [0, 0, "1", 1]}]}, "four numbers"),
        ({"instances": [{**PERSON, "box": [0, 0, 1.2, 1]}]}, "'a person' reaches outside the picture: 0, 0, 1.2, 1"),
        ({"instances": [{**PERSON, "box": [float("nan"), 0, 1, 1]}]}, "reaches outside the picture"),
        ({"instances": [{**PERSON, "box": [0.5, 0, 0.5, 1]}]}, "'a person' is empty"),
        ({"instances": [{**PERSON, "phrase": " "}]}, "has no phrase"),
        ({"instances": [PERSON], "interactions": [KICK]}, "names 'ball', and no thing is called that; there are a per"),
        ({"instances": [PERSON, BALL, BALL], "interactions": [KICK]}, "2 things are called that: give them names"),
        ({"instances": [PERSON, BALL], "interactions": [{**KICK, "action": ""}]}, "has no action"),
        ({"instances": [PERSON, BALL], "interactions": [{"subject": "ball"}]}, "an interaction lacks 'action'"),
        ({"reference": "none.png"}, "there is no image"),
        ({"reference": {"image": "layout.json"}}, "is not an image"),
        ({"reference": {"image": "style.png", "weight": True}}, "a number in 0..2, got True"),
        ({"reference": {"image": "style.png", "weight": float("nan")}}, "a number in 0..2, got nan"),
        ({"reference": {"image": "style.png", "weight": -5}}, "a number in 0..2, got -5"),
        ({"reference": {"image": "style.png", "weight": 1e30}}, "a number in 0..2, got 1e+30"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = written(tmp_path, content)
    PIL.Image.new("RGB", (8, 6)).save(tmp_path / "style.png")
    with pytest.raises(UserError) as error:
        read_layout(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", str(tmp_path / "none.json")):
        with pytest.raises(UserError, match="cannot read the layout"):
            read_layout(path)
    with pytest.raises(UserError, match="about thing 3 of 1"):
        Layout((Instance("a ball", (0, 0, 1, 1)),), (Interaction(0, "near", 3),))


PICTURE = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Instance, {"box": (0, 0, 1)}, "four numbers in 0..1, got (0, 0, 1)"),
        (Instance, {"box": ("0", 0, 1, 1)}, "four numbers in 0..1"),
        (Instance, {"box": None}, "four numbers in 0..1, got None"),
        (Instance, {"phrase": None}, "has no phrase"),
        (Layout, {"interactions": (SimpleNamespace(subject="a", action="near", object=0),)}, "in the layout, got 'a'"),
        (Layout, {"instances": (("a", (0, 0, 1, 1)),)}, "are Instance(phrase, box), got ('a', (0, 0, 1, 1))"),
        (Layout, {"instances": {"phrase": "a"}}, "are Instance(phrase, box), got 'phrase'"),
        (Layout, {"reference": PICTURE}, "the reference of a layout is Reference(image), got a ndarray"),
        (Layout, {"interactions": (SimpleNamespace(subject=0, action=None, object=0),)}, "has no action"),
        (Reference, {"weight": "x"}, "a number in 0..2, got 'x'"),
        (Reference, {"image": PICTURE.astype(np.float32)}, "got (4, 6, 3) float32: give np.asarray"),
        (Reference, {"image": np.zeros((4, 6, 4), np.uint8)}, "got (4, 6, 4) uint8"),
        (Reference, {"image": np.zeros((0, 0, 3), np.uint8)}, "got (0, 0, 3) uint8"),
        (Reference, {"image": PIL.Image.new("RGB", (4, 4))}, "got Image"),
        (Reference, {"mask": np.zeros((4, 6, 4), np.uint8)}, "mask of a reference is a picture"),
    ],
)
def test_what_python_gives_is_read_as_carefully(kind: type, fields: dict, message: str) -> None:
    usual = {Instance: {"phrase": "a ball", "box": (0, 0, 1, 1), "name": ""}, Reference: vars(Reference(PICTURE)),
             Layout: vars(Layout((Instance("a", (0, 0, 1, 1)),)))}  # fmt: skip
    one = object.__new__(kind)  # in tests annotations are checked first; who uses the library has no such check
    for name, value in {**usual[kind], **fields}.items():
        object.__setattr__(one, name, value)
    with pytest.raises(UserError) as error:
        one.__post_init__()
    assert message in str(error.value)


def test_numbers_of_any_kind_make_a_box() -> None:
    assert _box(np.array([0, 0.25, 1, 1], np.float32), "a ball") == (0.0, 0.25, 1.0, 1.0)
    assert Instance("a ball", (0, 0, 1, 1)).box == (0.0, 0.0, 1.0, 1.0)


def test_a_drawing_changes_the_lines_and_nothing_else() -> None:
    picture = np.full((128, 96, 3), 200, np.uint8)
    layout = Layout((Instance("a ball", (0.25, 0.5, 0.75, 0.9)),))
    drawn = draw_layout(picture, layout)
    assert drawn.shape == picture.shape
    changed = (drawn != picture).any(-1)
    assert changed[64:115, 24].all()
    assert changed[64:115, 71].all()
    assert not changed[:60].any()
    assert not changed[90:110, 30:70].any()
    assert (picture == 200).all()
    ends = Instance("a", (0, 0, 0.2, 0.2)), Instance("b", (0.8, 0.8, 1, 1))
    plain = np.full((256, 256, 3), 200, np.uint8)
    arrow = draw_layout(plain, Layout(ends, (Interaction(0, "kicking", 1),))) != draw_layout(plain, Layout(ends))
    columns = np.flatnonzero(arrow[126:131].any((0, 2)))
    assert columns.min() + columns.max() == pytest.approx(256, abs=4), "what is done stands in the middle"
    thin = draw_layout(picture, Layout((Instance("a line", (0.5, 0.5, 0.501, 0.501)),)))
    assert (thin != picture).any(), "also of a box within one pixel"
    corner = draw_layout(picture, Layout((Instance("a thing with a long name", (0.9, 0.95, 1, 1)),)))
    assert corner.shape == picture.shape
