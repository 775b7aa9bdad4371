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


def test_several_at_once_are_each_by_itself_on_one_encoding_of_the_hints() -> None:
    parts = random_parts(controls=1)
    unet, network = parts["unet"], parts["networks"][0]
    generator = torch.Generator().manual_seed(0)
    latents, first, second = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    hint = torch.rand(2, 3, 8 * 8, 8 * 8, generator=generator)
    encoded = []
    network.controlnet_cond_embedding.register_forward_hook(lambda _, given, __: encoded.append(len(given[0])))
    for timestep in (torch.tensor([10, 900]), torch.tensor(10)):
        field = influence(unet, network, hint, text, timestep, latents)
        with torch.no_grad():
            each = torch.cat([field(first), field(second)])
            encoded.clear()
            torch.testing.assert_close(field(torch.cat([first, second])), each, rtol=1e-5, atol=1e-6)
        assert encoded == [2]
    assert len(network.controlnet_cond_embedding._forward_hooks) == 1
