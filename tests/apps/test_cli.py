"""The command line as a user meets it: what works, and what each mistake says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from counterpoint.apps.cli.main import main
from counterpoint.apps.record import read_recipe, save_png
from counterpoint.models.load import TINY
from tests.conftest import noise

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Condition images of a test scene, and some files that are none."""
    from counterpoint.data.pairs import conflicting

    folder = tmp_path / "maps"
    folder.mkdir()
    for kind, picture in conflicting(0).images.items():
        Image.fromarray(picture).save(folder / f"{kind}.png")
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "seg.png").read_bytes()[:300])
    return folder


def test_generate(cli, maps: Path) -> None:
    status, out, err = cli(
        "generate",
        "a person on a meadow",
        "--control",
        f"pose={maps}/pose.png",
        "--control",
        f"seg={maps}/seg.png",
        "--weight",
        "seg=0:1,0.5:0.4",
        "--window",
        "pose=0:0.6",
        "--steps",
        4,
        "--n",
        2,
        "--seed",
        5,
        "--json",
    )
    assert status == 0, err
    record = json.loads(out)
    assert record["seeds"] == [5, 6]
    assert record.keys() >= {"schema", "images", "seeds", "seconds", "steps", "fusion", "model"}
    for path, seed in zip(record["images"], record["seeds"], strict=True):
        with Image.open(path) as picture:
            assert picture.size == (128, 128)
        recipe = read_recipe(Path(path))
        assert recipe["seed"] == seed
        assert recipe["request"]["guidance_scale"] > 1, "the model's own, written down"
        assert recipe["request"]["controls"][0]["window"] == [0.0, 0.6]
        assert set(recipe["controls"]) == {"pose", "seg"}
    assert "controlnet" in cli("cite", record["images"][0])[1]


def test_the_familys_own_control_beside_a_users(cli, maps: Path) -> None:
    own, both = (
        f"seg={TINY / 'controls' / 'seg'}",
        ("--control", f"pose={maps}/pose.png", "--control", f"seg={maps}/seg.png"),
    )
    status, _, err = cli("generate", "x", *both, "--controlnet", own, "--steps", 1)
    assert status == 0, err


def test_a_kind_of_ones_own(cli, maps: Path) -> None:
    """Any name does where its network is given; one that is nearly a kind's is asked about."""
    network, made = TINY / "controls" / "seg", []
    for name in ("seg", "paint:two"):
        given = ("--control", f"{name}={maps}/seg.png", "--controlnet", f"{name}={network}", "--steps", 2, "--json")
        status, out, err = cli("generate", "a meadow", *given)
        assert status == 0, err
        made.append(Image.open(json.loads(out)["images"][0]).tobytes())
    assert made[0] == made[1]
    family = maps.parent / "family"
    (family / "controls").mkdir(parents=True)
    for part in TINY.iterdir():
        if part.name != "controls":
            (family / part.name).symlink_to(part)
    (family / "controls" / "paint-two").symlink_to(network)
    given = ("--model", family, "--control", f"paint:two={maps}/seg.png", "--steps", 2, "--json")
    status, out, err = cli("generate", "a meadow", *given)
    assert status == 0, err
    assert Image.open(json.loads(out)["images"][0]).tobytes() == made[0], "a model may have one of its own"
    near = ("--control", f"posed={maps}/pose.png", "--controlnet", f"posed={TINY}/controls/pose")
    status, _, err = cli("generate", "a meadow", *near, "--control", f"seg={maps}/seg.png", "--steps", 1)
    assert status == 0, err
    assert "'posed' is no kind of control, so its silent value is not known: call it 'pose', or pose:posed" in err


def test_same_command_same_pixels_and_nothing_is_overwritten(cli, maps: Path) -> None:
    command = ("generate", "a red ball", "--control", f"seg={maps}/seg.png", "--steps", 2)
    first, second = (Path(cli(*command)[1].strip()) for _ in range(2))
    assert first != second
    np.testing.assert_array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))


def test_photo_image_to_image_and_inpainting(cli, maps: Path) -> None:
    noise((200, 150), 80).save(maps / "photo.jpg")
    Image.new("L", (128, 128), 255).save(maps / "mask.png")
    status, out, err = cli(
        "generate",
        "a ball",
        "--photo",
        f"canny={maps}/photo.jpg",
        "--init-image",
        maps / "photo.jpg",
        "--inpaint-mask",
        maps / "mask.png",
        "--steps",
        3,
        "--out",
        "one.png",
    )
    assert (status, out.strip()) == (0, "one.png"), err


def test_resizes_any_map(cli, maps: Path) -> None:
    noise((517, 333), 80).convert("P").save(maps / "odd.png")
    for how in ("fill", "fit", "stretch"):
        assert cli("generate", "a ball", "--control", f"seg={maps}/odd.png", "--resize", how, "--steps", 1)[0] == 0


def test_other_sizes(cli, maps: Path) -> None:
    status, out, err = cli(
        "generate", "a ball", "--control", f"seg={maps}/seg.png", "--width", 192, "--height", 96, "--steps", 1
    )
    assert status == 0, err
    assert Image.open(out.strip()).size == (192, 96)


def test_long_prompts_are_cut_with_a_warning(cli) -> None:
    status, _, err = cli("generate", "a red ball " * 20 + "on a meadow", "--steps", 1)
    assert status == 0
    assert err.count("warning:") == 1
    assert "on a meadow" in err


def test_extract(cli, maps: Path) -> None:
    noise((64, 48), 80).save(maps / "photo.jpg")
    status, out, _ = cli("extract", "canny", maps / "photo.jpg")
    assert status == 0
    assert set(np.unique(np.asarray(Image.open(out.strip())))) <= {0, 255}


def test_models(cli) -> None:
    assert "controls:" in cli("models", "list")[1]
    assert "unet" in cli("models", "show", "tiny")[1]
    assert "match their hashes" in cli("models", "verify")[1]


def test_demo(cli, tmp_path: Path) -> None:
    status, out, err = cli("demo", "--steps", 2)
    assert status == 0, err
    page = (tmp_path / out.strip()).read_text()
    for picture in (tmp_path / "counterpoint-demo").glob("*.png"):
        assert picture.name in page
    for report in ("conflict-sum.html", "conflict-cross.html"):
        assert f'href="{report}"' in page
        assert "Who won where" in (tmp_path / "counterpoint-demo" / report).read_text()
    assert "sum, gated" in page
    assert "minimal-impact, trained" in page
    assert "crosscontrolnet" in cli("cite", tmp_path / "counterpoint-demo" / "conflict-cross.png")[1]
    assert "http" not in page.replace("https://github.com", "")


MISTAKES = [
    (("generate", "x", "--control", "pose=missing.png"), "no image missing.png"),
    (("generate", "x", "--control", "pose=maps/text.png"), "not an image"),
    (("generate", "x", "--control", "pose=maps/empty.png"), "not an image"),
    (("generate", "x", "--control", "pose=maps/cut.png"), "damaged"),
    (("generate", "x", "--control", "pose=maps"), "folder"),
    (("generate", "x", "--control", "smell=maps/seg.png"), "and any other whose controlnet is given"),
    (("generate", "x", "--photo", "smell=maps/seg.png", "--controlnet", "smell=x"), "unknown control 'smell'"),
    (("generate", "x", "--control", "maps/seg.png"), "NAME=VALUE"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--control", "seg=maps/pose.png"), "given twice"),
    (
        ("generate", "x", "--control", "canny=maps/seg.png", "--photo", "canny=maps/pose.png"),
        "as --control and as --photo",
    ),
    (("generate", "x", "--photo", "canny=maps/seg.png", "--extractor", "canny=x"), "no model makes canny images"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--extractor", "seg=x"), "needs --photo seg=PHOTO"),
    (("generate", "x", "--fusion", "best"), "unknown fusion 'best'"),
    (("generate", "x", "--model", "nowhere"), "no model 'nowhere'"),
    (("generate", "x", "--model", "maps"), "model_index.json"),
    (("generate", "x", "--model", "maps/model.ckpt"), "pickle"),
    (("generate", "x", "--model", "maps/bad.safetensors"), "damaged"),
    (("generate", "x", "--scheduler", "best"), "unknown scheduler 'best'"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--weight", "seg=nan"), "finite"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--weight", "seg=much"), "0.8"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--weight", "pose=1"), "no control 'pose'"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--mask", "pose=maps/seg.png"), "no control 'pose'"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--mask", "seg=maps/none.png"), "none.png"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--mode", "seg=loud"), "'balanced', 'prompt' or 'control'"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--window", "seg=0:1.5"), "window"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--window", "seg=0.6:0.2"), "window"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--window", "seg=0.6"), "START:END"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--controlnet", "seg=maps/bad.safetensors"), "damaged"),
    (
        ("generate", "x", "--control", "seg=maps/seg.png", "--controlnet", "seg=maps/wrong.safetensors"),
        "not a ControlNet",
    ),
    (("generate", "x", "--control", "mlsd=maps/seg.png"), "no control 'mlsd'"),
    (("generate", "x", "--lora", "maps/wrong.safetensors"), "does not fit"),
    (("generate", "x", "--steps", "0"), "--steps"),
    (("generate", "x", "--steps", "few"), "integer"),
    (("generate", "x", "--guidance-scale", "nan"), "--guidance-scale"),
    (("generate", "x", "--width", "100"), "multiple of 8"),
    (("generate", "x", "--width", "0"), "--width"),
    (("generate", "x", "--strength", "0.5"), "init image"),
    (("generate", "x", "--inpaint-mask", "maps/seg.png"), "init image"),
    (("generate", "x", "--resize", "zoom"), "--resize"),
    (("generate", "x", "--device", "toaster"), "toaster"),
    (("generate", "x", "--dtype", "int4"), "--dtype"),
    (("generate", "x", "--out", "maps/seg.png/inside"), "cannot write"),
    (("generate", "x", "--out", "a.jpg"), ".png"),
    (("generate", "x", "--out", "a.png", "--n", "2"), "give a folder"),
    (("generate",), "'prompt'"),
    (("generate", "x", "--speed", "9"), "--speed"),
    (("train", "tiny-probe", "--set", "output_dir=maps/seg.png/inside"), "cannot write"),
    (("train", "tiny-probe", "--set", "cache_dir=maps/seg.png/inside"), "cannot write"),
    (("train", "sd15-controlnet", "--set", "validation_steps=1"), "validation_steps measures adherence"),
    (("train", "--resume", "tiny-probe", "--set", "output_dir=maps"), "nothing to resume"),
    (("extract", "smell", "maps/seg.png"), "unknown control 'smell'"),
    (("extract", "hed", "maps/seg.png", "--model", "missing.safetensors"), "no weight file missing.safetensors"),
    (("extract", "depth", "maps/seg.png", "--model", "missing"), "there is no model"),
    (("extract", "canny", "missing.png"), "no image"),
    (("cite", "maps/seg.png"), "no counterpoint recipe"),
    (("cite", "maps/text.png"), "not a PNG"),
    (("train", "big"), "unknown recipe"),
    (("train", "tiny-codec", "--set", "steps=1"), "unknown setting"),
    (
        (
            "train",
            "tiny-codec",
            "--resume",
            "--set",
            "output_dir=typo",
            "--set",
            "max_train_samples=2048",
            "--set",
            "cache_dir=maps",
            "--dry-run",
            "--set",
            "seed=x",
        ),
        "seed",
    ),
    (("models", "verify", "maps"), "model_index.json"),
    (("models", "show", "maps/model.ckpt"), "pickle"),
    (("dance",), "dance"),
    (("generate", "x", "--control", "seg=maps/seg.png", "--out", "maps/seg.png"), "is what the picture is made from"),
    (("generate", "x", "--control", "seg:a/../b=maps/seg.png"), "a control is called kind or kind:name"),
    (("generate", "x", "--out", "x.jpg"), "images are written as .png"),
    (("demo", "--seed", "-1"), "--seed"),
    (("generate", "x", "--reader", "depth=maps"), "--reader belongs to --report and --tune"),
    (("serve", "--ray", "h:1"), "cannot share SQLite"),
]


def test_nothing_asked_is_help(cli) -> None:
    for asked in ((), ("models",)):
        status, out, err = cli(*asked)
        assert (status, err) == (2, "")
        assert out.startswith("Usage:")
        assert len(out.splitlines()) > 5


def test_a_folder_may_have_a_dot(cli, tmp_path: Path) -> None:
    status, _, err = cli("generate", "a ball", "--steps", 1, "--out", tmp_path / "runs" / "v1.5")
    assert status == 0, err
    assert len(list((tmp_path / "runs" / "v1.5").glob("*.png"))) == 1
    picture = next((tmp_path / "runs" / "v1.5").glob("*.png"))
    for broken in ({"request": ["x"]}, {"request": {"controls": 3}}):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "broken.png", broken)
        status, _, err = cli("cite", tmp_path / "broken.png")
        assert (status, "carries no recipe" in err) == (2, True), err
    save_png(
        Image.new("RGB", (8, 8)), tmp_path / "odd.png", {"request": {"scheduler": None, "controls": [{"steer": "1"}]}}
    )
    assert "luo2024readout" in cli("cite", tmp_path / "odd.png")[1]
    for out in (picture, tmp_path / "x.jpg"):
        assert cli("replay", picture, "--out", out)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=[" ".join(arguments)[:70] for arguments, _ in MISTAKES]
)
def test_mistakes(cli, maps: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (maps / "bad.safetensors").write_bytes(b"\x00" * 20)
    save_file({"x": torch.zeros(2)}, maps / "wrong.safetensors")
    torch.save({}, maps / "model.ckpt")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = cli(*arguments)
    assert status == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in err
    assert not out
    assert sorted(tmp_path.rglob("*")) == before, "something half-written is left"


def test_full_disk(cli, maps: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = cli("generate", "a ball", "--steps", 1)
    assert status == 2
    assert err.strip().splitlines()[-1] == "error: cannot write counterpoint-out/seed-0.png: No space left on device"
    assert not list((tmp_path / "counterpoint-out").iterdir())


def test_our_own_faults_are_not_the_users(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("counterpoint.apps.run.run", broken)
    monkeypatch.setattr(sys, "argv", ["counterpoint", "generate", "x"])
    with pytest.raises(RuntimeError, match="ours"):
        main()
