"""Inner features are gathered in order, and gathering changes nothing."""

from __future__ import annotations

import pytest
import torch

from counterpoint.control.features import collecting, widths


@pytest.mark.parametrize(("layers", "channels"), [("attention", [16, 16]), ("convolution", [32, 32, 16, 16])])
def test_the_decoders_features(parts: dict, layers: str, channels: list[int]) -> None:
    unet = parts["unet"]
    latents, text = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 32)
    with torch.no_grad():
        plain = unet(latents, 300, text).sample
    latents.requires_grad_()
    with collecting(unet, layers) as found:
        watched = unet(latents, 300, text).sample
        assert torch.equal(watched, plain)
        assert [one.shape[1] for one in found] == channels == widths(unet, layers)
        assert {tuple(one.shape[2:]) for one in found} <= {(8, 12), (4, 6)}
        (slope,) = torch.autograd.grad(found[-1].square().sum(), latents)
        assert slope.abs().sum() > 0
        unet(latents, 300, text)
        assert len(found) == len(channels), "of the last pass only"
    unet(latents, 300, text)
    assert len(found) == len(channels), "nobody listens any more"


def test_tokens_lie_where_they_came_from(parts: dict) -> None:
    """The map of a self-attention's output is its tokens, row by row."""
    unet, seen = parts["unet"], []
    layer = unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1
    hook = layer.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad(), collecting(unet, "attention") as found:
        unet(torch.randn(1, 4, 8, 12), 300, torch.randn(1, 5, 32))
    hook.remove()
    assert torch.equal(found[0][0, :, 3, 7], seen[0][0, 3 * 12 + 7])
