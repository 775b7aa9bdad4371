"""UNets that grow: copies that share every weight, and the names that LDM gave their blocks."""

from __future__ import annotations

import copy
import re

from diffusers import UNet2DConditionModel

_BLOCK = re.compile(r"^(input_blocks|middle_block|output_blocks)\.(?:(\d+)\.)?1\.(.*)$")


def sharing_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another UNet with the same tensors: layers can be added to it, and the first one stays what it was."""
    every = [*unet.parameters(), *unet.buffers()]
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in every})


def ldm_block(name: str) -> str:
    """A tensor's name in LDM's layout of Stable Diffusion 1.5 -> its transformer's name in diffusers; any other name
    as it is."""
    match = _BLOCK.match(name)
    if match is None or (match[2] is None) != (match[1] == "middle_block"):
        return name
    if match[1] == "middle_block":
        return f"mid_block.attentions.0.{match[3]}"
    number = int(match[2])
    block, layer = divmod(number - 1 if match[1] == "input_blocks" else number, 3)
    return f"{'down' if match[1] == 'input_blocks' else 'up'}_blocks.{block}.attentions.{layer}.{match[3]}"
