"""Probes that a user names, or that a model brings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

import counterpoint
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import scene
from counterpoint.models.probe import Probe
from counterpoint.recipes.aligned import usual_layers
from counterpoint.recipes.worlds import SCENES
from counterpoint.types import UserError

KINDS = ("depth", "seg")
DRAWN = (*KINDS, "canny")
"""... and one that nothing reads."""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the tiny family's size, with random weights."""
    folder, unet = tmp_path_factory.mktemp("probes"), counterpoint.load("tiny").unet
    for kind in KINDS:
        torch.manual_seed(0)
        SCENES.new_probe(unet, usual_layers(kind), kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def maps(tmp_path: Path) -> dict[str, Path]:
    for kind in DRAWN:
        PIL.Image.fromarray(control_map(scene(0), kind)).save(tmp_path / f"{kind}.png")
    return {kind: tmp_path / f"{kind}.png" for kind in DRAWN}


def test_a_picture_is_steered_and_the_page_shows_how_closely(cli, probes: dict, maps: dict) -> None:
    given = [f"--control=depth={maps['depth']}", f"--control=canny={maps['canny']}"]
    given += [f"--probe=depth={probes['depth']}", "--steps", 4, "--json", "--report"]
    found = {}
    for share in (0, 0.1):
        status, out, error = cli("generate", "a room", *given, "--steer", f"depth={share}", "--out", f"{share}.png")
        assert status == 0, error
        found[share] = np.asarray(PIL.Image.open(json.loads(out)["images"][0]))
    assert not np.array_equal(found[0], found[0.1])
    page = Path("0.1.html").read_text()
    assert "Followed from inside" in page
    assert "error of depth over the steps" in page
    assert "error of canny over the steps" not in page, "nothing reads it"
    status, _, error = cli("replay", "0.1.png", "--verify")
    assert status == 0, error


def test_a_model_brings_its_own(maps: dict) -> None:
    pipe = counterpoint.load("tiny", ["depth", "seg:floor"])
    assert list(pipe.readouts) == ["depth", "seg:floor"]
    images = [PIL.Image.open(maps[kind]) for kind in KINDS]
    report = pipe("a room", images, num_inference_steps=2, report=True).report
    assert all(error.item() > 0 for steps in report.errors.values() for error in steps)


def test_classes_are_told_by_their_colours(probes: dict, maps: dict) -> None:
    """A reading that is right everywhere has no error, and one that is wrong everywhere a large one."""
    readout = counterpoint.load("tiny", ["seg"], probes={"seg": str(probes["seg"])}).readouts["seg"]
    hint = torch.from_numpy(np.array(PIL.Image.open(maps["seg"]))).permute(2, 0, 1)[None] / 255
    small = torch.from_numpy(scene(0).seg[2::4, 2::4].astype(np.int64))
    right = 100.0 * torch.nn.functional.one_hot(small, SCENES.classes).permute(2, 0, 1)[None]
    assert readout.error(right, hint).item() < 1e-3
    assert readout.error(right.roll(1, 1), hint).item() > 10


def test_what_reads_nothing_is_refused(cli, tiny: Path, probes: dict, maps: dict, tmp_path: Path) -> None:
    control = ["generate", "a room", f"--control=depth={maps['depth']}"]
    for given, said in (
        ([f"--control=canny={maps['canny']}", "--steer", "canny=0.1"], "nothing reads canny from the model's features"),
        (["--steer", "depth=much"], "a weight is a number such as 0.8"),
        (["--steer", "seg=0.1"], "there is no control 'seg'"),
        (["--probe", f"depth={tmp_path / 'nowhere'}"], "there is no probe in"),
        (["--probe", f"depth={tmp_path / 'other'}"], "the probe is for another denoiser"),
        (["--probe", f"depth={tmp_path / 'head.safetensors'}"], "is no readout head"),
    ):
        Probe((16, 8), 64, 32, (16, 8), 1, size=8).save_pretrained(tmp_path / "other")
        save_file({"a": torch.zeros(1)}, tmp_path / "head.safetensors")
        status, _, error = cli(*control, *given)
        assert (status, error.count("\n")) == (2, 1), error
        assert said in error
    with pytest.raises(UserError, match="a probe for seg, and there is no such control"):
        counterpoint.load("tiny", ["depth"], probes={"seg": str(probes["seg"])})
    with pytest.raises(UserError, match="probes read depth"):
        counterpoint.load("tiny", {"tile": str(tiny / "controls" / "canny")}, probes={"tile": str(probes["seg"])})
