"""Keys and values lent between FLUX ControlNets."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from diffusers import FluxControlNetModel

from counterpoint.control.keys_flux import injecting_flux_keys, keeping_flux_keys
from counterpoint.types import UserError
from tests.parity.families import speak


@pytest.fixture(scope="module")
def network() -> FluxControlNetModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`FluxPosEmbed`", FutureWarning)
        made = FluxControlNetModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    return speak(made)


@torch.no_grad()
def said(
    network: FluxControlNetModel, hint: int, around: AbstractContextManager[None] | None = None
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(24, 3)
    ids[:, 1], ids[:, 2] = torch.arange(24) // 6, torch.arange(24) % 6
    with around or nullcontext():
        double, single = network(
            hidden_states=torch.randn(2, 24, 16, generator=generator),
            controlnet_cond=torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(hint)),
            encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
            pooled_projections=torch.randn(2, 16, generator=generator),
            timestep=torch.full((2,), 0.5),
            img_ids=ids,
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )
    return [*double, *single]


def test_keeping_changes_nothing(network: FluxControlNetModel) -> None:
    kept: dict = {}
    for one, other in zip(said(network, 1), said(network, 1, keeping_flux_keys(network, kept)), strict=True):
        assert torch.equal(one, other)
    assert set(kept) == {"transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"}


def test_ones_own_keys_everywhere_are_plain_attention(network: FluxControlNetModel) -> None:
    """Inside the mask a branch hears the text and what it is lent; lent its own, it is what it was."""
    kept: dict = {}
    plain = said(network, 1, keeping_flux_keys(network, kept))
    lent = said(network, 1, injecting_flux_keys(network, [kept], torch.ones(1, 2, 1, 4, 6)))
    for one, other in zip(plain, lent, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_nothing_lent_is_plain_attention(network: FluxControlNetModel) -> None:
    plain = said(network, 1)
    for one, other in zip(
        plain, said(network, 1, injecting_flux_keys(network, [], torch.ones(0, 2, 1, 4, 6))), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_is_lent_is_heard_where_the_mask_says(network: FluxControlNetModel) -> None:
    """Image tokens inside the mask hear what lies inside it, those outside what lies outside; in the first block."""
    kept: dict = {}
    said(network, 2, keeping_flux_keys(network, kept))
    mask = torch.zeros(1, 2, 1, 4, 6)
    mask[..., :3] = 1
    inside = mask[0, 0, 0].flatten().bool()
    name = "transformer_blocks.0"
    changed = {where: {**kept, name: tuple(x.clone() for x in kept[name])} for where in ("inside", "outside")}
    for where, places in (("inside", inside), ("outside", ~inside)):
        for part in changed[where][name]:
            part[:, places] += 1
    lent, *others = (
        said(network, 1, injecting_flux_keys(network, [keys], mask))[0] for keys in (kept, *changed.values())
    )
    for other, places in zip(others, (inside, ~inside), strict=True):
        torch.testing.assert_close(lent[:, ~places], other[:, ~places])
        assert (lent[:, places] - other[:, places]).abs().amax((0, 2)).min() > 1e-5
    plain = said(network, 1)[0]
    assert not torch.allclose(lent, plain, atol=1e-3)
    assert torch.equal(said(network, 1)[0], plain), "processors are back"


def test_fused_projections_are_refused(network: FluxControlNetModel) -> None:
    network.transformer_blocks[0].attn.fused_projections = True
    try:
        with pytest.raises(UserError, match="unfuse_qkv_projections"), keeping_flux_keys(network, {}):
            pass
    finally:
        network.transformer_blocks[0].attn.fused_projections = False
