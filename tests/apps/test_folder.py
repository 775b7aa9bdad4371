"""Scores of pictures on disk, and what is said when they cannot be had."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint.apps.cli.main import main
from counterpoint.apps.folder import NEEDS
from counterpoint.metrics.similarity import ssim
from counterpoint.metrics.table import METRICS


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``a`` and ``b`` differ by noise; ``maps`` and ``maps2`` are segmentations; several folders are wrong."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a", "b", "maps", "maps2", "empty", "other", "sizes", "broken"):
        (tmp_path / name).mkdir()
    for i in range(3):
        picture = rng.integers(40, 200, (64, 80, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "a" / f"{i}.png")
        Image.fromarray(picture + rng.integers(0, 30, picture.shape).astype(np.uint8)).save(tmp_path / "b" / f"{i}.png")
        classes = np.zeros((64, 80, 3), np.uint8)
        classes[:, 40:] = (255, 0, 0)
        Image.fromarray(classes).save(tmp_path / "maps" / f"{i}.png")
        Image.fromarray(np.roll(classes, 8 * i, 1)).save(tmp_path / "maps2" / f"{i}.png")
        Image.fromarray(picture[:32]).save(tmp_path / "sizes" / f"{i}.png")
        Image.fromarray(picture).save(tmp_path / "other" / f"x{i}.png")
    (tmp_path / "broken" / "0.png").write_bytes(b"no")
    return tmp_path


@pytest.fixture
def evaluate(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["counterpoint", "evaluate", "folder", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def test_pairs(evaluate, folders: Path) -> None:
    status, out, err = evaluate("a", "b", "--metrics", "ssim,psnr,mse,depth_rmse,boundary_f", "--json")
    assert status == 2  # photographs have no classes
    assert "few colours" in err
    status, out, err = evaluate("a", "b", "--metrics", "ssim,psnr,mse,depth_rmse", "--json")
    assert status == 0, err
    record = json.loads(out)
    assert record.keys() >= {"schema", "suite", "n", "rows", "seconds"}
    whole, *files = record["rows"]
    assert [row["name"] for row in files] == ["0.png", "1.png", "2.png"]
    a, b = (
        torch.from_numpy(np.stack([np.array(Image.open(folders / side / f"{i}.png")) for i in range(3)]))
        .permute(0, 3, 1, 2)
        .float()
        .div(255)
        for side in ("a", "b")
    )
    assert whole["metrics"]["ssim"]["mean"] == pytest.approx(float(ssim(a, b).mean()))
    assert whole["metrics"]["ssim"]["low"] <= whole["metrics"]["ssim"]["mean"] <= whole["metrics"]["ssim"]["high"]
    assert json.loads((folders / "counterpoint-evaluation" / "folder" / "results.json").read_text()) == record
    assert "ssim" in (folders / "counterpoint-evaluation" / "folder" / "results.tex").read_text()


def test_segmentations(evaluate) -> None:
    record = json.loads(evaluate("maps2", "maps", "--metrics", "miou,mask_iou,boundary_f", "--json")[1])
    values = [row["metrics"]["miou"]["mean"] for row in record["rows"][1:]]
    # shifted by s of 80 columns, both halves keep 40 - s columns of the 40 + s of their union
    assert values == pytest.approx([1, 32 / 48, 24 / 56])
    assert record["rows"][1]["metrics"]["boundary_f"]["mean"] == 1


def painted(folder: Path, name: str, colour: tuple[int, int, int], columns: slice = slice(None)) -> None:
    folder.mkdir(exist_ok=True)
    picture = np.zeros((64, 80, 3), np.uint8)
    picture[:, columns] = colour
    Image.fromarray(picture).save(folder / name)


def test_a_wrong_picture_is_not_perfect(evaluate, folders: Path) -> None:
    """Colours that the reference lacks are classes of their own; a mask is whatever is bright in some colour."""
    painted(folders / "red", "0.png", (255, 0, 0))
    painted(folders / "black", "0.png", (0, 0, 0))
    painted(folders / "left", "0.png", (255, 0, 0), slice(40))
    painted(folders / "right", "0.png", (255, 0, 0), slice(40, 80))
    for pair, metric in (
        (("red", "black"), "miou"),
        (("black", "left"), "boundary_f"),
        (("left", "right"), "mask_iou"),
    ):
        status, out, err = evaluate(*pair, "--metrics", metric, "--json")
        assert status == 0, err
        assert json.loads(out)["rows"][0]["metrics"][metric]["mean"] == 0, metric
    same = json.loads(evaluate("left", "left", "--metrics", "miou,mask_iou,boundary_f", "--json")[1])
    assert {value["mean"] for value in same["rows"][0]["metrics"].values()} == {1}


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_what_is_not_finite_is_null(evaluate, folders: Path) -> None:
    status, out, err = evaluate("a", "a", "--metrics", "psnr", "--json")
    assert status == 0, err
    record = json.loads(out, parse_constant=no_constants)
    assert record["n"] == 3
    assert record["rows"][0]["metrics"]["psnr"]["mean"] is None
    assert record["rows"][0]["metrics"]["psnr"]["note"] == "no finite number for 3 of 3"
    run = folders / "counterpoint-evaluation" / "folder"
    json.loads((run / "results.json").read_text(), parse_constant=no_constants)
    assert "–" in (run / "results.md").read_text()
    for name in ("a.png", "b.png"):
        painted(folders / "flat", name, (9, 9, 9))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 192, 3)).astype(np.uint8)).save(
        folders / "flat" / "c.png"
    )
    status, out, err = evaluate("flat", "--metrics", "niqe", "--json")
    assert status == 0, err
    values = [row["metrics"]["niqe"] for row in json.loads(out)["rows"]]
    assert [value["mean"] is None for value in values] == [True, True, True, False]
    assert "no finite number for 2 of 3" in values[0]["note"]
    assert "note" not in values[3], "what one picture needed is not said of another"


def test_names_of_measures_count_once(evaluate) -> None:
    record = json.loads(evaluate("a", "b", "--metrics", "ssim, mse,ssim", "--json")[1])
    assert [list(row["metrics"]) for row in record["rows"]] == [["ssim", "mse"]] * 4


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "line 2: no JSON object"), ('{"text": "a"}', "line 2: no JSON object with a file_name"), ("[]", "line 2")],
)
def test_a_broken_listing(evaluate, folders: Path, line: str, said: str) -> None:
    (folders / "a" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' + line)
    status, _, err = evaluate("a", "--metrics", "clip", "--clip", "tiny")
    assert (status, said in err) == (2, True), err


def test_two_files_of_a_name(evaluate, folders: Path) -> None:
    Image.open(folders / "a" / "0.png").save(folders / "a" / "0.jpg")
    status, _, err = evaluate("a", "--metrics", "niqe")
    assert (status, "differ in their suffix" in err) == (2, True), err


def test_small_pictures_have_no_ssim(evaluate, folders: Path) -> None:
    (folders / "small").mkdir()
    Image.new("RGB", (8, 8)).save(folders / "small" / "0.png")
    status, _, err = evaluate("small", "small", "--metrics", "ssim")
    assert (status, "at least 11 pixels" in err) == (2, True), err


@pytest.mark.parametrize("option", [["--fusion", "sum"], ["-n", "5"], ["--data", "laion=a"], ["--seeds", 2]])
def test_options_of_suites_are_refused(evaluate, option: list[str]) -> None:
    status, _, err = evaluate("a", "--metrics", "niqe", *option)
    assert (status, "evaluate folder does not heed it" in err) == (2, True), err


def test_sets_with_the_tiny_tower(evaluate, tiny: Path) -> None:
    status, out, err = evaluate("a", "other", "--metrics", "tower_kid", "--json")
    assert status == 0, err
    (row,) = json.loads(out)["rows"]
    assert row["metrics"]["tower_kid"]["low"] <= row["metrics"]["tower_kid"]["high"]


def test_texts_come_from_a_listing(evaluate, folders: Path, tiny: Path) -> None:
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a red ball"}) for i in range(3)]
    (folders / "a" / "metadata.jsonl").write_text("\n".join(lines))
    status, out, err = evaluate("a", "--metrics", "clip", "--clip", "tiny", "--json")
    assert status == 0, err
    assert 0 <= json.loads(out)["rows"][0]["metrics"]["clip"]["mean"] <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("empty", "--metrics", "niqe"), "no pictures"),
        (("nowhere", "--metrics", "niqe"), "no folder"),
        (("a", "other", "--metrics", "ssim"), "no partner"),
        (("a", "sizes", "--metrics", "ssim"), "80 x 64"),
        (("a", "--metrics", "ssim"), "give a second one"),
        (("a", "b", "--metrics", "fid"), "2048"),
        (("broken", "a", "--metrics", "kid"), "at least 2"),
        (("a", "b", "--metrics", "kid"), "--inception"),
        (("a", "b", "--metrics", "kid", "--inception", "owner/inception"), "cannot be had from the hub"),
        (("a", "other", "--metrics", "tower_kid", "--clip", "owner/clip"), "cannot be had from the hub"),
        (("a", "b", "--metrics", "lpips"), "--lpips"),
        (("a", "b", "--metrics", "lpips", "--lpips", "a/0.png"), "not a safetensors"),
        (("a", "--metrics", "clip", "--clip", "tiny"), "metadata.jsonl"),
        (("b", "--metrics", "clip"), "--clip"),
        (("a", "b", "--metrics", "ms_ssim"), "176"),
        (("broken", "--metrics", "niqe"), "not an image"),
        (("a", "--metrics", "best"), "unknown measure"),
        (("a", "b", "a", "--metrics", "ssim"), "one or two folders"),
        (("a",), "--metrics"),
    ],
)
def test_mistakes(evaluate, folders: Path, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = evaluate(*arguments)
    assert status == 2, err
    assert message in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert not out
    assert not (folders / "counterpoint-evaluation").exists(), "a half-written report is left"


def test_every_measure_says_what_it_is_of() -> None:
    assert set(NEEDS) == set(METRICS)
    assert {needs.of for needs in NEEDS.values()} == {"picture", "text", "pair", "set"}
