"""COCO-style annotations: every mistake is named, and costs its photo, not the set, while they are few."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from counterpoint.conditions.plain import PLAIN
from counterpoint.data.annotations import fill, read_annotations
from counterpoint.data.balance import Balanced
from counterpoint.data.coco import Coco, CocoInOne, Pets
from counterpoint.data.samples import PhotoSamples, open_photos
from counterpoint.types import UserError
from tests.data.test_published import person, picture


def coco(folder: Path, notes: dict[str, list], count: int = 1, split: str = "train2017") -> Path:
    """``notes``: sort -> annotations; photo ``i`` of 96 x 64 pixels is ``i.png``."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in range(count)]
    for i in range(count):
        PIL.Image.fromarray(picture(i)).save(folder / split / f"{i}.png")
    for sort, found in notes.items():
        path = folder / "annotations" / f"{sort}_{split}.json"
        path.write_text(json.dumps({"images": images, "annotations": found}))
    return folder


RUNS = {"size": [64, 96], "counts": [0, 64, 95 * 64]}
BAD = {
    "runs larger than the photo": ({"segmentation": RUNS | {"counts": [0, 9999]}}, "run lengths do not fill 96 x 64"),
    "runs of another size": ({"segmentation": RUNS | {"size": [96, 64]}}, "run lengths do not fill"),
    "negative runs": ({"segmentation": RUNS | {"counts": [-64, 64 * 97]}}, "run lengths do not fill"),
    "no counts": ({"segmentation": {"size": [64, 96]}}, "counts is a list"),
    "sixteen keypoints": ({"keypoints": [1] * 48}, "has 48 numbers for keypoints"),
    "a keypoint that is no number": ({"keypoints": [float("nan")] * 51}, "keypoints is a list of finite numbers"),
    "a polygon that is no number": ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "finite numbers"),
    "half a point": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "at least three points"),
    "a box outside": ({"bbox": [90, 0, 20, 10]}, "annotation 9 lies outside its photo 0.png"),
    "a keypoint outside": ({"keypoints": [500, 5, 2] * 17}, "lies outside"),
    "an endless number of keypoints": ({"num_keypoints": float("inf")}, "is malformed"),
    "an endless area": ({"area": float("inf")}, "its area a finite one"),
    "a word for an id": ({"id": "x"}, "its id is a whole number"),
    "a text for a number": ({"num_keypoints": "many"}, "is malformed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_person_is_named_and_costs_a_photo_among_many(case: str, tmp_path: Path) -> None:
    changes, said = BAD[case]
    notes = {"person_keypoints": [person(9, 0) | changes]}
    with pytest.raises(UserError, match=said):
        open_photos(coco(tmp_path / "one", notes), 32)
    (tmp_path / "one" / "train2017" / "0.png").unlink()
    path = tmp_path / "one" / "annotations" / "person_keypoints_train2017.json"
    content = json.loads(path.read_text())
    content["images"] += [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in range(1, 100)]
    path.write_text(json.dumps(content))
    photos = open_photos(tmp_path / "one", 32)
    with pytest.raises(UserError, match=said):
        photos[0]


@pytest.mark.parametrize("order", [1, -1])
def test_nobody_is_there_only_in_photos_whose_people_were_annotated(order: int, tmp_path: Path) -> None:
    files = []
    for sort, images, notes in (
        ("captions", range(3), [{"id": 9, "image_id": 2, "caption": "a"}]),
        ("person_keypoints", range(2), [person(9, 0)]),
    ):
        listed = [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in images]
        files.append(tmp_path / f"{sort}.json")
        files[-1].write_text(json.dumps({"images": listed, "annotations": notes}))
    assert [one.knows_people for one in read_annotations(files[::order])] == [True, True, False]


@pytest.mark.parametrize(
    ("sort", "notes", "said"),
    [
        ("person_keypoints", [{"id": 3, "keypoints": [0] * 51}], "annotation 3 is of no photo"),
        ("person_keypoints", [person(4, 77)], "annotation 4 is of no photo"),
        ("person_keypoints", [person(4, 0), {"id": 5, "image_id": 0}], "annotation 5 of 0.png lacks keypoints"),
        ("captions", [{"id": 2, "image_id": [0], "caption": "a"}], "annotation 2 is of no photo"),
        ("captions", [{"id": 2, "image_id": 0, "caption": None}], "annotation 2 of 0.png has no caption"),
        ("captions", [{"id": 2, "image_id": 0, "caption": "a"}, 5], "annotation 1 is of no photo"),
    ],
)
def test_notes_that_are_none(sort: str, notes: list, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        open_photos(coco(tmp_path, {sort: notes}), 32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (
            b'{"images": [{"id": 1, "file_name": "../a.jpg", "width": 1, "height": 1}]}',
            "a.jpg lies outside the data set",
        ),
        (b'{"images": [{"id": 1, "file_name": "/a.jpg", "width": 1, "height": 1}]}', "jpg lies outside"),
        (b"[]", "no list of images"),
        (b'{"images": [{"id": 1}]}', "a photo has id, file_name, width, height"),
        (b'{"images": [], "annotations": 3}', "its annotations are no list"),
        (json.dumps({"images": [{"id": 1, "file_name": "a", "width": 1, "height": 1}] * 2}).encode(), "there twice"),
    ],
)
def test_files_that_are_none(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_annotations([tmp_path / "a.json"])


def test_a_list_without_photos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its annotations name no photos"):
        open_photos(coco(tmp_path, {"captions": []}, 0), 32)


def test_compressed_run_lengths_are_the_plain_ones(tmp_path: Path) -> None:
    """By hand: ``64`` is ``0`` with more to come, then ``2``; the fourth length is told as its difference from the
    second, ``-60`` as ``4`` with more to come and ``-2``."""
    packed = {"size": [64, 96], "counts": "0P2P2TN" + _packed(94 * 64 - 4 - 64)}
    plain = {"size": [64, 96], "counts": [0, 64, 64, 4, 94 * 64 - 4]}
    masks = []
    for number, shape in enumerate((packed, plain)):
        folder = coco(tmp_path / str(number), {"person_keypoints": [person(1, 0, segmentation=shape)]})
        mask = np.zeros((64, 96), np.uint8)
        fill(mask, Coco(folder, 32).photos[0].people[0].segmentation)
        masks.append(mask)
    np.testing.assert_array_equal(*masks)
    assert masks[0][:, 0].all()
    assert not masks[0][:, 1].any()
    assert masks[0][:4, 2].all()
    assert masks[0].sum() == 68


def _packed(value: int) -> str:
    """A positive number, low bits first."""
    text = ""
    while True:
        bits, value = value & 31, value >> 5
        more = not (value == 0 and not bits & 16)
        text += chr(48 + (bits | 32 * more))
        if not more:
            return text


def test_a_photo_of_another_size_than_its_annotations(tmp_path: Path) -> None:
    folder = coco(tmp_path, {"person_keypoints": [person(9, 0)]})
    PIL.Image.fromarray(picture(0, 48, 32)).save(folder / "train2017" / "0.png")
    with pytest.raises(UserError, match=r"0.png has 48 x 32 pixels; its annotations are for 96 x 64"):
        open_photos(folder, 32)[0]


@pytest.mark.parametrize("sort", ["captions", "person_keypoints"])
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_coco_is_known_by_any_of_its_parts(sort: str, split: str, tmp_path: Path) -> None:
    notes = {"captions": [{"id": 1, "image_id": 0, "caption": "a"}], "person_keypoints": [person(1, 0)]}
    photos = open_photos(coco(tmp_path, {sort: notes[sort]}, split=split), 32)
    assert isinstance(photos, Coco)
    assert (photos[0].text, list(photos[0].maps)) == (("a", []) if sort == "captions" else ("", ["pose"]))


def test_segments_of_other_proportions_belong_to_no_photo(tmp_path: Path) -> None:
    folder = coco(tmp_path, {"person_keypoints": [person(9, 0)]})
    (folder / "annotations" / "panoptic_train2017").mkdir()
    file = folder / "annotations" / "panoptic_train2017" / "0.png"
    PIL.Image.fromarray(picture(0, 48, 32)).save(file)
    assert open_photos(folder, 32)[0].segments.shape == (32, 32)
    PIL.Image.fromarray(picture(0, 64, 64)).save(file)
    with pytest.raises(UserError, match=r"0.png has 64 x 64 pixels, its photo 96 x 64: other proportions"):
        open_photos(folder, 32)[0]


def test_real_photos_with_their_annotations_in_one_file(test_data: Path) -> None:
    photos = open_photos(test_data / "coco_free", 128)
    assert isinstance(photos, CocoInOne)
    assert len(photos) == 137
    every = [photos[number] for number in range(len(photos))]
    assert sum(bool(one.text) for one in every) == 111
    assert sum(one.segments is not None for one in every) == 53
    posed = [one for one in every if "pose" in one.maps and one.maps["pose"].any()]
    assert len(posed) > 10
    assert all(one.person.any() for one in posed)
    samples = PhotoSamples([one for one in every if one.segments is not None], ("control:canny", "segments"), PLAIN)
    batch = Balanced(samples, "canny", 0).batch(range(6))
    whole = samples.batch(range(6))
    for number in range(6):
        kept, edges = batch["control:canny"][number], whole["control:canny"][number]
        for name in whole["segments"][number].unique():
            inside = whole["segments"][number] == name
            assert (kept[inside] == edges[inside]).all() or not kept[inside].any()
    assert batch["control:canny"].sum() < whole["control:canny"].sum()


def test_real_pets_and_their_trimaps(test_data: Path) -> None:
    photos = open_photos(test_data / "pets600" / "small256", 64)
    assert isinstance(photos, Pets)
    assert len(photos) == 600
    assert set(np.unique(photos[0].segments)) == {1, 2, 3}
    with pytest.raises(UserError, match=r"trimaps.*looks like a map of the photo of its name"):
        open_photos(test_data / "pets600", 64)


def test_measured_depth_is_no_photo(test_data: Path) -> None:
    folder = test_data / "rgbd_samples" / "open3d" / "examples" / "TestData" / "RGBD"
    with pytest.raises(UserError, match=r"depth.00000.png looks like a map"):
        open_photos(folder, 64)
    assert len(open_photos(folder / "color", 64)) == 5
