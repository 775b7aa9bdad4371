"""Models of the Hugging Face hub: what is read here of a repository, and no more."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from counterpoint.types import UserError

_WEIGHED = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder", "controlnet")
_WANTED = [
    "*.json", "*.txt", "diffusion_pytorch_model*.safetensors", "model*.safetensors",
    *(f"{part}/*.safetensors" for part in _WEIGHED),
]  # fmt: skip
"""A model's parts, or one network; not its copies in a single file."""
_UNWANTED = ["*.fp16.*", "*non_ema*"]


def fetch(source: str) -> Path:
    """The folder of a repository ``owner/name``, downloaded or kept from before: configurations and safetensors, of
    several precisions the full one.

    Raises:
        UserError: it is neither there nor to be had.
    """
    try:
        folder = Path(snapshot_download(source, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
        if not any(folder.rglob("*.safetensors")):  # there are half-precision copies alone, or nothing
            folder = Path(snapshot_download(source, allow_patterns=_WANTED))
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(
            f"there is no folder {source!r}, and it cannot be had from the hub: {str(error).splitlines()[0]}"
        ) from None
    return folder
