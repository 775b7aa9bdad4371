"""The walk beside diffusers' forward, and hooks beside diffusers' arguments: the neutral setting is bit-equal."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from counterpoint.control.attach import hints_encoded_once, injecting
from counterpoint.control.lockstep import run_lockstep, walk
from counterpoint.types import Residuals


def inputs(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, 4, 8, 8, generator=generator),
        torch.tensor(500),
        torch.randn(rows, 24, 32, generator=generator),
        torch.rand(rows, 3, 64, 64, generator=generator),
    )


def equal(got: Residuals, wanted: tuple) -> bool:
    return all(torch.equal(a, b) for a, b in zip((*got.down, got.mid), (*wanted[0], wanted[1]), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_identity_exchange_is_the_stock_forward(parts: dict, dtype: torch.dtype) -> None:
    latents, t, text, hint = (x.to(dtype) if x.is_floating_point() else x for x in inputs())
    networks = [network.to(dtype) for network in parts["networks"]]
    try:
        walks = {str(i): walk(network, latents, t, text, hint, 0.7) for i, network in enumerate(networks)}
        results = run_lockstep(walks, lambda features: features)
        for i, network in enumerate(networks):
            assert equal(results[str(i)], network(latents, t, text, hint, conditioning_scale=0.7, return_dict=False))
    finally:
        for network in networks:
            network.to(torch.float32)


@pytest.mark.parametrize("skips", [True, False])
@torch.no_grad()
def test_exchange_happens_at_every_stop(parts: dict, skips: bool) -> None:
    latents, t, text, hint = inputs()
    seen: list[tuple[int, ...]] = []

    def swap(features: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(features.shape))
        return features.flip(0)

    networks = parts["networks"]
    walks = {str(i): walk(network, latents, t, text, hint) for i, network in enumerate(networks)}
    run_lockstep(walks, swap, skips=skips)
    # conv_in, then each of two blocks with its residuals (a layer and a downsampler, then a layer), then mid
    assert len(seen) == (1 + 3 + 2 + 1 if skips else 4)
    assert all(shape[:2] == (2, 2) for shape in seen)


@torch.no_grad()
def test_injection_by_addition_is_the_stock_argument(parts: dict) -> None:
    unet: UNet2DConditionModel = parts["unet"]
    network: ControlNetModel = parts["networks"][0]
    latents, t, text, hint = inputs()
    down, mid = network(latents, t, text, hint, return_dict=False)
    plain = unet(latents, t, text, return_dict=False)[0]
    wanted = unet(
        latents,
        t,
        text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]
    with injecting(unet, Residuals(tuple(down), mid), torch.add):
        got = unet(latents, t, text, return_dict=False)[0]
    assert torch.equal(got, wanted)
    assert torch.equal(unet(latents, t, text, return_dict=False)[0], plain), "something of ours is left behind"


def test_nothing_is_left_after_an_exception(parts: dict) -> None:
    unet, networks = parts["unet"], parts["networks"]
    before = [dict(module._forward_pre_hooks) for module in unet.modules()]
    encoders = [network.controlnet_cond_embedding for network in networks]
    with (
        pytest.raises(RuntimeError, match="inside"),
        hints_encoded_once(networks),
        injecting(unet, Residuals((), torch.zeros(1, 1, 1, 1)), torch.add),
    ):
        raise RuntimeError("inside")
    assert [dict(module._forward_pre_hooks) for module in unet.modules()] == before
    assert [network.controlnet_cond_embedding for network in networks] == encoders


@torch.no_grad()
def test_hints_are_encoded_once(parts: dict) -> None:
    network = parts["networks"][0]
    latents, t, text, hint = inputs()
    wanted = network(latents, t, text, hint, return_dict=False)
    calls = []
    handle = network.controlnet_cond_embedding.register_forward_hook(lambda *_: calls.append(1))
    with hints_encoded_once([network, network]):
        for _ in range(3):
            got = network(latents, t, text, hint, return_dict=False)
        assert len(calls) == 1
        other = hint.clone()
        network(latents, t, text, other, return_dict=False)
        assert len(calls) == 2
        other.mul_(0)
        changed = network(latents, t, text, other, return_dict=False)
        assert len(calls) == 3
    handle.remove()
    assert equal(Residuals(tuple(got[0]), got[1]), wanted)
    assert not equal(Residuals(tuple(changed[0]), changed[1]), wanted)
