"""Condition images for whole folders: whole or absent, never made twice, on one core or many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from counterpoint.apps.extract_batch import Filled, extract_batch
from counterpoint.conditions.canny import canny
from counterpoint.conditions.image import read_image
from counterpoint.conditions.recognise import WrongPicture
from counterpoint.data.photos import ImageFolder
from counterpoint.data.samples import open_photos
from counterpoint.types import UserError


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
    one = ImageFolder(tmp_path, 32)[0]
    assert (one.text, list(one.maps)) == ("noise", ["canny"])
    (tmp_path / "canny" / "images" / "002.png").unlink()
    asked.clear()
    assert extract_batch(tmp_path, "canny", here(asked)) == Filled(4, {})
    assert asked == ["images/002.png"], "what is there is not made again"
    extract_batch(tmp_path, "tile", here(asked))
    assert list(ImageFolder(tmp_path, 32)[3].maps) == ["canny", "tile"]


def test_damaged_pictures(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    (tmp_path / "images" / "001.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 3 pictures are damaged, 0 may be; .*001.png is not an image"):
        extract_batch(tmp_path, "canny", here([]))
    photos(tmp_path / "many", 100)
    (tmp_path / "many" / "images" / "001.png").write_bytes(b"no picture")
    filled = extract_batch(tmp_path / "many", "canny", here([]))
    assert (filled.there, list(filled.damaged)) == (99, ["images/001.png"])
    rows = [json.loads(line) for line in (tmp_path / "many" / "metadata.jsonl").read_text().splitlines()]
    assert [("canny_file_name" in row) for row in rows] == [True, False, *[True] * 98]


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
    rows[2]["canny_file_name"] = "gone.png"
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="names canny images already"):
        extract_batch(tmp_path, "canny", here([]), balanced=True)
    asked: list[str] = []
    assert extract_batch(tmp_path, "canny", here(asked)) == Filled(3, {})
    assert asked == ["images/000.png", "images/002.png"]
    made = [json.loads(line)["canny_file_name"] for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert made == ["canny/images/000.png", "theirs.png", "canny/images/002.png"]


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


def test_names_that_differ_in_their_suffix(tmp_path: Path) -> None:
    photos(tmp_path, 1)
    (tmp_path / "images" / "000.jpg").write_bytes((tmp_path / "images" / "000.png").read_bytes())
    with pytest.raises(UserError, match="would both become"):
        extract_batch(tmp_path, "canny", here([]))


def test_the_command(cli, tmp_path: Path) -> None:
    photos(tmp_path)
    status, out, error = cli("extract", "canny", tmp_path, "--batch", "--workers", 1)
    assert (status, out.strip()) == (0, str(tmp_path / "metadata.jsonl")), error
    assert "4 canny images, 0 pictures skipped" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["canny", "."], "fill it with --batch"),
        (["canny", "x.png", "--balance"], "belong to --batch"),
        (["canny", "x.png", "--batch"], "wants a folder"),
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
