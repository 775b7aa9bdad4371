"""Interaction layers: the published tables at full size, a small model for real, and shut gates change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from counterpoint.models.gligen import fuser_state, renamed, with_fusers
from counterpoint.models.interact import InteractionEmbedding, between, load_interaction
from counterpoint.models.weights import read_pickle
from counterpoint.types import UserError

FUSER = {
    "linear.weight": ("C", 768), "linear.bias": ("C",),
    "attn.to_q.weight": ("C", "C"), "attn.to_k.weight": ("C", "C"), "attn.to_v.weight": ("C", "C"),
    "attn.to_out.0.weight": ("C", "C"), "attn.to_out.0.bias": ("C",),
    "ff.net.0.proj.weight": ("8C", "C"), "ff.net.0.proj.bias": ("8C",),
    "ff.net.2.weight": ("C", "4C"), "ff.net.2.bias": ("C",),
    "norm1.weight": ("C",), "norm1.bias": ("C",), "norm2.weight": ("C",), "norm2.bias": ("C",),
    "alpha_attn": (), "alpha_dense": (),
}  # fmt: skip
"""The seventeen tensors of a fuser, as published."""
POSITION = {
    **{f"{net}.{layer}.weight": shape for net in ("linears", "linear_action")
       for layer, shape in ((0, (512, 832)), (2, (512, 512)), (4, (768, 512)))},
    **{f"{net}.{layer}.bias": (size,) for net in ("linears", "linear_action")
       for layer, size in ((0, 512), (2, 512), (4, 768))},
    "null_positive_feature": (768,), "null_action_feature": (768,), "null_position_feature": (64,),
    "interaction_embedding.emb.weight": (30, 768), "position_embedding.emb.weight": (3, 768),
}  # fmt: skip
DOWN, UP = (320, 320, 640, 640, 1280, 1280), (1280,) * 3 + (640,) * 3 + (320,) * 3
BLOCKS = {
    **{f"input_blocks.{i}": width for i, width in zip((1, 2, 4, 5, 7, 8), DOWN, strict=True)},
    "middle_block": 1280,
    **{f"output_blocks.{i}": width for i, width in zip(range(3, 12), UP, strict=True)},
}


def sized(shape: tuple, width: int) -> tuple[int, ...]:
    return tuple(int(part[:-1] or 1) * width if isinstance(part, str) else part for part in shape)


def published() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the whole table for SD1.5."""
    fusers = {
        f"{block}.1.transformer_blocks.0.fuser.{name}": sized(shape, width)
        for block, width in BLOCKS.items()
        for name, shape in FUSER.items()
    }
    return fusers | {f"position_net.{name}": shape for name, shape in POSITION.items()}


def test_every_published_tensor_lands_at_full_size() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    grown = with_fusers(unet, InteractionEmbedding())
    wanted = {name: tuple(value.shape) for name, value in fuser_state(grown).items()}
    found = {renamed(name): shape for name, shape in published().items()}
    assert len(found) == 16 * 17 + 17
    assert found == wanted


@pytest.fixture
def unet(parts: dict) -> UNet2DConditionModel:
    return parts["unet"]


def grounding(count: int = 2, text: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "boxes": torch.rand(3, count, 2, 4, generator=generator),
        "phrases": torch.randn(3, count, 3, text, generator=generator),
        "there": torch.tensor([[1.0] * count, [1.0] + [0.0] * (count - 1), [0.0] * count]),
    }


def run(unet: UNet2DConditionModel, given: dict | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(3, 7, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(latents, 10, text, cross_attention_kwargs=None if given is None else {"gligen": given}).sample


def test_shut_gates_change_nothing_and_weights_are_shared(unet: UNet2DConditionModel) -> None:
    before = set(unet.state_dict())
    grown = with_fusers(unet, InteractionEmbedding(24, unet.config.cross_attention_dim))
    assert set(unet.state_dict()) == before
    assert all(grown.state_dict()[name].data_ptr() == value.data_ptr() for name, value in unet.state_dict().items())
    assert torch.equal(run(grown, grounding()), run(unet, None))
    assert torch.equal(run(grown, None), run(unet, None))
    for name, value in grown.named_parameters():
        if name.endswith("alpha_attn"):
            value.data += 1
    opened = run(grown, grounding())
    assert not torch.allclose(opened, run(unet, None))
    assert torch.equal(run(grown, None), run(unet, None)), "without tokens it is the UNet that it was"


def test_padding_and_the_unconditional_half_do_not_see_what_is_there(unet: UNet2DConditionModel) -> None:
    torch.manual_seed(0)
    embedding = InteractionEmbedding(24, 32, 5)
    with torch.no_grad():
        given = grounding()
        tokens = embedding(**given)
        other = {**given, "boxes": given["boxes"].flip(0), "phrases": given["phrases"].flip(0)}
        assert tokens.shape == (3, 6, 32)
        assert torch.equal(embedding(**other)[2], tokens[2]), "all padding"
        padded = embedding(given["boxes"].roll(1, 1), given["phrases"].roll(1, 1), given["there"])
        assert torch.equal(padded[1, [1, 3, 5]], tokens[1, [1, 3, 5]])
        assert not torch.equal(padded[1, [0, 2, 4]], tokens[1, [0, 2, 4]])
    with pytest.raises(ValueError, match="6 interactions; this model takes at most 5"):
        embedding(**grounding(6))


@torch.no_grad()
def test_tokens_written_out() -> None:
    """Subjects, actions, objects; each from a phrase and a place, numbered, and marked 0, 2 and 1."""
    torch.manual_seed(0)
    net = InteractionEmbedding(3, 6, 4, hidden=5).double()
    given = {name: value.double() for name, value in grounding(2, 3).items()}
    found = net(**given)

    def place(box: torch.Tensor) -> torch.Tensor:
        return torch.cat([wave(100 ** (k / 8) * box) for k in range(8) for wave in (torch.sin, torch.cos)])

    for row in range(3):
        for number in range(2):
            subject, thing = given["boxes"][row, number]
            x, y = sorted([*subject[[0, 2]], *thing[[0, 2]]]), sorted([*subject[[1, 3]], *thing[[1, 3]]])
            middle = torch.stack([x[1], y[1], x[2], y[2]])
            parts = ((0, subject, 0, net.linears, net.null_positive_feature),
                     (4, thing, 1, net.linears, net.null_positive_feature),
                     (2, middle, 2, net.linear_action, net.null_action_feature))  # fmt: skip
            for first, box, role, layer, null in parts:
                real = given["there"][row, number] > 0
                text = given["phrases"][row, number, role] if real else null
                where = place(box) if real else net.null_position_feature
                wanted = layer(torch.cat([text, where])) + net.interaction_embedding.emb.weight[number]
                wanted = wanted + net.position_embedding.emb.weight[role]
                torch.testing.assert_close(found[row, first + number], wanted, rtol=1e-5, atol=1e-5)


def test_the_place_of_an_action_is_between() -> None:
    subject, other = torch.tensor([[[0.1, 0.2, 0.4, 0.9]]]), torch.tensor([[[0.6, 0.5, 0.8, 0.7]]])
    torch.testing.assert_close(between(subject, other), torch.tensor([[[0.4, 0.5, 0.6, 0.7]]]))
    torch.testing.assert_close(between(other, subject), between(subject, other))


def test_files_in_every_form(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = with_fusers(unet, InteractionEmbedding(24, unet.config.cross_attention_dim, 4))
    for value in fuser_state(trained).values():
        value.copy_(torch.randn_like(value))
    wanted = run(trained, grounding())
    save_file(fuser_state(trained), tmp_path / "ours.safetensors")
    save_file({**unet.state_dict(), **fuser_state(trained)}, tmp_path / "diffusers.safetensors")
    torch.save(
        {
            "model": {**fuser_state(trained), "time_embed.0.weight": torch.zeros(1)},
            "autoencoder": {"x": torch.zeros(1)},
        },
        tmp_path / "published.pth",
    )
    save_file(read_pickle(tmp_path / "published.pth"), tmp_path / "published.safetensors")
    for form in ("ours", "diffusers", "published"):
        assert torch.equal(run(load_interaction(unet, tmp_path / f"{form}.safetensors"), grounding()), wanted), form


def test_wrong_files_are_named(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="holds no interaction layers"):
        load_interaction(unet, file)
    whole = fuser_state(with_fusers(unet, InteractionEmbedding(24, unet.config.cross_attention_dim)))
    name = next(name for name in whole if name.endswith("alpha_attn"))
    save_file({key: value for key, value in whole.items() if key != name}, file)
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_interaction(unet, file)
    with pytest.raises(UserError, match="is a pickle"):
        load_interaction(unet, tmp_path / "a.pth")
