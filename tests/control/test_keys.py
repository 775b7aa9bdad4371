"""KV-injection against Eq. 9 written out, and what it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from counterpoint.control.keys import Lending, at_tokens, inject, injecting_keys, keeping_keys, self_attention, split
from counterpoint.types import Keys, Moment, UserError


def slow(query: Tensor, own: tuple, theirs: list[tuple], shares: Tensor) -> Tensor:
    """Query by query, key by key, in float64; a key whose mask is 0 is not there."""
    b, n, t, d = query.shape
    out = torch.zeros(b, n, t, d, dtype=torch.float64)

    def attend(q: Tensor, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
        pairs = [(k, v, m) for k, v, m in pairs if m > 0]
        if not pairs:
            return torch.zeros(d, dtype=torch.float64)
        logits = [float(q @ k) / math.sqrt(d) + math.log(m) for k, _, m in pairs]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        return sum(w * v for w, (_, v, _) in zip(weights, pairs, strict=True)) / sum(weights)

    for s in range(b):
        outside = [1 - float(shares[:, s, p].sum()) for p in range(t)]
        for h in range(n):
            for p in range(t):
                q = query[s, h, p].double()
                seen = [(own[0][s, h, j].double(), own[1][s, h, j].double(), 1.0) for j in range(t)]
                for key, value in theirs:
                    seen += [(key[s, h, j].double(), value[s, h, j].double(), outside[j]) for j in range(t)]
                total = outside[p] * attend(q, seen)
                for share, (key, value) in zip(shares, theirs, strict=True):
                    inside = [(key[s, h, j].double(), value[s, h, j].double(), float(share[s, j])) for j in range(t)]
                    total = total + float(share[s, p]) * attend(q, inside)
                out[s, h, p] = total
    return out


def random(k: int, seed: int = 0) -> tuple[Tensor, tuple, list[tuple]]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value, *rest = torch.randn(3 + 2 * k, 2, 2, 9, 4, generator=generator)
    return query, (key, value), [(rest[2 * i], rest[2 * i + 1]) for i in range(k)]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_injection_is_equation_9(k: int, soft: bool) -> None:
    query, own, theirs = random(k)
    shares = torch.rand(k, 2, 9, generator=torch.Generator().manual_seed(1)) / k
    if not soft:  # every place belongs to one foreground or to none
        owner = torch.arange(18).reshape(2, 9) % (k + 1)
        shares = torch.stack([owner == i for i in range(k)]).float()
    got = inject(query, own, theirs, split(shares))
    torch.testing.assert_close(got.double(), slow(query, own, theirs, shares), rtol=1e-4, atol=1e-5)


def test_empty_and_full_masks() -> None:
    query, own, theirs = random(1)
    attend = torch.nn.functional.scaled_dot_product_attention
    for share, wanted in (
        (1.0, attend(query, *theirs[0])),
        (0.0, attend(query, *(torch.cat([a, b], 2) for a, b in zip(own, theirs[0], strict=True)))),
    ):
        got = inject(query, own, theirs, split(torch.full((1, 2, 9), share)))
        assert got.isfinite().all()
        torch.testing.assert_close(got, wanted)


def test_masks_at_the_resolution_of_a_layer() -> None:
    masks = torch.zeros(1, 2, 1, 8, 16)
    masks[..., 8:] = 1
    assert at_tokens(masks, 32)[0, 0].reshape(4, 8).tolist() == [[0.0] * 4 + [1.0] * 4] * 4
    assert at_tokens(masks, 2)[0, 1].tolist() == [0.0, 1.0]


@torch.no_grad()
def test_foreground_runs_unchanged_and_background_listens(parts: dict) -> None:
    front, back = parts["networks"]
    latents, text, hint = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 32), torch.rand(2, 3, 64, 64)

    def run(network) -> list[Tensor]:
        down, mid = network(latents, torch.tensor(300), text, hint, return_dict=False)
        return [*down, mid]

    alone, before = run(front), run(back)
    kept: dict = {}
    with keeping_keys(front, kept):
        watched = run(front)
    assert all(map(torch.equal, watched, alone))
    assert list(kept) == list(self_attention(front))
    half = torch.zeros(1, 2, 1, 8, 8)
    half[..., 4:] = 1
    processors = [layer.processor for layer in self_attention(back).values()]
    with injecting_keys(back, [kept], half):
        changed = run(back)
    assert [layer.processor for layer in self_attention(back).values()] == processors
    assert not torch.allclose(changed[-1], before[-1])
    assert all(map(torch.equal, run(back), before))
    with pytest.raises(UserError, match="is too many"), injecting_keys(back, [kept], half, first=len(processors)):
        pass


@torch.no_grad()
def test_a_branch_lends_to_itself_without_effect_inside_its_mask(parts: dict) -> None:
    """With equal branches and a mask of ones, attention to the foreground is attention to oneself."""
    network = parts["networks"][0]
    latents, text, hint = torch.randn(1, 4, 8, 8), torch.randn(1, 24, 32), torch.rand(1, 3, 64, 64)
    kept: dict = {}
    with keeping_keys(network, kept):
        wanted = network(latents, torch.tensor(300), text, hint, return_dict=False)
    with injecting_keys(network, [kept], torch.ones(1, 1, 1, 8, 8)):
        got = network(latents, torch.tensor(300), text, hint, return_dict=False)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(90, 60), (80, 45), (64, 65), (85, 64), (50, 75), (135, 76), (8, 8), (33, 40)])
def test_every_level_of_every_size_has_its_masks(size: tuple[int, int]) -> None:
    """Levels are halved and rounded up, as strided convolutions do it, whatever the shape of the picture."""
    masks = torch.rand(1, 1, 1, *size)
    height, width = size
    for _ in range(4):
        assert at_tokens(masks, height * width).shape == (1, 1, height * width)
        height, width = -(-height // 2), -(-width // 2)


def test_overlapping_soft_foregrounds_give_numbers() -> None:
    """Their shares add up to one only to rounding, and what is left must not fall below nothing."""
    generator = torch.Generator().manual_seed(49)
    masks = torch.rand(2, 1, 1, 64, 64, generator=generator) * 0.9 + 0.3
    shares = at_tokens(masks / masks.sum(0).clamp(min=1), 1024)
    assert (1 - shares.sum(0)).min() < 0, "a case that matters"
    query, *pairs = torch.randn(7, 1, 1, 1024, 8, generator=generator)
    foregrounds = list(zip(pairs[2::2], pairs[3::2], strict=True))
    assert torch.isfinite(inject(query, (pairs[0], pairs[1]), foregrounds, split(shares))).all()


def test_keys_wait_for_less_noise() -> None:
    lending, keys = Lending({}, {"a": torch.ones(1, 1, 2, 2)}), Keys(start=0.0, sigma=3.0)
    assert not lending.active(keys, Moment(1, 4, torch.tensor(900), 5.0))
    assert lending.active(keys, Moment(1, 4, torch.tensor(500), 2.0))
    assert not lending.active(Keys(start=0.5, sigma=3.0), Moment(1, 4, torch.tensor(500), 2.0))
    with pytest.raises(UserError, match="positive sigma"):
        Keys(sigma=0.0)
