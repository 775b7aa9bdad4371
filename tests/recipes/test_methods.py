"""The papers' methods build what they say and take a step, on an untrained family."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from counterpoint.data.balance import Balanced
from counterpoint.data.scenes.vocabulary import SEG_CLASSES
from counterpoint.data.shards import SceneShards
from counterpoint.recipes import RECIPES, parts
from counterpoint.training.config import override
from counterpoint.training.order import Draws
from counterpoint.training.stage import Stage
from counterpoint.training.stages.probe import AlignmentStage
from counterpoint.training.stages.reward import RewardStage
from counterpoint.types import UserError


@pytest.fixture
def build(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stage of a recipe on a family that has a ControlNet of every kind."""
    monkeypatch.setattr(parts, "latents", lambda *_: SceneShards(tmp_path, 0, 2048))
    copy = Path(shutil.copytree(family, tmp_path / "family"))
    for kind in ("depth", "hed", "seg"):
        shutil.copytree(copy / "controls" / "pose", copy / "controls" / kind)

    def make(recipe: str, *settings: str) -> Stage:
        config = override(RECIPES[recipe].config, [f"pretrained_model_name_or_path={copy}", *settings])
        return RECIPES[recipe].build(config).stage

    make.family = copy
    return make


def batch(kind: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(4, 16, 16, 16, generator=generator),
        "caption": ["a red ball on a meadow"] * 4,
        f"control:{kind}": torch.randint(0, 256, (4, 128, 128, 3), generator=generator).byte(),
        "seg": torch.randint(len(SEG_CLASSES), (4, 128, 128), generator=generator).byte(),
    }


@pytest.mark.parametrize("kind", ["depth", "hed", "seg"])
def test_probes_then_aligned_controlnets(build, kind: str) -> None:
    stage = build("tiny-probe", f"control_type={kind}")
    loss, _ = stage(batch(kind), Draws(0, range(4)), 0)
    loss.backward()
    assert all(p.grad is not None for p in stage.probe.parameters())
    assert sum(p.numel() for p in stage.probe.parameters()) < 200_000
    stage.export(build.family / "probes" / kind)
    everywhere = ["max_timestep_rewarding=999", f"control_type={kind}"]
    for method, expected in (("controlnet++", RewardStage), ("ctrl-u", RewardStage), ("innercontrol", AlignmentStage)):
        stage = build(f"tiny-{method}", *everywhere)
        assert type(stage) is expected
        assert (stage.uncertainty is not None) == (method == "ctrl-u")
        assert stage.weight == {"depth": 0.5, "hed": 1.0, "seg": 0.5}[kind]
        loss, extra = stage(batch(kind), Draws(0, range(4)), 0)
        assert loss.isfinite()
        assert extra["reward"] > 0
        loss.backward()
        assert stage.controlnet.controlnet_mid_block.weight.grad.abs().sum() > 0


def test_what_is_missing_is_said(build) -> None:
    with pytest.raises(UserError, match="no probes/depth"):
        build("tiny-innercontrol")
    with pytest.raises(UserError, match="judge B reads depth, hed and seg"):
        build("tiny-controlnet++", "control_type=lineart", f"controlnet_model_name_or_path={build.family}/controls/hed")
    shutil.rmtree(build.family / "judges" / "b")
    with pytest.raises(UserError, match="no judges/b"):
        build("tiny-controlnet++")


@pytest.mark.parametrize(
    "settings",
    [
        ["balanced=false", "injection=sum"],
        ["injection=literal"],
        ["conservativity_estimator=paired"],
        ["conservativity_estimator=symmetric", "injection=sum"],
    ],
)
def test_controlnets_that_make_way(build, settings: list[str]) -> None:
    start = f"controlnet_model_name_or_path={build.family / 'controls' / 'pose'}"
    number = 2 if settings[0].startswith("conservativity") else 1
    stage = build(f"tiny-mi-stage{number}", "control_type=pose", start, *settings)
    with torch.autocast("cpu", torch.bfloat16):
        loss, extra = stage(batch("pose"), Draws(0, range(4)), 0)
    assert loss.isfinite()
    assert ("asymmetry" in extra) == (number == 2)
    loss.backward()
    assert stage.controlnet.controlnet_mid_block.weight.grad is not None
    with pytest.raises(UserError, match="there is no ControlNet"):
        build("tiny-mi-stage1", "controlnet_model_name_or_path=nowhere")


def test_balanced_scenes(build, tmp_path: Path) -> None:
    places = {"pretrained": build.family, "controlnet": build.family / "controls" / "pose"}
    job = RECIPES["tiny-mi-stage1"].build(
        override(
            RECIPES["tiny-mi-stage1"].config,
            [f"{key}_model_name_or_path={place}" for key, place in places.items()],
        )
    )
    assert isinstance(job.samples, Balanced)
    assert "segments" in job.samples.samples.fields.values()
