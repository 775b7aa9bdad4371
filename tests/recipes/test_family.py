"""From training outputs to a family that stock diffusers loads."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from counterpoint.models.weights import verify_folder
from counterpoint.recipes import RECIPES
from counterpoint.training.config import override


def test_stock_diffusers_loads_it(family: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(family, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a red ball on a meadow", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 128, 128, 3)


def test_towers_keep_their_projections(family: Path) -> None:
    text = CLIPTextModelWithProjection.from_pretrained(family / "text_encoder")
    plain = CLIPTextModel.from_pretrained(family / "text_encoder")
    image = CLIPVisionModelWithProjection.from_pretrained(family / "image_encoder")
    tokens = torch.tensor([[528, 3, 529]])
    assert torch.equal(text(tokens).last_hidden_state, plain(tokens).last_hidden_state)
    assert text(tokens).text_embeds.shape[-1] == image(torch.zeros(1, 3, 128, 128)).image_embeds.shape[-1] == 128


def test_it_is_half_precision_hashed_and_names_no_machine(family: Path) -> None:
    assert verify_folder(family) > 10
    assert sum(path.stat().st_size for path in family.rglob("*.safetensors")) < 20e6
    for path in family.rglob("config.json"):
        assert "_name_or_path" not in path.read_text()


def test_every_recipe_resolves() -> None:
    for recipe in RECIPES.values():
        assert recipe.summary
        assert override(recipe.config, ["seed=3"]).seed == 3
