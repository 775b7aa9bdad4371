"""Adherence while a ControlNet trains: the one of the suite, on other scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from counterpoint.apps import validation
from counterpoint.apps.cli.train import _validation
from counterpoint.recipes import RECIPES, parts
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
