"""A denoiser's inner features, as probes read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from counterpoint.types import UserError

Layers = Literal["attention", "convolution"]
"""What is read of the decoder: its self-attention's outputs, or those of its residual blocks' second convolutions."""


@contextmanager
def collecting(unet: UNet2DConditionModel, layers: Layers) -> Iterator[list[Tensor]]:
    """Gather the decoder's features ``(b, c, h, w)`` of every forward pass, in the order of its layers.

    The list is emptied when a pass begins. What the denoiser computes does not change, and gradients flow.
    """
    found: list[Tensor] = []
    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(lambda *_: found.clear()).remove)
        for block in unet.up_blocks:
            if layers == "convolution":
                for resnet in block.resnets:
                    hook = resnet.conv2.register_forward_hook(lambda _, __, output: found.append(output))
                    stack.callback(hook.remove)
            for transformer in getattr(block, "attentions", ()) if layers == "attention" else ():
                stack.enter_context(_reading_tokens(transformer, found))
        yield found


@contextmanager
def _reading_tokens(transformer: Any, found: list[Tensor]) -> Iterator[None]:
    """Lay the tokens of a transformer's first self-attention out as its input was."""
    shape: list[tuple[int, ...]] = []

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        shape[:] = [tuple((args[0] if args else kwargs["hidden_states"]).shape[2:])]

    def after(_: nn.Module, __: Any, output: Tensor) -> None:
        found.append(output.transpose(1, 2).reshape(*output.shape[::2], *shape[0]))

    hooks = [
        transformer.register_forward_pre_hook(before, with_kwargs=True),
        transformer.transformer_blocks[0].attn1.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def widths(unet: UNet2DConditionModel, layers: Layers) -> list[int]:
    """Channels of the features that :func:`collecting` gathers."""
    if layers == "convolution":
        return [resnet.conv2.out_channels for block in unet.up_blocks for resnet in block.resnets]
    transformers = [one for block in unet.up_blocks for one in getattr(block, "attentions", ())]
    return [one.transformer_blocks[0].attn1.to_out[0].out_features for one in transformers]


def read_by(probe: Any, unet: UNet2DConditionModel, usual: Layers) -> Layers:
    """Which layers a probe reads, told by their channels; published probes are of either sort.

    Args:
        probe: with ``dims`` and ``time_width`` in its ``config``.
        unet: what it would read.
        usual: the layers that probes for its kind of control read.

    Raises:
        UserError: it is for another denoiser.
    """
    wanted = list(probe.config["dims"])
    other: Layers = "attention" if usual == "convolution" else "convolution"
    found = next((layers for layers in (usual, other) if widths(unet, layers) == wanted), None)
    there = unet.time_embedding.linear_2.out_features
    if found is None or probe.config["time_width"] != there:
        raise UserError(
            f"the probe is for another denoiser: it reads layers of {wanted} channels and timesteps of "
            f"{probe.config['time_width']}, here {usual} layers have {widths(unet, usual)} and timesteps {there}"
        )
    return found


@torch.no_grad()
def embed_time(unet: UNet2DConditionModel, t: Tensor) -> Tensor:
    """The denoiser's own embedding of its timesteps, as probes are told them."""
    embedded: Tensor = unet.time_embedding(unet.time_proj(t).to(unet.dtype))
    return embedded
