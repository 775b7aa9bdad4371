"""GLIGEN (arXiv:2301.07093): things in boxes, as gated self-attention over grounding tokens.

A stock UNet takes it in: blocks that have a ``fuser`` use it when a call brings ``cross_attention_kwargs["gligen"]``,
and without that the UNet is what it was. InteractDiffusion has the same layers and tokens of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, GatedSelfAttentionDense
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection
from safetensors import safe_open
from torch import Tensor, nn

from counterpoint.models.sharing import ldm_block, sharing_copy
from counterpoint.models.weights import check_fit, shapes
from counterpoint.types import UserError

INSTANCES = 30
"""Things a layout can have; padding is seen, so there are always as many tokens."""


def with_fusers(unet: UNet2DConditionModel, embedding: nn.Module) -> UNet2DConditionModel:
    """A UNet that shares all weights with another and has a gated layer in every transformer block; their gates are
    shut.

    Args:
        unet: stays as it is.
        embedding: makes the grounding tokens, as wide as the UNet's text.
    """
    grown = sharing_copy(unet)
    width = grown.config.cross_attention_dim
    for block in grown.modules():
        if isinstance(block, BasicTransformerBlock):
            attention = block.attn1
            block.fuser = GatedSelfAttentionDense(
                attention.query_dim, width, attention.heads, attention.inner_dim // attention.heads
            ).to(attention.to_q.weight)
    grown.position_net = embedding.to(grown.device, grown.dtype)
    return grown


def fuser_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """What :func:`with_fusers` added."""
    return {name: value for name, value in unet.state_dict().items() if _ADDED.search(name)}


def load_gligen(unet: UNet2DConditionModel, file: Path) -> UNet2DConditionModel:
    """A UNet with the grounding layers of a GLIGEN text-box file: a UNet with ``attention_type: gated`` as diffusers
    saves it, or LDM's names.

    Raises:
        UserError: the file is missing, a pickle, damaged, of another UNet, or holds no grounding layers.
    """
    found = fuser_shapes(file)
    first, last = found.get("position_net.linears.0.weight"), found.get("position_net.linears.4.weight")
    text = found.get("position_net.null_positive_feature")
    if first is None or last is None or text is None:
        raise UserError(f"{file} holds no grounding layers of GLIGEN's text boxes (position_net.linears)")
    return load_fusers(with_fusers(unet, GLIGENTextBoundingboxProjection(text[0], last[0])), file)


def fuser_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name in diffusers -> shape of the grounding layers in a file, whatever else it holds.

    Raises:
        UserError: the file is missing, a pickle, or damaged.
    """
    return {new: shape for old, shape in shapes(file).items() if (new := renamed(old)) is not None}


def load_fusers(grown: UNet2DConditionModel, file: Path) -> UNet2DConditionModel:
    """Fill what :func:`with_fusers` added from a file, and return the same UNet.

    Published files hold whole models. What belongs to one is passed over, if it has this UNet's shapes where its names
    tell; what does not is named.

    Raises:
        UserError: something is missing, foreign or of another shape.
    """
    whole = {name.replace(".base_layer.", "."): value for name, value in grown.state_dict().items()}  # under a LoRA
    beside = {_own(old): shape for old, shape in shapes(file).items() if renamed(old) is None and not _REST.match(old)}
    known = {name: whole[name] for name in beside if name in whole}
    check_fit({**known, **fuser_state(grown)}, {**beside, **fuser_shapes(file)}, file, "this UNet")
    with safe_open(file, "pt") as content:
        names = {old: new for old in content.keys() if (new := renamed(old)) is not None}  # noqa: SIM118 - not a dict
        tensors = {new: content.get_tensor(old).to(grown.device, grown.dtype) for old, new in names.items()}
    grown.load_state_dict(tensors, strict=False)
    return grown


_ADDED = re.compile(r"\.fuser\.|^position_net\.")
_PREFIX = re.compile(r"^(model\.)?(diffusion_model\.)?")
_REST = re.compile(
    r"(autoencoder|first_stage_model|text_encoder|cond_stage_model|diffusion|model_ema)\."
    r"|(model\.)?(diffusion_model\.)?(time_embed|middle_block|out|(input|output)_blocks\.(?!0\.0\.weight)\d+)\."
)
"""What else is in published files: other networks, schedules, and a UNet in LDM's names but for its first layer, whose
shape tells UNets apart."""


def _own(name: str) -> str:
    name = _PREFIX.sub("", name)
    return {"input_blocks.0.0.weight": "conv_in.weight"}.get(name, name)


def renamed(name: str) -> str | None:
    """A published name as diffusers has it; ``None`` for what is no part of the grounding layers."""
    name = _PREFIX.sub("", name)
    return ldm_block(name) if _ADDED.search(name) else None
