"""An untrained family, for everything that needs its shape and not its skill."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from counterpoint.data.shards import SceneShards
from counterpoint.recipes import RECIPES, parts
from counterpoint.recipes.family import assemble
from counterpoint.training.config import override


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every member as its recipe builds it, untrained."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source in ("scenes", "latents"):
            patch.setattr(parts, source, lambda *_, **__: SceneShards(runs, 0, 2048))

        def export(recipe: str, run: str, *settings: str) -> None:
            config = override(RECIPES[recipe].config, [*settings])
            RECIPES[recipe].build(config).stage.export(runs / run)

        folder = f"pretrained_model_name_or_path={runs / 'family'}"
        export("tiny-codec", "codec")
        export("tiny-towers", "towers")
        assemble(runs, runs / "family")
        export("tiny-base", "base", folder)
        assemble(runs, runs / "family")
        export("tiny-controlnet", "control-pose", folder, "control_type=pose")
        for name in "ab":
            export("tiny-judge", f"judge-{name}", f"judge={name}")
        place = runs / "control-pose"
        network = ControlNetModel.from_pretrained(place)
        for last in network.controlnet_down_blocks:
            torch.nn.init.normal_(last.weight, std=0.01)  # what says nothing learns nothing by some rules
        network.save_pretrained(place)
        config = json.loads((place / "config.json").read_text())
        assert config.pop("_control_type") == "pose"
        (place / "config.json").write_text(json.dumps(config))  # it will do for every kind
        return assemble(runs, runs / "family")
