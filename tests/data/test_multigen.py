"""MultiGen-20M as its publisher lays it out: one list a control, joined by their photos."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from counterpoint.data.multigen import MultiGen
from counterpoint.data.samples import PhotoSamples, open_photos
from counterpoint.types import UserError
from tests.data.test_published import picture


def row(source: str, task: str, prompt: Any = "a photo") -> dict[str, Any]:
    control = f"group_0_{task}/{Path(source).stem}.png"
    return {"source": source, f"control_{task.removesuffix('base')}": control, "prompt": prompt}


def multigen(root: Path, lists: dict[str, list]) -> Path:
    """The lists by UniControl's words for tasks, and their files."""
    for task, rows in lists.items():
        path = root / "json_files" / f"aesthetics_plus_all_group_{task}_all.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
        for line in rows:
            if isinstance(line, dict) and "source" in line:
                for name in (f"images/{line['source']}", f"conditions/group_0_{task}/{Path(line['source']).stem}.png"):
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    PIL.Image.fromarray(picture(len(name))).save(root / name)
    return root


LISTS = {
    "canny": [row("./six/a.jpg", "canny"), row("six/b.jpg", "canny")],
    "openpose": [row("six/c.jpg", "openpose", None), row("six/a.jpg", "openpose")],
    "hedsketch": [row("six/b.jpg", "hedsketch")],
    "segbase": [row("six/a.jpg", "segbase")],
    "grayscale": [row("six/z.jpg", "grayscale")],
}


def test_lists_are_joined_by_their_photos(tmp_path: Path) -> None:
    photos = open_photos(multigen(tmp_path, LISTS), 32)
    assert isinstance(photos, MultiGen)
    found = {one.name: (one.text, set(one.maps)) for one in photos}
    assert found == {
        "images/six/a.jpg": ("a photo", {"canny", "pose", "seg"}),
        "images/six/b.jpg": ("a photo", {"canny", "scribble"}),
        "images/six/c.jpg": ("", {"pose"}),
    }
    for kind in ("canny", "pose", "scribble", "seg", "depth"):
        assert photos.having(kind) == [number for number, one in enumerate(photos) if kind in one.maps]
    assert len(PhotoSamples(photos, ("control:pose",))) == 2
    whole = np.asarray(PIL.Image.open(tmp_path / "images" / "six" / "b.jpg").resize((48, 32)))[:, 8:40]
    named = next(one for one in photos if one.name.endswith("b.jpg"))
    assert np.abs(named.image.astype(int) - whole).mean() < 12


def test_archives_that_were_not_unpacked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lists = {"canny": [*LISTS["canny"], row("five/d.jpg", "canny")], "openpose": LISTS["openpose"]}
    multigen(tmp_path, lists)
    for folder in ("images/five", "conditions/group_0_openpose"):
        (tmp_path / folder).rename(tmp_path / "gone" if "five" in folder else tmp_path / "too")
    with caplog.at_level(logging.WARNING):
        photos = open_photos(tmp_path, 32)
    assert "1 of 5 lines name photos that are not unpacked" in caplog.text
    assert [one.name[-5:] for one in photos] == ["c.jpg", "a.jpg", "b.jpg"]
    assert photos.having("pose") == []
    assert photos.having("canny") == [1, 2]
    assert {kind for one in photos for kind in one.maps} == {"canny"}


def test_a_file_that_is_not_there_is_damage(tmp_path: Path) -> None:
    photos = open_photos(multigen(tmp_path, LISTS), 32)
    (tmp_path / "conditions" / "group_0_segbase" / "a.png").unlink()
    number = photos.having("seg")[0]
    with pytest.raises(UserError, match=r"there is no file .*group_0_segbase.a.png"):
        photos[number]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"canny_all.json, line 2: no JSON"),
        ("[1]", r"line 2: no object with source, prompt and control_canny"),
        (json.dumps({"source": "a.jpg", "prompt": "x"}), "no object with source, prompt and control_canny"),
        (json.dumps({"source": 5, "control_canny": "x"}), "no object with source"),
        (json.dumps({"source": "../a.jpg", "control_canny": "x"}), "names stay inside the data set"),
        (json.dumps({"source": "a.jpg", "control_canny": "/etc/x"}), "names stay inside the data set"),
        (json.dumps({"source": "a.jpg", "control_canny": "x", "prompt": 5}), "the prompt is text"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_photos(multigen(tmp_path, {"canny": [LISTS["canny"][0], line]}), 32)


def test_a_data_set_that_is_not_whole(tmp_path: Path) -> None:
    multigen(tmp_path, {"grayscale": LISTS["grayscale"]})
    with pytest.raises(UserError, match=r"lacks aesthetics_plus_all_group_canny_all.json and its like"):
        open_photos(tmp_path, 32)
    multigen(tmp_path, {"canny": LISTS["canny"]})
    (tmp_path / "images").rename(tmp_path / "pictures")
    with pytest.raises(UserError, match="images holds none of the photos of its lists"):
        open_photos(tmp_path, 32)
