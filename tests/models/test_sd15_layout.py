"""Stable Diffusion 1.5 as it is published: real configurations on the meta device, and single files with LDM's keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from counterpoint import load
from counterpoint.models.load import load_components, load_controls
from counterpoint.models.single_file import hint_widths
from counterpoint.models.weights import check_fit
from tests.conftest import random_parts
from tests.models.ldm import controlnet_name, unet_name, vae_name

# The published configurations of runwayml/stable-diffusion-v1-5 and lllyasviel/control_v11p_sd15_*.
CROSS = ("CrossAttnDownBlock2D",) * 3
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*CROSS, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**UNET)


def test_sizes_are_the_published_ones(unet: UNet2DConditionModel) -> None:
    with torch.device("meta"):
        modules = (unet, ControlNetModel.from_unet(unet), AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**TEXT)))
    counts = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert counts == [859_520_964, 361_279_120, 83_653_863, 123_060_480]
    assert len(unet.state_dict()) == 686


def test_every_published_unet_tensor_maps(unet: UNet2DConditionModel) -> None:
    attention = (False, True, True, True)
    published = {
        f"model.diffusion_model.{unet_name(name, 2, attention)}": value for name, value in unet.state_dict().items()
    }
    assert len(published) == 686
    mapped = convert_ldm_unet_checkpoint(published, dict(unet.config))
    check_fit(unet.state_dict(), {name: tuple(value.shape) for name, value in mapped.items()}, "the published layout")


def test_every_published_controlnet_tensor_maps(unet: UNet2DConditionModel) -> None:
    with torch.device("meta"):
        network = ControlNetModel.from_unet(unet)
    published = {controlnet_name(name, 2, 6): value for name, value in network.state_dict().items()}
    assert hint_widths({name: tuple(value.shape) for name, value in published.items()}) == (16, 32, 96, 256)
    mapped = convert_controlnet_checkpoint(published, dict(network.config))
    check_fit(
        network.state_dict(), {name: tuple(value.shape) for name, value in mapped.items()}, "the published layout"
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model of SD1.5's shape, as a diffusers folder and as one file with LDM's keys."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    parts = random_parts(controls=0)
    unet = UNet2DConditionModel(
        **{**UNET, "sample_size": 8, "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 32},
        norm_num_groups=4,
    )
    vae = AutoencoderKL(**{**VAE, "sample_size": 64, "block_out_channels": (8, 8, 8, 8)}, norm_num_groups=4)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=unet,
        scheduler=parts["scheduler"],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "diffusers")
    attention = (False, True, True, True)
    tensors = {f"model.diffusion_model.{unet_name(k, 2, attention)}": v for k, v in unet.state_dict().items()}
    for name, value in vae.state_dict().items():
        linear = ".attentions.0.to_" in name and name.endswith("weight")
        tensors[f"first_stage_model.{vae_name(name, 4)}"] = value[..., None, None] if linear else value
    for name, value in parts["text_encoder"].state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder / "diffusers", folder / "model.safetensors"


def test_single_file_equals_folder(small: tuple[Path, Path]) -> None:
    folder, file = small
    settings = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np"}
    wanted = load(str(folder))("a red ball", generator=torch.manual_seed(0), **settings).images
    got = load(str(file), config=str(folder))("a red ball", generator=torch.manual_seed(0), **settings).images
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_controlnet_with_ldm_keys(small: tuple[Path, Path], tmp_path: Path) -> None:
    host = load_components(str(small[0]))
    network = ControlNetModel.from_unet(host.unet, conditioning_embedding_out_channels=(4, 8, 8, 12))
    torch.nn.init.normal_(network.controlnet_mid_block.weight)
    tensors = {controlnet_name(name, 2, 6): value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, tmp_path / "control.safetensors")
    loaded = load_controls("x", {"pose": str(tmp_path / "control.safetensors")}, host)["pose"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
