"""Condition images for whole folders: whole or absent, never made twice, on one core or many."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from counterpoint.apps.extract_batch import Filled, extract_batch
from counterpoint.apps.extract_shards import extract_shards
from counterpoint.conditions.canny import canny
from counterpoint.conditions.image import decode_image, read_image
from counterpoint.conditions.recognise import WrongPicture
from counterpoint.data.samples import open_photos
from counterpoint.types import UserError
from tests.data.test_annotations import coco
from tests.data.test_photos import shard
from tests.data.test_published import parquet as write_parquet
from tests.data.test_published import person, picture


def photos(folder: Path, count: int = 4) -> Path:
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (40, 60, 3)).astype(np.uint8)
        PIL.Image.fromarray(noise).save(folder / "images" / f"{i:03d}.png")
    (folder / "images" / "000.txt").write_text("noise")
    return folder


def here(asked: list[str]) -> Callable[..., Iterator[tuple[str, str | None]]]:
    def run(build: Callable, items: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        work = build()
        for item in items:
            asked.append(item)
            yield item, work(item)

    return run


def test_a_folder_is_filled_and_can_be_trained_on(tmp_path: Path) -> None:
    asked: list[str] = []
    assert extract_batch(photos(tmp_path), "canny", here(asked)) == Filled(4, {})
    made = read_image(tmp_path / "canny" / "images" / "001.png")
    np.testing.assert_array_equal(made, canny(read_image(tmp_path / "images" / "001.png")))
    one = open_photos(tmp_path, 32)[0]
    assert (one.text, list(one.maps)) == ("noise", ["canny"])
    (tmp_path / "canny" / "images" / "002.png").unlink()
    asked.clear()
    assert extract_batch(tmp_path, "canny", here(asked)) == Filled(4, {})
    assert asked == ["images/002.png"], "what is there is not made again"
    extract_batch(tmp_path, "tile", here(asked))
    assert set(open_photos(tmp_path, 32, kinds=["tile"])[3].maps) == {"tile"}
    assert set(open_photos(tmp_path, 32)[3].maps) == {"canny", "tile"}
    assert len(open_photos(tmp_path, 32)) == 4, "what was made is no photo"
    photos(tmp_path / "more", 1)
    assert extract_batch(tmp_path, "canny", here([])) == Filled(5, {}), "what is added is seen"
    assert not (tmp_path / "metadata.jsonl").exists()


def test_damaged_pictures(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    (tmp_path / "images" / "001.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 3 pictures are damaged, 0 may be; .*001.png is not an image"):
        extract_batch(tmp_path, "canny", here([]))
    photos(tmp_path / "many", 100)
    (tmp_path / "many" / "images" / "001.png").write_bytes(b"no picture")
    filled = extract_batch(tmp_path / "many", "canny", here([]))
    assert (filled.there, list(filled.damaged)) == (99, ["images/001.png"])
    assert open_photos(tmp_path / "many", 32).having("canny") == [0, *range(2, 100)]


def test_balanced_edges_stay_in_given_segments(tmp_path: Path) -> None:
    photos(tmp_path, 8)
    halves = np.where(np.arange(60) < 30, 1, 2)[None].repeat(40, 0).astype(np.uint8)
    PIL.Image.fromarray(halves).save(tmp_path / "halves.png")
    rows = [{"file_name": f"images/{i:03d}.png", "segments_file_name": "halves.png"} for i in range(8)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract_batch(tmp_path, "canny", here([]), balanced=True)
    kept = set()
    for i in range(8):
        made = read_image(tmp_path / "canny" / "images" / f"{i:03d}.png")
        whole = canny(read_image(tmp_path / "images" / f"{i:03d}.png"))
        sides = [made[:, :30].any(), made[:, 30:].any()]
        kept.add(tuple(sides))
        for heard, side in zip(sides, (slice(30), slice(30, None)), strict=True):
            np.testing.assert_array_equal(made[:, side], whole[:, side] * heard)
    assert len(kept) > 1
    PIL.Image.fromarray(halves[:20]).save(tmp_path / "halves.png")
    (tmp_path / "canny" / "images" / "000.png").unlink()
    with pytest.raises(UserError, match="60 x 20 pixels"):
        extract_batch(tmp_path, "canny", here([]), balanced=True)
    with pytest.raises(UserError, match="tile has no silent value"):
        extract_batch(tmp_path, "tile", here([]), balanced=True)
    with pytest.raises(UserError, match="balance: True -> False"):
        extract_batch(tmp_path, "canny", here([]))
    (tmp_path / "halves.png").unlink()
    with pytest.raises(UserError, match=r"line 1: there is no file halves\.png"):
        extract_batch(tmp_path, "canny", here([]), balanced=True)


def test_published_images_stay_where_they_are(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    (tmp_path / "theirs.png").write_bytes((tmp_path / "images" / "000.png").read_bytes())
    rows = [{"file_name": f"images/{i:03d}.png"} for i in range(3)]
    rows[1]["canny_file_name"] = "theirs.png"
    rows[2]["canny_file_name"] = "canny/images/002.png"
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="came with canny images already"):
        extract_batch(tmp_path, "canny", here([]), balanced=True)
    asked: list[str] = []
    assert extract_batch(tmp_path, "canny", here(asked)) == Filled(3, {})
    assert asked == ["images/000.png", "images/002.png"], "one to come may be named"
    made = [json.loads(line)["canny_file_name"] for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert made == ["canny/images/000.png", "theirs.png", "canny/images/002.png"]


def test_a_map_where_ours_would_be_is_theirs_until_one_is_made(tmp_path: Path) -> None:
    photos(tmp_path, 2)
    (tmp_path / "canny" / "images").mkdir(parents=True)
    theirs = (tmp_path / "images" / "001.png").read_bytes()
    (tmp_path / "canny" / "images" / "000.png").write_bytes(theirs)
    rows = [{"file_name": f"images/{i:03d}.png"} for i in range(2)]
    rows[0]["canny_file_name"] = "canny/images/000.png"
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="came with canny images already"):
        extract_batch(tmp_path, "canny", here([]), balanced=True)
    asked: list[str] = []
    extract_batch(tmp_path, "canny", here(asked))
    assert asked == ["images/001.png"]
    assert (tmp_path / "canny" / "images" / "000.png").read_bytes() == theirs


def test_pictures_that_no_row_names_are_told(cli, tmp_path: Path) -> None:
    photos(tmp_path, 3)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/000.png"}\n')
    status, _, error = cli("extract", "canny", tmp_path, "--batch", "--workers", 1)
    assert status == 0, error
    assert "metadata.jsonl does not name 2 pictures, such as" in error
    assert "1 canny images" in error


def test_a_missing_map_is_not_replaced(tmp_path: Path) -> None:
    photos(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/000.png", "canny_file_name": "gone.png"}\n')
    with pytest.raises(UserError, match=r"line 1: there is no file gone\.png"):
        extract_batch(tmp_path, "canny", here([]))


def test_killed_at_its_first_picture_it_leaves_no_maps_among_photos(tmp_path: Path) -> None:
    def run(build: Callable, items: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        work = build()
        yield items[0], work(items[0])
        raise KeyboardInterrupt

    photos(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        extract_batch(tmp_path, "canny", run)
    assert (tmp_path / "canny" / "images" / "000.png").exists()
    assert len(open_photos(tmp_path, 32)) == 3


def test_segments_by_sam_serve_balancing(tmp_path: Path) -> None:
    photos(tmp_path, 8)
    colours = np.zeros((40, 60, 3), np.uint8)
    colours[:, :30] = (200, 30, 90)
    PIL.Image.fromarray(colours).save(tmp_path / "sam.png")
    rows = [{"file_name": f"images/{i:03d}.png", "sam_file_name": "sam.png"} for i in range(8)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract_batch(tmp_path, "canny", here([]), balanced=True)
    sides = set()
    for i in range(8):
        made = read_image(tmp_path / "canny" / "images" / f"{i:03d}.png")
        sides.add((bool(made[:, :30].any()), bool(made[:, 30:].any())))
    assert len(sides) > 1


def test_maps_among_the_pictures_are_told(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[20] = 255
    PIL.Image.fromarray(lines).save(tmp_path / "images" / "001.png")
    with pytest.warns(WrongPicture, match=r"1 of 3 pictures .* condition maps already, such as images.001.png"):
        extract_batch(tmp_path, "canny", here([]))


def test_the_split_that_training_reads_is_filled(tmp_path: Path) -> None:
    photos(tmp_path / "train", 2)
    photos(tmp_path / "test", 2)
    for split in ("train", "test"):
        rows = [{"file_name": f"images/{i:03d}.png", "text": "noise"} for i in range(2)]
        (tmp_path / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert extract_batch(tmp_path, "canny", here([])) == Filled(2, {})
    one = open_photos(tmp_path, 32)[1]
    assert (one.text, list(one.maps)) == ("noise", ["canny"])
    assert not (tmp_path / "metadata.jsonl").exists()


HALVES = np.where(np.arange(96) < 48, 1, 2)[None].repeat(64, 0).astype(np.uint8)


def laid_out(folder: Path, sort: str) -> Path:
    """Four photos of 96 x 64 pixels as somebody published them."""
    folder.mkdir()
    if sort == "coco":
        captions = [{"id": i, "image_id": i, "caption": f"photo {i}"} for i in range(4)]
        coco(folder / "in", {"captions": captions, "person_keypoints": [person(9, 2)]}, 4)
        folder = folder / "in"
        names, segments = [f"train2017/{i}.png" for i in range(4)], "annotations/panoptic_train2017"
    else:
        images, segments = {"ade": ("images/training", "annotations/training"), "pets": ("images", "trimaps")}[sort]
        names = [f"{images}/{i}.png" for i in range(4)]
        (folder / images).mkdir(parents=True)
        for i, name in enumerate(names):
            PIL.Image.fromarray(picture(i)).save(folder / name)
    (folder / segments).mkdir(parents=True)
    for i in range(4):
        PIL.Image.fromarray(HALVES).save(folder / segments / f"{i}.png")
    return folder


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("sort", "published"), [("coco", ["pose"]), ("ade", ["seg"]), ("pets", [])])
def test_a_published_data_set_stays_what_it_is(tmp_path: Path, sort: str, published: list, balanced: bool) -> None:
    folder = laid_out(tmp_path / "set", sort)
    before = list(open_photos(folder, 32))
    asked: list[str] = []
    assert extract_batch(folder, "canny", here(asked), balanced=balanced) == Filled(4, {})
    after = open_photos(folder, 32)
    assert not (folder / "metadata.jsonl").exists()
    assert asked == [after.row(i)["file_name"] for i in range(4)]
    assert after.having("canny") == [0, 1, 2, 3]
    for one, other in zip(before, after, strict=True):
        assert (one.text, one.name, list(one.maps)) == (other.text, other.name, published)
        assert set(other.maps) == {*published, "canny"}
        np.testing.assert_array_equal(one.segments, other.segments)
    for i in range(4):
        made = read_image(folder / "canny" / after.row(i)["file_name"])
        whole = canny(read_image(folder / after.row(i)["file_name"]))
        for side in (slice(48), slice(48, None)):
            heard = not balanced or made[:, side].any()
            np.testing.assert_array_equal(made[:, side], whole[:, side] * heard)
    part = Path(after.row(0)["file_name"]).parts[0]
    extract_batch(folder / part, "tile", here([]))
    assert type(open_photos(folder, 32)) is type(after), "a part that is filled by itself does not become the whole"
    (folder / "canny" / after.row(3)["file_name"]).unlink()
    assert open_photos(folder, 32).having("canny") == [0, 1, 2]
    PIL.Image.fromarray(picture(0, 64, 64)).save(folder / "canny" / after.row(0)["file_name"])
    with pytest.raises(UserError, match="has 64 x 64 pixels, its photo 96 x 64: other proportions"):
        open_photos(folder, 32)[0]
    if "seg" in published:
        assert extract_batch(folder, "seg", here([]), source="tiny") == Filled(4, {})
        assert not (folder / "seg" / "images").exists(), "what its publisher drew is not made"
    if "pose" in published:
        with pytest.raises(UserError, match="came with pose images already"):
            extract_batch(folder, "pose", here([]), source="tiny", balanced=True)


def test_segments_by_sam_serve_a_published_data_set(tmp_path: Path) -> None:
    folder = coco(tmp_path, {"captions": [{"id": 1, "image_id": 0, "caption": "a"}]}, 4)
    (folder / "sam" / "train2017").mkdir(parents=True)
    (folder / "sam" / "settings.json").write_text("{}")
    for i in range(4):
        PIL.Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(folder / "sam" / "train2017" / f"{i}.png")
    extract_batch(folder, "canny", here([]), balanced=True)
    for i in range(4):
        made = read_image(folder / "canny" / "train2017" / f"{i}.png")
        np.testing.assert_array_equal(made, canny(picture(i)), "one segment is heard as a whole")
    assert not open_photos(folder, 32)[0].segments.any()


def shards(folder: Path) -> list[Path]:
    """Two, with five photos, the last of which has a map already."""
    folder.mkdir()
    files = {f"{i}.png": _png(picture(i)) for i in range(5)} | {f"{i}.txt": b"a photo" for i in range(5)}
    files["4.canny.png"] = _png(np.zeros((64, 96, 3), np.uint8))
    files["0.segments.png"] = _png(HALVES)
    parts = ((0, 1, 2), (3, 4))
    return [
        shard(folder / f"{number}.tar", {name: content for name, content in files.items() if int(name[0]) in part})
        for number, part in enumerate(parts)
    ]


def _png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_shards_are_filled(tmp_path: Path) -> None:
    paths = shards(tmp_path / "set")
    before = [dict(_members(path)) for path in paths]
    heard: list[tuple[int, int]] = []
    filled = extract_shards(paths, "canny", here([]), listen=lambda *done: heard.append(done))
    assert (filled, heard) == (Filled(5, {}), [(1, 2), (2, 2)])
    for path, old in zip(paths, before, strict=True):
        new = _members(path)
        assert {name: new[name] for name in old} == old, "what was there is there as it was"
    one = open_photos(tmp_path / "set", 32)[2]
    assert (one.text, list(one.maps)) == ("a photo", ["canny"])
    made = decode_image(_members(paths[0])["2.canny.png"], "it")
    np.testing.assert_array_equal(made, canny(picture(2)))
    assert not decode_image(_members(paths[1])["4.canny.png"], "it").any(), "it came with its own"
    asked: list[str] = []
    assert extract_shards(paths, "canny", here(asked)) == Filled(5, {})
    assert asked == []
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["0.tar", "1.tar", "canny"]
    with pytest.raises(UserError, match="balance: False -> True"):
        extract_shards(paths, "canny", here([]), balanced=True)
    (tmp_path / "set" / "canny" / "settings.json").unlink()
    with pytest.raises(UserError, match="the shards hold canny images already"):
        extract_shards(paths, "canny", here([]), balanced=True)


def test_a_map_of_another_sort_is_theirs(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", {"a.png": _png(picture(0)), "a.canny.jpg": _png(picture(1))})
    before = path.read_bytes()
    assert extract_shards([path], "canny", here([])) == Filled(1, {})
    assert path.read_bytes() == before


def test_keys_that_come_twice_are_told_before_the_work(tmp_path: Path) -> None:
    paths = [shard(tmp_path / f"{i}.tar", {"a.png": _png(picture(i))}) for i in range(2)]
    before = [path.read_bytes() for path in paths]
    with pytest.raises(UserError, match="the key a is there twice"):
        extract_shards(paths, "canny", here([]))
    with pytest.raises(UserError, match="the key b has 2 pictures: png, jpg"):
        extract_shards([shard(tmp_path / "2.tar", {"b.png": b"", "b.jpg": b""})], "canny", here([]))
    assert [path.read_bytes() for path in paths] == before


def test_balanced_edges_in_shards(tmp_path: Path) -> None:
    kept = set()
    for seed in range(6):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = shard(folder / "0.tar", {f"{seed}.png": _png(picture(1)), f"{seed}.segments.png": _png(HALVES)})
        extract_shards([path], "canny", here([]), balanced=True)
        made = decode_image(_members(path)[f"{seed}.canny.png"], "it")
        kept.add((bool(made[:, :48].any()), bool(made[:, 48:].any())))
    assert len(kept) > 1


def test_damage_in_shards(tmp_path: Path) -> None:
    files = {f"{i:03d}.png": _png(picture(0)) for i in range(100)} | {"007.png": b"no picture"}
    path = shard(tmp_path / "0.tar", files)
    filled = extract_shards([path], "canny", here([]))
    assert filled.there == 99
    assert [reason for reason in filled.damaged.values() if "0.tar:007 is not an image" in reason]
    path = shard(tmp_path / "0.tar", {"a.png": b"no picture", "b.png": _png(picture(0))})
    with pytest.raises(UserError, match="1 of 2 pictures are damaged, 0 may be"):
        extract_shards([path], "canny", here([]))
    assert "b.canny.png" in _members(path), "what was made stays"
    before = path.stat().st_ino
    with pytest.raises(UserError, match="1 of 2 pictures"):
        extract_shards([path], "canny", here([]))
    assert path.stat().st_ino == before, "a shard that gains nothing is not written"


def test_a_killed_shard_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shards(tmp_path / "set")
    before = [path.read_bytes() for path in paths]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tarfile.TarFile.addfile", killed)
    with pytest.raises(KeyboardInterrupt):
        extract_shards(paths, "canny", here([]))
    assert [path.read_bytes() for path in paths] == before
    assert not list((tmp_path / "set").glob(".*"))


def test_a_table_is_not_filled(tmp_path: Path) -> None:
    write_parquet(tmp_path, ["image", "text"])
    with pytest.raises(UserError, match="is a table: --batch fills folders of pictures and tar files"):
        extract_batch(tmp_path, "canny", here([]))


def _members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_names_that_differ_in_their_suffix(tmp_path: Path) -> None:
    photos(tmp_path, 1)
    (tmp_path / "images" / "000.jpg").write_bytes((tmp_path / "images" / "000.png").read_bytes())
    with pytest.raises(UserError, match="would both become"):
        extract_batch(tmp_path, "canny", here([]))


def test_the_command_on_shards(cli, tmp_path: Path) -> None:
    shards(tmp_path / "set")
    status, _, error = cli("extract", "canny", tmp_path / "set", "--batch", "--workers", 1)
    assert status == 0, error
    assert "5 canny images, 0 pictures skipped" in error


def test_the_command(cli, tmp_path: Path) -> None:
    photos(tmp_path)
    status, out, error = cli("extract", "canny", tmp_path, "--batch", "--workers", 1)
    assert (status, out.strip()) == (0, str(tmp_path)), error
    assert "4 canny images, 0 pictures skipped" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["canny", "."], "fill it with --batch"),
        (["canny", "x.png", "--balance"], "belong to --batch"),
        (["canny", "x.png", "--batch"], "wants a folder"),
        (["canny", "x.png", "--out", "./x.png"], "not the photo itself"),
        (["canny", "x.png", "--out", "x.jpg"], "a condition image is a png file"),
        (["canny", ".", "--batch", "--out", "x"], "leave out --out"),
        (["canny", ".", "--batch", "--resolution", "512"], "leave out --resolution"),
        (["smell", ".", "--batch", "--balance"], "unknown control 'smell'"),
        (["depth", ".", "--batch"], "nothing makes depth images of photos without a model"),
        (["canny", ".", "--batch"], "holds no pictures"),
    ],
)
def test_mistakes(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = cli("extract", *arguments)
    assert status == 2
    assert said in error
    assert not list(tmp_path.iterdir())
