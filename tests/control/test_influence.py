"""The part of the prediction's Jacobian that goes through a ControlNet."""

from __future__ import annotations

import torch

from counterpoint.control.influence import influence
from tests.conftest import random_parts


def test_a_control_that_says_nothing_has_no_influence_and_the_host_is_a_constant() -> None:
    parts = random_parts(controls=2)
    unet, network = parts["unet"], parts["networks"][0]
    generator = torch.Generator().manual_seed(0)
    latents, seen = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    hint = torch.rand(2, 3, 8 * 8, 8 * 8, generator=generator)
    timestep = torch.tensor([10, 900])
    latents.requires_grad_()
    field = influence(unet, network, hint, text, timestep, latents)
    with torch.no_grad():
        down, mid = network(latents, timestep, text, hint, return_dict=False)
        stock = unet(latents, timestep, text, down_block_additional_residuals=down,
                     mid_block_additional_residual=mid).sample  # fmt: skip
        assert torch.equal(field(latents), stock)
        assert not torch.equal(field(seen), stock)
    seen.requires_grad_()
    field(seen).square().sum().backward()
    assert latents.grad is None
    assert seen.grad.abs().sum() > 0
    for layer in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.zeros_(layer.weight)
    with torch.no_grad():
        assert torch.equal(field(seen), field(latents))
