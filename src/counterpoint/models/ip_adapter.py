"""IP-Adapter (arXiv:2308.06721): a picture as part of the prompt. The layers are diffusers' own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from counterpoint.models.sharing import sharing_copy
from counterpoint.models.weights import check_fit, shapes
from counterpoint.types import UserError

TOKENS = 4
"""Tokens that a picture becomes."""


def load_ip_adapter(unet: UNet2DConditionModel, file: Path) -> UNet2DConditionModel:
    """A UNet that shares all weights with another and reads a picture besides its prompt.

    Its calls want ``added_cond_kwargs={"image_embeds": [(b, 1, d)]}``, embeddings of CLIP's image tower.

    Args:
        unet: stays as it is.
        file: safetensors as published: ``image_proj.{proj,norm}`` and ``ip_adapter.NUMBER.to_{k,v}_ip.weight``. Those
            whose ``image_proj`` is more than one layer (plus, full, face) read other things than embeddings.

    Raises:
        UserError: the file is missing, a pickle, damaged, of another UNet, no IP-Adapter, or one of another kind.
    """
    found = shapes(file)
    if not any(name.startswith("ip_adapter.") for name in found):
        raise UserError(f"{file} is no IP-Adapter (image_proj and ip_adapter)")
    projection = found.get("image_proj.proj.weight", ())
    if len(projection) != 2:
        raise UserError(
            f"{file} is no plain IP-Adapter, it has no image_proj.proj.weight: those called plus, full or faceid are "
            "not read here; take the plain one, such as ip-adapter_sd15.safetensors"
        )
    with torch.device("meta"):
        wanted = {**attention_names(unet), **_projection(projection[1], int(unet.config.cross_attention_dim))}
    check_fit(wanted, found, file, "this UNet")
    return _grown(unet, load_file(file))


def check_encoder(unet: UNet2DConditionModel, width: int, file: Path) -> None:
    """Hold the width of an image encoder's embeddings against what a loaded adapter reads.

    Raises:
        UserError: they differ.
    """
    wanted = unet.encoder_hid_proj.image_projection_layers[0].image_embeds.in_features
    if width != wanted:
        raise UserError(
            f"{file} reads embeddings of width {wanted}, and its image encoder makes {width}: put the encoder that it "
            "was trained with in image_encoder/ beside it"
        )


def _projection(embedding: int, text: int) -> dict[str, Tensor]:
    layers = {"proj": nn.Linear(embedding, TOKENS * text), "norm": nn.LayerNorm(text)}
    return {f"image_proj.{part}.{name}": value for part, layer in layers.items()
            for name, value in layer.state_dict().items()}  # fmt: skip


def with_ip_adapter(unet: UNet2DConditionModel, embedding: int) -> UNet2DConditionModel:
    """An untrained one for pictures' embeddings ``(b, 1, embedding)``: it begins with the layers that read the text."""
    new = _projection(embedding, int(unet.config.cross_attention_dim))
    return _grown(unet, {**new, **{name: value.detach().clone() for name, value in attention_names(unet).items()}})


def _grown(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> UNet2DConditionModel:
    parts = {
        part: {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    }
    grown = sharing_copy(unet)
    grown._load_ip_adapter_weights([parts])
    return grown


def attention_names(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Published name -> a tensor of that shape: two layers for each cross-attention, numbered oddly in the order of
    the UNet's processors (down, up, mid)."""
    modules = dict(unet.named_modules())
    names = {}
    for number, processor in enumerate(name for name in unet.attn_processors if "attn2" in name):
        attention = modules[re.sub(r"\.processor$", "", processor)]
        for layer in ("k", "v"):
            names[f"ip_adapter.{2 * number + 1}.to_{layer}_ip.weight"] = getattr(attention, f"to_{layer}").weight
    return names


def adapter_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """What :func:`load_ip_adapter` added, under the published names; of the plain projection only."""
    state: dict[str, Tensor] = {}
    for number, (_, processor) in enumerate((n, p) for n, p in unet.attn_processors.items() if "attn2" in n):
        for layer in ("k", "v"):
            state[f"ip_adapter.{2 * number + 1}.to_{layer}_ip.weight"] = getattr(processor, f"to_{layer}_ip")[0].weight
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    for theirs, ours in (("proj", projection.image_embeds), ("norm", projection.norm)):
        state |= {f"image_proj.{theirs}.{name}": value for name, value in ours.state_dict().items()}
    return state
