"""Compiling may change rounding, never what is learned."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from counterpoint.data.shards import SceneShards
from counterpoint.recipes import RECIPES, parts
from counterpoint.training.compiling import compile_in_place
from counterpoint.training.config import override
from counterpoint.training.order import Draws
from counterpoint.training.stage import Stage

COMPILED = sorted(name for name, recipe in RECIPES.items() if recipe.config.torch_compile)


def gradients(stage: Stage) -> dict[str, Tensor]:
    """Of one step on noise, in bf16 as the trainer takes it."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(8, 16, 16, 16, generator=generator),
        "control:pose": torch.randint(0, 256, (8, 128, 128, 3), generator=generator, dtype=torch.uint8),
        "caption": ["a red ball on a meadow"] * 8,
    }
    for module in stage.children():
        module.requires_grad_(False)
    (trained,) = (getattr(stage, name) for name in stage.trained)
    trained.requires_grad_(True).train()
    with torch.no_grad():
        for parameter in trained.parameters():  # behind zero convolutions nothing has a gradient
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = stage(batch, Draws(0, range(8), torch.device("cpu")), 0)
    loss.backward()
    return {name: parameter.grad for name, parameter in trained.named_parameters()}


@pytest.mark.prove
@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own ways
@pytest.mark.parametrize("name", COMPILED)
def test_no_gradient_is_lost(name: str, family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler here")
    monkeypatch.setattr(parts, "latents", lambda *_: SceneShards(family, 0, 2048))
    recipe = RECIPES[name]
    config = override(recipe.config, [f"pretrained_model_name_or_path={family}"])
    plain, compiled = recipe.build(config).stage, recipe.build(config).stage
    for module in compiled.children():
        compile_in_place(module)
    wanted, found = gradients(plain), gradients(compiled)
    lost = [key for key, grad in wanted.items() if found[key].norm() < 0.5 * grad.norm()]
    assert not lost
    error = sum((found[key] - grad).square().sum() for key, grad in wanted.items())
    assert error < 0.1**2 * sum(grad.square().sum() for grad in wanted.values())
