"""From training outputs to a family that stock diffusers loads."""

from __future__ import annotations

import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from counterpoint.api import load
from counterpoint.conditions.layout import Instance, Interaction, Layout, Reference
from counterpoint.data import shards
from counterpoint.models.weights import verify_folder
from counterpoint.recipes import RECIPES, parts
from counterpoint.recipes.family import assemble
from counterpoint.training.config import override
from counterpoint.training.order import Draws
from counterpoint.training.stages.diffusion import DiffusionStage


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["interact", "migc", "style"])
def test_adapters_take_a_step_and_come_with_the_family(family: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(family, tmp_path / "family"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 16)
        patch.setattr(parts, "scenes", lambda _, *fields: shards.SceneShards(tmp_path, 0, 32, fields))
        for start in (0, 16):
            shards._render_shard(tmp_path / f"scenes-{start:08d}", start)
            shards._lay_out_shard(tmp_path / f"scenes-{start:08d}", start)
        settings = [f"adapter={name}", f"pretrained_model_name_or_path={copy}"]
        job = RECIPES["tiny-adapter"].build(override(RECIPES["tiny-adapter"].config, settings))
        stage = job.stage
        for key, parameter in stage.unet.named_parameters():
            parameter.requires_grad_(stage.learns(key))
        if name == "interact":
            x, t, text = torch.randn(3, 16, 16, 16), torch.tensor([1, 500, 999]), torch.randn(3, 40, 128)
            both = [
                one(stage, x, t, text, job.samples.batch([0, 1, 2]))
                for one in (type(stage)._predict, DiffusionStage._predict)
            ]
            assert torch.equal(*both), "it begins as the model that it is for"
            tokens = stage.unet.position_net(torch.rand(64, 1, 2, 4), torch.randn(64, 1, 3, 128), torch.ones(64, 1))
            assert (tokens.var(0).mean(-1) > 0.3 * tokens.mean(0).square().mean(-1)).all(), "by what is told"
        loss, _ = stage(job.samples.batch([0, 1, 2]), Draws(0, range(3)), 0)
        loss.backward()
        learning = [p for p in stage.unet.parameters() if p.requires_grad]
        assert 100_000 < sum(p.numel() for p in learning) < 1_000_000
        assert any(p.grad is not None and p.grad.any() for p in learning)
        with torch.no_grad():
            for parameter in learning:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    stage.export(tmp_path / f"adapter-{name}")
    assemble(tmp_path, copy)
    pipe = load(str(copy)).adapted(name)
    things = (Instance("a person", (0.1, 0.2, 0.4, 0.9)), Instance("a red ball", (0.5, 0.5, 0.8, 0.8)))
    told = Layout(things, (Interaction(0, "kicking", 1),), Reference(np.zeros((128, 128, 3), np.uint8)))
    call = partial(pipe, "a person and a red ball", num_inference_steps=2, output_type="latent")
    wanted = load(str(copy))(*call.args, **call.keywords, generator=torch.Generator().manual_seed(0)).images
    assert not torch.equal(call(layout=told, generator=torch.Generator().manual_seed(0)).images, wanted)


def test_every_recipe_resolves() -> None:
    for recipe in RECIPES.values():
        assert recipe.summary
        assert override(recipe.config, ["seed=3"]).seed == 3
