"""Adherence while a ControlNet trains: the one of the suite, on other scenes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from counterpoint.apps import validation
from counterpoint.apps.cli.train import _validation
from counterpoint.fusion.minimal_impact import INJECTION, BalancedInjection
from counterpoint.models.strength import strength_of, strengthen
from counterpoint.recipes import RECIPES, parts
from counterpoint.recipes.family import STRENGTH, assemble
from counterpoint.recipes.worlds import SCENES
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.types import UserError


def test_adherence_of_the_shipped_controlnet(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "SCENES", 3)
    monkeypatch.setattr(validation, "STEPS", 6)
    config = replace(RECIPES["tiny-mi-stage1"].config, control_type="pose", validation_steps=1)
    host = (parts.unet(config), *parts.denoising(config).values())
    stage = ControlNetStage(SCENES.controlnet(config, "pose"), "pose", *host[:4])
    validate = _validation(stage, config)
    first = validate()
    assert first.keys() == {"value", "adherence"}
    assert first == validate()
    for parameter in stage.controlnet.controlnet_mid_block.parameters():
        parameter.data += 1
    assert validate() != first, "it is the network in training that is measured"
    with pytest.raises(UserError, match="validation_steps measures adherence"):
        _validation(stage, replace(config, pretrained_model_name_or_path=tiny / "unet"))


def test_a_strengthened_controlnet_is_one_at_a_larger_scale(tiny: Path) -> None:
    network = ControlNetModel.from_pretrained(tiny / "controls" / "canny", torch_dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    given = {
        "sample": torch.randn(2, network.config["in_channels"], 16, 16, generator=draw),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, 7, network.config["cross_attention_dim"], generator=draw),
        "controlnet_cond": torch.rand(2, 3, 128, 128, generator=draw),
    }
    with torch.no_grad():
        wanted = network(**given, conditioning_scale=2.5)
        strengthen(network, 2.5)
        found = network(**given)
    for one, other in zip(
        (*wanted.down_block_res_samples, wanted.mid_block_res_sample),
        (*found.down_block_res_samples, found.mid_block_res_sample),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_the_family_takes_the_strength_that_was_found(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "control-seg"
    shutil.copytree(tiny / "controls" / "seg", run)
    monkeypatch.setattr(validation, "STEPS", 4)
    monkeypatch.setattr(validation, "STRENGTHS", (0.0, 1.0, 1.5))
    family = shutil.copytree(tiny, tmp_path / "family")
    shutil.copytree(family / "judges" / "a", family / "judges" / "b", dirs_exist_ok=True)
    validation.calibrate(run, family, "seg", 4)
    found = json.loads((run / STRENGTH).read_text())
    assert found["adherence"].keys() == {"0.0", "1.0", "1.5"}
    assert found["adherence"]["0.0"] == 0, "a mute control is the floor"
    assert found["strength"] in {1.0, 1.5}
    assemble(tmp_path, family)
    trained, shipped = (
        ControlNetModel.from_pretrained(folder).controlnet_mid_block.weight
        for folder in (run, family / "controls" / "seg")
    )
    torch.testing.assert_close(shipped, trained * found["strength"], rtol=1e-3, atol=1e-5)


def test_a_balanced_injection_is_tried_either_way(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strength is the one nearest to 1 that is good enough, taken in as the network was trained."""
    network, injection = ControlNetModel.from_pretrained(tiny / "controls" / "pose"), BalancedInjection("min-norm")
    strengthen(network, 1 / strength_of(network))
    network.register_to_config(**{INJECTION: asdict(injection)})
    network.save_pretrained(tmp_path)

    class Known:
        def __init__(self, *settings: object) -> None:
            assert settings[-1] == injection.rule

        def __call__(self, network: ControlNetModel) -> dict[str, float]:
            return {"adherence": 0.7 if strength_of(network) in {0.4, 0.65, 2.0} else 0.6}

    monkeypatch.setattr(validation, "Adherence", Known)
    monkeypatch.setattr("sys.argv", ["validation", str(tmp_path), str(tiny), "pose", str(tmp_path / "calibrated")])
    validation.main()
    assert strength_of(ControlNetModel.from_pretrained(tmp_path / "calibrated")) == 0.65
    found = json.loads((tmp_path / STRENGTH).read_text())
    assert found["strength"] == 0.65
    assert min(map(float, found["adherence"])) < 1 < max(map(float, found["adherence"]))
