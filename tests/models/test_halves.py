"""Both halves of a UNet are the UNet, bit for bit, whoever joins in between."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from counterpoint.control.attach import taking_in
from counterpoint.models.halves import decoding, encode
from counterpoint.types import Residuals

TIME = torch.tensor(500)


def ask(unet: UNet2DConditionModel, latents: torch.Tensor, text: torch.Tensor, **more: object) -> torch.Tensor:
    return unet(latents, TIME, encoder_hidden_states=text, return_dict=False, **more)[0]


@pytest.fixture
def given(parts: dict) -> tuple[UNet2DConditionModel, torch.Tensor, torch.Tensor]:
    unet, draw = parts["unet"], torch.Generator().manual_seed(0)
    latents = torch.randn(2, unet.config.in_channels, 8, 8, generator=draw)
    return unet, latents, torch.randn(2, 7, unet.config.cross_attention_dim, generator=draw)


@pytest.mark.parametrize("inject", [torch.add, torch.maximum, None], ids=["add", "of its own", "alone"])
@torch.no_grad()
def test_halves_are_the_whole(given: tuple, inject: object) -> None:
    unet, latents, text = given
    said = encode(unet, latents, TIME, text)
    heard = None if inject is None else Residuals(tuple(one.sin() for one in said[:-1]), said[-1].cos())
    inject = inject or torch.add
    with taking_in(unet, heard, inject) as extra:
        whole = ask(unet, latents, text, **extra)
    with decoding(unet, said), taking_in(unet, heard, inject) as extra:
        assert torch.equal(ask(unet, latents, text, **extra), whole)
    assert torch.equal(ask(unet, latents, text), ask(unet, latents, text)), "it is whole again"


@torch.no_grad()
def test_the_decoder_does_not_see_the_latents(given: tuple) -> None:
    unet, latents, text = given
    with decoding(unet, encode(unet, latents, TIME, text)):
        assert torch.equal(ask(unet, latents, text), ask(unet, latents + 1, text))


def test_a_unet_is_whole_after_an_error(given: tuple) -> None:
    unet, latents, text = given
    before = dict(unet.named_modules())
    with pytest.raises(RuntimeError):
        encode(unet, latents, TIME, text[..., :-1])
    with pytest.raises(ZeroDivisionError), decoding(unet, [latents] * 3):
        raise ZeroDivisionError
    assert dict(unet.named_modules()) == before
    assert not any(module._forward_hooks for module in before.values())
