"""Benchmark pairs: drawn without a model, the same for everybody with the same files, refused with others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from counterpoint.data.annotations import read_annotations
from counterpoint.data.coco import CocoPeople
from counterpoint.data.manifest import draw_pairs, dump, open_manifest
from counterpoint.data.published import PublishedCases, open_sets
from counterpoint.types import UserError
from tests.data.test_annotations import RUNS, coco
from tests.data.test_published import person, picture


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Four photos, a whole person in three of them, captions for two; three backgrounds."""
    people = [person(1, 0), person(2, 1), person(3, 3), person(4, 3, num_keypoints=0, segmentation=RUNS)]
    captions = [{"id": 7, "image_id": 2, "caption": "a meadow"}, {"id": 8, "image_id": 3, "caption": "a crowd"}]
    coco(tmp_path, {"person_keypoints": people, "captions": captions}, 4, "val2017")
    (tmp_path / "behind" / "a").mkdir(parents=True)
    for i in range(3):
        PIL.Image.fromarray(picture(50 + i, 40, 80)).save(tmp_path / "behind" / "a" / f"{i}.jpg")
    return tmp_path


def drawn(place: Path, **more: object) -> list[dict]:
    notes = [place / "annotations" / f"{sort}_val2017.json" for sort in ("person_keypoints", "captions")]
    return draw_pairs(read_annotations(notes), place / "val2017", place / "behind", **more)


def written(place: Path, **more: object) -> Path:
    path = place / "pairs.jsonl"
    path.write_text(dump(drawn(place, **more)))
    return path


def test_cases_are_those_of_the_annotations(place: Path) -> None:
    rows = drawn(place)
    assert [row["sort"] for row in rows] == ["conflicting"] * 3 + ["complementary"] * 2
    assert rows == drawn(place)
    assert rows != drawn(place, seed=1)
    assert {row["photo"]["caption"]: row["prompt"] for row in rows[3:]} == {7: "a meadow", 8: "a crowd"}
    sets = open_manifest(written(place), place / "val2017", place / "behind", 32)
    theirs = {photo.name: photo for photo in CocoPeople(place, 32)}
    for number, row in enumerate(rows[:3]):
        mine = sets["coco2017"][number]
        wanted = theirs[row["person"]["file"]]
        for part in ("image", "person"):
            np.testing.assert_array_equal(getattr(mine, part), getattr(wanted, part))
        np.testing.assert_array_equal(mine.maps["pose"], wanted.maps["pose"])
        assert sets["bg20k"][number].name == row["background"]["file"]
    assert len({row["background"]["file"] for row in rows[:3]}) == 3


def test_cases_from_a_manifest(place: Path) -> None:
    path = written(place, n=2)
    parts = {"pairs": path, "photos": place / "val2017", "backgrounds": place / "behind"}
    cases = PublishedCases(open_sets(parts, 32), {"seg": lambda photo: photo, "hed": lambda photo: 255 - photo})
    one = cases.conflicting(1)
    assert (one.prompt, one.subject, set(one.images)) == ("a photo of a person", "person", {"pose", "seg"})
    assert one.person.any()
    assert cases.complementary(0).prompt in {"a meadow", "a crowd"}
    with pytest.raises(UserError, match="has 2 photos only"):
        cases.conflicting(2)
    with pytest.raises(UserError, match="--data pairs=MANIFEST and --data photos=FOLDER"):
        open_sets({"pairs": path}, 32)
    with pytest.raises(UserError, match=r"unknown data set 'x'; there are .*pairs, photos, backgrounds"):
        open_sets({"x": path}, 32)


def test_other_files_are_other_cases(place: Path) -> None:
    path = written(place)
    (place / "val2017" / "0.png").write_bytes((place / "val2017" / "1.png").read_bytes())
    (place / "behind" / "a" / "2.jpg").unlink()
    with pytest.raises(UserError, match="2 files are missing or not those listed") as caught:
        open_manifest(path, place / "val2017", place / "behind", 32)
    assert "0.png has another hash" in str(caught.value)
    assert "there is no" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.pop("prompt"), "line 1: no case of a manifest"),
        (lambda row: row.update(schema=2), "line 1: its schema is 2"),
        (lambda row: row["person"]["people"][0].update(keypoints=[1]), "line 1: annotation . of .* for keypoints"),
        (lambda row: row.update(person=3), "line 1: no case"),
    ],
)
def test_lines_that_are_none(place: Path, change: object, said: str) -> None:
    path = written(place)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[0])
    path.write_text(dump(rows))
    with pytest.raises(UserError, match=said):
        open_manifest(path, place / "val2017", place / "behind", 32)


def test_the_command(cli, place: Path) -> None:
    notes = place / "annotations" / "person_keypoints_val2017.json"
    out = place / "made.jsonl"
    more = ("--photos", place / "val2017", "--backgrounds", place / "behind", "--out", out)
    status, said, error = cli("pairs", notes, *more, "-n", 2)
    assert (status, said.strip()) == (0, str(out)), error
    assert "2 conflicting, 0 complementary cases" in error
    assert len(out.read_text().splitlines()) == 2
    for arguments, said in (
        ((notes, *more, "-n", 9), "3 photos with a whole person and 3 backgrounds; 9 pairs"),
        ((notes, "--photos", place / "val2017"), "has neither captions nor"),
        ((notes, "--photos", place / "nowhere"), "there is no folder"),
    ):
        status, _, error = cli("pairs", *arguments)
        assert status == 2
        assert said in error


def test_real_photos(test_data: Path) -> None:
    folder = test_data / "coco_free"
    rows = draw_pairs(read_annotations([folder / "annotations.json"]), folder / "images", folder / "images", n=4)
    assert [row["sort"] for row in rows] == ["conflicting"] * 4 + ["complementary"] * 4
