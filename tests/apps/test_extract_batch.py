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
from counterpoint.data.photos import ImageFolder
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
