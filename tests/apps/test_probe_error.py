"""What can be read at which noise level: both curves are those of their definitions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch

from counterpoint.apps import probe_error
from counterpoint.recipes import RECIPES
from counterpoint.recipes.aligned import usual_layers
from counterpoint.recipes.worlds import SCENES
from counterpoint.training.config import override
from counterpoint.types import UserError


@pytest.fixture
def family(tiny: Path, tmp_path: Path) -> Path:
    """The shipped one, with probes that have learned nothing."""
    for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler", "judges"):
        shutil.copytree(tiny / part, tmp_path / "family" / part)
    unet = SCENES.unet(override(RECIPES["tiny-probe"].config, []))
    for kind in probe_error.READ:
        torch.manual_seed(0)
        SCENES.new_probe(unet, usual_layers(kind), kind).save_pretrained(tmp_path / "family" / "probes" / kind)
    return tmp_path / "family"


def test_a_judge_reads_clean_pictures_and_no_noise(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_error, "LEVELS", 2)
    out = probe_error.report(family, tmp_path / "out", n=2)
    found = json.loads((out / "probe-error.json").read_text())
    assert found["kinds"].keys() == found["noisy_half"].keys() == {*probe_error.READ}
    for curve in found["kinds"].values():
        assert curve["timesteps"] == [250, 750]
        assert 0 < curve["judge"][0] < curve["judge"][1], "what the picture shows fades"
        assert curve["judge"][0] < curve["probe"][0]
    assert found["noisy_half"]["seg"]["probe"] == found["kinds"]["seg"]["probe"][1]
    with PIL.Image.open(out / "probe-error.png") as page:
        assert page.size == (1600, 320)


@pytest.mark.parametrize("kind", probe_error.READ)
def test_a_shipped_probe_reads_noise_better_than_the_judge(
    kind: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InnerControl's figure 2, at the noisy half."""
    if not (tiny / "probes" / kind).is_dir():
        pytest.skip("the family has no such probe")
    monkeypatch.setattr(probe_error, "LEVELS", 4)
    curve = probe_error.curves(tiny, kind, 32)
    assert sum(curve["probe"][2:]) < sum(curve["judge"][2:])
    if kind != "pose":  # the judge sees joints, and limbs are drawn between them
        assert curve["judge"][0] < curve["probe"][0], "and worse where the picture shows"


def test_a_family_without_probes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no probe for depth, hed, lineart, pose, seg"):
        probe_error.report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
