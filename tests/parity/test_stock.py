"""At the neutral setting we are diffusers' own pipelines, bit for bit."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.schedulers import SCHEDULERS, make_scheduler
from tests.conftest import noise

NAMES = ["a", "b"]
PROMPT = "a person on a meadow"


def hints(count: int) -> list[Image.Image]:
    return [noise((64, 64), 60 + 40 * i) for i in range(count)]


def ours(parts: dict, count: int, scheduler: str = "unipc") -> Pipeline:
    networks = dict(zip(NAMES, parts["networks"][:count], strict=False))
    return Pipeline(
        parts["vae"],
        parts["text_encoder"],
        parts["tokenizer"],
        parts["unet"],
        make_scheduler(scheduler, parts["scheduler"].config),
        networks,
    )


def stock(parts: dict, count: int, scheduler: str = "unipc", kind: type = StableDiffusionControlNetPipeline):
    networks = parts["networks"][:count]
    network = {"controlnet": MultiControlNetModel(networks) if count > 1 else networks[0]} if count else {}
    pipe = kind(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=parts["unet"],
        scheduler=make_scheduler(scheduler, parts["scheduler"].config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **network,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SETTINGS = {"num_inference_steps": 4, "negative_prompt": "red", "guidance_scale": 5.0}


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_stock(parts: dict, count: int, dtype: torch.dtype) -> None:
    images = hints(count)
    for model in (parts["vae"], parts["text_encoder"], parts["unet"], *parts["networks"]):
        model.to(dtype)
    try:
        got = ours(parts, count)(
            PROMPT,
            images,
            fusion="sum",
            width=64,
            height=64,
            generator=torch.manual_seed(3),
            output_type="latent",
            num_images_per_prompt=2,
            controlnet_conditioning_scale=[0.7, 1.3][:count] or 1.0,
            control_guidance_end=[0.5, 1.0][:count] or 1.0,
            **SETTINGS,
        ).images
        more = (
            {}
            if not count
            else {
                "image": images if count > 1 else images[0],
                "controlnet_conditioning_scale": [0.7, 1.3] if count > 1 else 0.7,
                "control_guidance_end": [0.5, 1.0] if count > 1 else 0.5,
            }
        )
        kind = StableDiffusionControlNetPipeline if count else StableDiffusionPipeline
        wanted = stock(parts, count, kind=kind)(
            PROMPT,
            generator=torch.manual_seed(3),
            output_type="latent",
            num_images_per_prompt=2,
            width=64,
            height=64,
            **SETTINGS,
            **more,
        ).images
    finally:
        for model in (parts["vae"], parts["text_encoder"], parts["unet"], *parts["networks"]):
            model.to(torch.float32)
    assert torch.equal(got, wanted)


def available() -> list[str]:
    return [
        name
        for name, kind in SCHEDULERS.items()
        if not getattr(diffusers, kind).__module__.startswith("diffusers.utils.dummy")
    ]


@pytest.mark.parametrize("scheduler", available())
def test_every_scheduler_is_stock(parts: dict, scheduler: str) -> None:
    images = hints(2)
    same = {"width": 64, "height": 64, "output_type": "np", **SETTINGS}
    got = ours(parts, 2, scheduler)(PROMPT, images, fusion="sum", generator=torch.manual_seed(3), **same).images
    wanted = stock(parts, 2, scheduler)(PROMPT, images, generator=torch.manual_seed(3), **same).images
    assert torch.equal(torch.from_numpy(got), torch.from_numpy(wanted))


def test_image_to_image_is_stock(parts: dict) -> None:
    images, start = hints(2), noise((64, 64), 90)
    got = ours(parts, 2)(
        PROMPT,
        images,
        image=start,
        strength=0.6,
        fusion="sum",
        width=64,
        height=64,
        generator=torch.manual_seed(3),
        output_type="latent",
        **SETTINGS,
    ).images
    wanted = stock(parts, 2, kind=StableDiffusionControlNetImg2ImgPipeline)(
        PROMPT,
        image=start,
        control_image=images,
        strength=0.6,
        width=64,
        height=64,
        generator=torch.manual_seed(3),
        output_type="latent",
        controlnet_conditioning_scale=1.0,
        **SETTINGS,
    ).images
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_is_stock(parts: dict, strength: float) -> None:
    images, start, mask = hints(2), noise((64, 64), 90), Image.new("L", (64, 64), 0)
    mask.paste(255, (24, 8, 64, 48))
    same = {"width": 64, "height": 64, "mask_image": mask, "strength": strength, "output_type": "latent", **SETTINGS}
    got = ours(parts, 2)(PROMPT, images, image=start, fusion="sum", generator=torch.manual_seed(3), **same).images
    wanted = stock(parts, 2, kind=StableDiffusionControlNetInpaintPipeline)(
        PROMPT,
        image=start,
        control_image=images,
        controlnet_conditioning_scale=1.0,
        generator=torch.manual_seed(3),
        **same,
    ).images
    assert torch.equal(got, wanted)
