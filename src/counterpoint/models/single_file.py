"""Models in one safetensors file, with diffusers' keys or those of the original LDM code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel

from counterpoint.models.weights import shapes
from counterpoint.types import UserError

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Where configurations come from when none are given: the hub, or its local cache."""


def components_from_file(path: Path, config: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The parts of a Stable Diffusion 1.5 model in one file.

    Raises:
        UserError: the file is damaged, does not fit its configuration, or there is no configuration.
    """
    shapes(path)
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path),
            config=config or SD15,
            torch_dtype=dtype,
            safety_checker=None,
            local_files_only=config is not None,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        if config is None:
            raise UserError(
                f"{path} holds weights only, and the configuration {SD15} cannot be had: "
                "give --config FOLDER, a diffusers folder of the same model family with its tokenizer"
            ) from None
        raise UserError(f"{path} does not load with the configuration {config}: {str(error).splitlines()[0]}") from None
    return {
        "vae": pipe.vae,
        "text_encoder": pipe.text_encoder,
        "tokenizer": pipe.tokenizer,
        "unet": pipe.unet,
        "scheduler": dict(pipe.scheduler.config),
    }


def controlnet_from_file(path: Path, host: UNet2DConditionModel, dtype: torch.dtype) -> ControlNetModel:
    """A ControlNet in one file: its configuration follows from the host's and from the sizes of its hint encoder.

    Raises:
        UserError: the file is damaged, or its tensors do not fit the host.
    """
    found = shapes(path)
    widths = hint_widths(found)
    with torch.device("meta"):
        blank = ControlNetModel.from_unet(
            host, conditioning_embedding_out_channels=widths, load_weights_from_unet=False
        )
    with tempfile.TemporaryDirectory() as folder:
        blank.save_config(folder)
        try:
            return ControlNetModel.from_single_file(str(path), config=folder, torch_dtype=dtype, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"the ControlNet {path} does not fit the model: {str(error).splitlines()[0]}") from None


def hint_widths(found: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Channels of a ControlNet's hint encoder, one a level, read off its tensors' shapes.

    Raises:
        UserError: there is no hint encoder.
    """
    levels = ("conv_in", *(f"blocks.{i}" for i in range(1, 32, 2)))
    diffusers = [f"controlnet_cond_embedding.{name}.weight" for name in levels]
    prefix = next((name.partition("input_hint_block")[0] for name in found if "input_hint_block" in name), "")
    ldm = [f"{prefix}input_hint_block.{i}.weight" for i in range(0, 64, 4)]
    widths = tuple(found[name][0] for name in (*diffusers, *ldm) if name in found)
    if not widths:
        raise UserError("the file is not a ControlNet: it has no hint encoder")
    return widths
