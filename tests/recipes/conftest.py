"""An untrained family, for everything that needs its shape and not its skill."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

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
        return assemble(runs, runs / "family")
