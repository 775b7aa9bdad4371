"""How strongly a ControlNet speaks at a conditioning scale of 1.

One trained for the expected noise hedges where a control leaves the picture open; multiplied, it is followed better, as
guidance makes a prompt clearer. What it was multiplied by is in its configuration, where stock diffusers takes no
notice of it, so that training can go on with the network as it was trained.
"""

from __future__ import annotations

import torch
from diffusers import ControlNetModel

_STRENGTH = "_strength"


def strength_of(network: ControlNetModel) -> float:
    """What a network was multiplied by since it was trained."""
    return float(network.config.get(_STRENGTH, 1.0))


@torch.no_grad()
def strengthen(network: ControlNetModel, factor: float) -> None:
    """Make a ControlNet speak at a conditioning scale of 1 as it does at ``factor``; its last layers are linear, with
    or without a LoRA."""
    if factor == 1:
        return
    for last in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        for name, parameter in last.named_parameters():
            if "lora_A" not in name:  # a LoRA is the product of two
                parameter.mul_(factor)
    network.register_to_config(**{_STRENGTH: strength_of(network) * factor})
