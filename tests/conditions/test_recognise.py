"""Maps are told from photos, and nobody is warned without reason."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from counterpoint.conditions.image import read_image
from counterpoint.conditions.plain import PLAIN
from counterpoint.conditions.recognise import WrongPicture, check_picture, recognise
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import scene


@pytest.mark.parametrize("kind", ["canny", "hed", "depth", "pose", "seg"])
def test_maps_of_scenes(kind: str) -> None:
    found = [recognise(control_map(scene(number, content="interaction"), kind)) for number in range(20)]
    assert found.count(kind) >= 15, found


def test_scenes_are_no_maps() -> None:
    assert {recognise(scene(number, style="photo").image) for number in range(30)} == {None}


def test_photos_are_no_maps(test_data: Path) -> None:
    photos = sorted((test_data / "coco_free" / "images").glob("*.jpg"))
    assert len(photos) > 100
    assert {recognise(read_image(path)) for path in photos} == {None}


@pytest.mark.parametrize("name", ["canny", "depth", "normals"])
def test_published_maps(test_data: Path, name: str) -> None:
    found = recognise(read_image(test_data / "golden_refiners" / f"cutecat_guide_{name}.png"))
    assert found == name.removesuffix("s")


def said(picture: np.ndarray, kind: str, *, photo: bool) -> str:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        check_picture("a.png", picture, kind, photo=photo)
    assert all(issubclass(one.category, WrongPicture) for one in heard)
    return " ".join(str(one.message) for one in heard)


def test_who_is_warned() -> None:
    photo = scene(3).image
    edges = PLAIN["canny"](photo)
    assert said(edges, "canny", photo=True) == "a.png looks like a canny map already: give it with --control"
    assert "give it with --photo canny=" in said(photo, "canny", photo=False)
    assert "invert it" in said(255 - edges, "lineart", photo=False)
    assert "dark lines on white already: invert it" in said(255 - edges, "canny", photo=True)
    for picture, kind, is_photo in (
        (photo, "canny", True),
        (edges, "canny", False),
        (edges, "scribble", False),
        (photo, "tile", False),
        (control_map(scene(3), "depth"), "depth", False),
    ):
        assert said(picture, kind, photo=is_photo) == ""
