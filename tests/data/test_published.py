"""Published sets in the layouts in which they are published, a few pictures each."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counterpoint.conditions.canny import canny
from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.data.beside import Pictures
from counterpoint.data.coco import Ade20k, Coco, CocoPeople, openpose
from counterpoint.data.photos import Photo
from counterpoint.data.published import SETS, PublishedCases
from counterpoint.data.samples import open_photos
from counterpoint.types import UserError


def picture(seed: int = 0, width: int = 96, height: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def person(number: int, image: int, **changes: object) -> dict:
    """Standing upright between x 30 and 60 of a 96 x 64 photo; all keypoints on the middle line."""
    points = np.stack([np.full(17, 45.0), np.linspace(4, 60, 17), np.full(17, 2)], 1)
    one = {
        "id": number,
        "image_id": image,
        "num_keypoints": 17,
        "area": 1800,
        "iscrowd": 0,
        "keypoints": points.ravel().tolist(),
        "segmentation": [[30, 0, 60, 0, 60, 63, 30, 63]],
    }
    return one | changes


def coco(folder: Path, people: list[dict]) -> Path:
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{i:012d}.png", "width": 96, "height": 64} for i in (7, 3, 5)]
    for one in images:
        PIL.Image.fromarray(picture(one["id"])).save(folder / "val2017" / one["file_name"])
    (folder / "annotations" / "person_keypoints_val2017.json").write_text(
        json.dumps({"images": images, "annotations": people})
    )
    return folder


def test_coco_takes_whole_people_and_cuts_their_masks_with_the_photo(tmp_path: Path) -> None:
    photos = CocoPeople(coco(tmp_path, [person(1, 7), person(2, 3, num_keypoints=4), person(3, 5)]), 32)
    assert [photo.id for photo in photos.photos] == [5, 7]
    one = photos[0]
    assert one.image.shape == one.maps["pose"].shape == (32, 32, 3)
    # half the size, then 8 of 48 columns are cut on either side: 30..60 becomes 7..22
    assert one.person[16].nonzero()[0].tolist() == list(range(7, 23))
    drawn = one.maps["pose"].any(-1).any(0).nonzero()[0]
    assert 12 <= drawn.min() <= drawn.max() <= 17, "the pose stands where the person does: at 45 / 2 - 8"


def test_coco_crowds_are_run_lengths_down_the_columns(tmp_path: Path) -> None:
    crowd = {"size": [64, 96], "counts": [0, 64, 95 * 64]}  # the first column
    people = [person(1, 7), person(2, 7, iscrowd=1, num_keypoints=0, segmentation=crowd)]
    mask = CocoPeople(coco(tmp_path, people), 64)[0].person
    assert mask.shape == (64, 64)
    assert not mask[:, 0].any(), "column 0 is outside the middle square"
    people[1]["segmentation"] = {"size": [64, 96], "counts": [16 * 64, 64, 79 * 64]}
    assert CocoPeople(coco(tmp_path / "b", people), 64)[0].person[:, 0].all()


def test_neck_is_between_the_shoulders_and_unseen_joints_are_not_drawn(tmp_path: Path) -> None:
    points = np.zeros((17, 3))
    points[5], points[6] = (20, 10, 2), (60, 30, 2)
    joints = openpose(points.ravel().tolist())
    np.testing.assert_array_equal(joints[[1, 2, 5]], [[40, 20], [60, 30], [20, 10]])
    assert np.isnan(np.delete(joints, [1, 2, 5], 0)).all()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"COCO 2017 is not whole: .*person_keypoints_val2017.json, no .*val2017"):
        CocoPeople(tmp_path, 32)
    with pytest.raises(UserError, match="no pictures"):
        Pictures(tmp_path, 32)
    with pytest.raises(UserError, match=r"data/validation-\*.parquet"):
        SETS["multigen"](tmp_path, 32)
    parquet(tmp_path, ["image", "text"])
    with pytest.raises(UserError, match="no column control_depth; it has image, text"):
        SETS["multigen-depth"](tmp_path, 32)


def parquet(folder: Path, columns: list[str]) -> Path:
    """Seven rows in two files with groups of two."""

    def cell(column: str, row: int) -> object:
        if column in {"text", "prompt"}:
            return f"row {row}"
        file = io.BytesIO()
        PIL.Image.fromarray(np.full((48, 64, 3), row * 10, np.uint8)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    (folder / "data").mkdir(exist_ok=True)
    for part, rows in enumerate((range(4), range(4, 7))):
        table = pa.Table.from_pydict({column: [cell(column, row) for row in rows] for column in columns})
        pq.write_table(table, folder / "data" / f"validation-{part:05d}-of-00002.parquet", row_group_size=2)
    return folder


def test_parquet_rows_in_order_over_files_and_groups(tmp_path: Path) -> None:
    photos = SETS["ade20k"](parquet(tmp_path, ["image", "control_seg", "prompt", "seg_map"]), 32)
    assert len(photos) == 7
    for row in (6, 0, 3, 4):
        assert photos[row].text == f"row {row}"
        assert (photos[row].image == row * 10).all()
        assert photos[row].maps["seg"].shape == (32, 32, 3)


def test_published_classes_come_with_the_case(tmp_path: Path) -> None:
    """``seg_map`` counts from 1, and 0 is unlabelled; without it colours are all there is."""

    def cell(values: np.ndarray) -> dict[str, object]:
        file = io.BytesIO()
        PIL.Image.fromarray(values).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    labels = np.repeat(np.array([[0, 150], [1, 13]], np.uint8), 16, 0).repeat(16, 1)
    (tmp_path / "data").mkdir()
    picture = cell(np.zeros((32, 32, 3), np.uint8))
    row = {"image": picture, "control_seg": picture, "prompt": "a", "seg_map": cell(labels)}
    for columns, wanted in ((tuple(row), [[-1, 149], [0, 12]]), (("image", "control_seg", "prompt"), None)):
        table = pa.Table.from_pylist([{name: row[name] for name in columns}])
        pq.write_table(table, tmp_path / "data" / "validation-00000.parquet")
        case = PublishedCases({"ade20k": SETS["ade20k"](tmp_path, 32)}, {}).alone(0, "seg")
        assert (None if case.classes is None else case.classes[::16, ::16].tolist()) == wanted


def test_cases_of_published_photos(tmp_path: Path) -> None:
    (tmp_path / "bg").mkdir()
    for i in range(3):
        PIL.Image.fromarray(picture(i, 40, 80)).save(tmp_path / "bg" / f"{i}.jpg")
        (tmp_path / "bg" / f"{i}.txt").write_text(f"a photo number {i}\n")
    sets = {
        "coco2017": CocoPeople(coco(tmp_path / "coco", [person(1, 7)]), 32),
        "bg20k": Pictures(tmp_path / "bg", 32),
        "laion": Pictures(tmp_path / "bg", 32),
    }
    extract = {
        "canny": canny,
        "hed": lambda photo: photo,
        "depth": lambda photo: 255 - photo,
        "seg": lambda photo: photo,
    }
    cases = PublishedCases(sets, extract)
    one = cases.conflicting(0, "depth")
    assert set(one.images) == {"pose", "depth"}
    np.testing.assert_array_equal(one.images["depth"], 255 - sets["bg20k"][0].image)
    assert one.person.any()
    assert cases.complementary(2, ("hed", "seg")).prompt == "a photo number 2"
    quiet = cases.silent(0, "split")
    assert not quiet.images["hed"][:, :16].any()
    np.testing.assert_array_equal(quiet.images["hed"][:, 16:], sets["laion"][1].image[:, 16:])
    with pytest.raises(UserError, match="coco2017 has 1 photos only"):
        cases.conflicting(1)
    with pytest.raises(UserError, match="--data ade20k=FOLDER"):
        cases.alone(0, "seg")


def test_published_maps_come_before_extracted_ones() -> None:
    photo = Photo(picture(), "x", {"depth": picture(1)})
    case = PublishedCases({"multigen-depth": [photo]}, {"depth": lambda _: pytest.fail("not asked")}).alone(0, "depth")
    np.testing.assert_array_equal(case.images["depth"], picture(1))


def test_palette_has_ade20ks_person_where_ade20k_has_it() -> None:
    assert ADE20K_PALETTE[12].tolist() == [150, 5, 61]
    assert len(np.unique(ADE20K_PALETTE, axis=0)) == 149


def test_coco_with_all_that_it_has(tmp_path: Path) -> None:
    coco(tmp_path, [person(1, 7)])
    notes = tmp_path / "annotations"
    images = json.loads((notes / "person_keypoints_val2017.json").read_text())["images"]
    captions = [{"image_id": 7, "caption": "a person \n"}, {"image_id": 7, "caption": "second"}]
    (notes / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (notes / "panoptic_val2017").mkdir()
    for one in images:
        halves = np.zeros((64, 96, 3), np.uint8)
        halves[:, 48:] = (1, 1, 0)
        PIL.Image.fromarray(halves).save(notes / "panoptic_val2017" / one["file_name"])
    photos = Coco(tmp_path, 32, "val2017")
    assert [photos[i].text for i in range(3)] == ["", "", "a person"]
    assert [photos[i].maps["pose"].any() for i in range(3)] == [False, False, True], "nobody there is silence"
    np.testing.assert_array_equal(photos[0].segments, np.where(np.arange(32) < 16, 0, 257)[None].repeat(32, 0))
    (notes / "panoptic_val2017" / images[0]["file_name"]).unlink()
    with pytest.raises(UserError, match=r"there is no .*000000000007.png"):
        photos[2]


def test_people_outside_their_photo(tmp_path: Path) -> None:
    far = person(9, 7, segmentation=[[30, 0, 99, 0, 60, 63, 30, 63]])
    with pytest.raises(UserError, match=r"annotation 9 lies outside its photo 000000000007.png \(96 x 64 pixels\)"):
        CocoPeople(coco(tmp_path, [far]), 32)


def test_ade20k_as_published(tmp_path: Path) -> None:
    for part in ("images", "annotations"):
        (tmp_path / part / "training").mkdir(parents=True)
    PIL.Image.fromarray(picture(0)).save(tmp_path / "images" / "training" / "a.jpg")
    with pytest.raises(UserError, match=r"lacks a.png"):
        Ade20k(tmp_path, 32)
    classes = np.zeros((64, 96), np.uint8)
    classes[:, 48:] = 150
    PIL.Image.fromarray(classes).save(tmp_path / "annotations" / "training" / "a.png")
    seg = open_photos(tmp_path, 32)[0].maps["seg"]
    assert not seg[:, :16].any()
    assert (seg[:, 16:] == ADE20K_PALETTE[149]).all()
    PIL.Image.fromarray(classes + 1).save(tmp_path / "annotations" / "training" / "a.png")
    with pytest.raises(UserError, match="classes beyond 150"):
        Ade20k(tmp_path, 32)[0]


def test_ade20k_as_published_is_a_set_of_cases(tmp_path: Path) -> None:
    for part in ("images", "annotations"):
        (tmp_path / part / "validation").mkdir(parents=True)
    PIL.Image.fromarray(picture(0)).save(tmp_path / "images" / "validation" / "a.jpg")
    classes = np.zeros((64, 96), np.uint8)
    classes[:, 48:] = 150
    PIL.Image.fromarray(classes).save(tmp_path / "annotations" / "validation" / "a.png")
    for scene, text in ((None, "a photo"), ("a living_room", "a photo of a living room"), ("a misc", "a photo")):
        if scene is not None:
            (tmp_path / "sceneCategories.txt").write_text(f"{scene}\n")
        case = PublishedCases({"ade20k": SETS["ade20k"](tmp_path, 32)}, {}).alone(0, "seg")
        assert case.prompt == text
        assert case.classes[0, 0] == -1, "unlabelled"
        assert case.classes[0, 31] == 149
