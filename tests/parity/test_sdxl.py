"""SDXL in our own loop: a folder saved by diffusers gives diffusers' numbers, and every mechanism works on it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLControlNetImg2ImgPipeline

from counterpoint import attach, load
from counterpoint.fusion import FUSIONS
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.types import UserError
from tests.parity import families

PROMPT = "a person on meadow"
CALL = {"num_inference_steps": 3, "width": 64, "height": 64, "output_type": "latent", "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def stock(parts: dict) -> Any:
    pipe, _ = families.sdxl(parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(stock: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("sdxl")
    stock.save_pretrained(where)
    return where


@pytest.fixture
def pipe(stock: Any) -> Pipeline:
    parts = stock.components
    return Pipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet")},
        scheduler=make_scheduler("ddim", stock.scheduler.config),
        controls=dict(zip(("pose", "seg"), stock.controlnet.nets, strict=True)),
        tokenizer_2=parts["tokenizer_2"],
        text_encoder_2=parts["text_encoder_2"],
        zero_empty_prompt=True,
    )


def test_a_folder_saved_by_diffusers_loads(folder: Path, pipe: Pipeline) -> None:
    """To rounding: weights lie elsewhere in memory, and kernels depend on that."""
    images = families.hints()
    got, wanted = (
        one(PROMPT, images, generator=torch.manual_seed(3), **CALL).images
        for one in (load(str(folder), ["pose", "seg"], scheduler="ddim"), pipe)
    )
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("negative", [{}, {"negative_prompt": "red"}, {"negative_prompt": ""}, {"guidance_scale": 1.0}])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_sum_is_stock(pipe: Pipeline, stock: Any, negative: dict, size: tuple[int, int]) -> None:
    images, same = families.hints(), {**CALL, "height": size[0], "width": size[1], **negative}
    scales = {"controlnet_conditioning_scale": [0.7, 1.3], "control_guidance_end": [0.5, 1.0]}
    same |= {"num_images_per_prompt": 2, **scales}
    got = pipe(PROMPT, images, fusion="sum", generator=torch.manual_seed(3), **same).images
    wanted = stock(PROMPT, image=images, generator=torch.manual_seed(3), **same).images
    assert torch.equal(got, wanted)


def test_image_to_image_is_stock(pipe: Pipeline, stock: Any) -> None:
    *images, start = families.hints(3)
    other = StableDiffusionXLControlNetImg2ImgPipeline(**stock.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    more = {**CALL, "strength": 0.7, "num_inference_steps": 6, "controlnet_conditioning_scale": [1.0, 0.5]}
    got = pipe(PROMPT, images, image=start, fusion="sum", generator=torch.manual_seed(3), **more).images
    wanted = other(PROMPT, image=start, control_image=images, generator=torch.manual_seed(3), **more).images
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_rule_is_the_one_attached_to_stock(pipe: Pipeline, stock: Any, fusion: str) -> None:
    images, told = families.hints(), {"subject": "person"} if FUSIONS[fusion].keys else {}
    got = pipe(PROMPT, images, fusion=fusion, generator=torch.manual_seed(3), **told, **CALL).images
    with attach(stock, fusion, controls=["pose", "seg"], **told):
        wanted = stock(PROMPT, image=images, generator=torch.manual_seed(3), **CALL).images
    assert torch.equal(got, wanted)


def test_alone_and_in_a_batch_with_weighted_and_long_prompts(pipe: Pipeline) -> None:
    images = families.hints()
    prompts = [PROMPT, "a (red ball)1.4 on meadow", '("a person", "on a red meadow").and()']
    long = pipe(prompts[2], images, generator=torch.Generator().manual_seed(2), **CALL).images
    assert torch.isfinite(long).all()
    alone = pipe(prompts[1], images, generator=torch.Generator().manual_seed(1), **CALL).images
    plain = pipe("a red ball on meadow", images, generator=torch.Generator().manual_seed(1), **CALL).images
    assert not torch.allclose(alone, plain, atol=1e-3), "weights weigh"
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = pipe([PROMPT, prompts[1]], images, generator=seeds, **CALL).images
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)


def test_a_missing_part_is_named(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(UserError, match="it has no text_encoder_2"):
        load(str(broken), ["pose", "seg"])


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "cross.* lends keys only", UserWarning)
        yield
