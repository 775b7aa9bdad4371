"""PixFusion, ChannelFusion and MaxFusion against slow float64 readings of their equations, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterpoint.fusion.cross import authors_exchange, channel_fusion, pix_fusion
from counterpoint.fusion.maxfusion import DELTA, maxfusion, maxfusion_exchange

RULES = {"pix": pix_fusion(), "authors": pix_fusion(authors=True), "channel": channel_fusion(), "maxfusion": maxfusion}


def features(n: int, seed: int = 0, shape: tuple[int, ...] = (2, 6, 4, 5)) -> Tensor:
    """Branches that agree in some places: a common part of varying size, and their own."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    mix = torch.rand(1, 1, *shape[2:], generator=generator)
    return mix * common + (1 - mix) * torch.randn(n, *shape, generator=generator)


def smoothed(image: list[list[float]], kernel: list[list[int]]) -> list[list[float]]:
    height, width, total = len(image), len(image[0]), sum(map(sum, kernel))
    return [
        [
            sum(
                kernel[a + 1][b + 1] * image[i + a][j + b]
                for a in (-1, 0, 1)
                for b in (-1, 0, 1)
                if 0 <= i + a < height and 0 <= j + b < width
            )
            / total
            for j in range(width)
        ]
        for i in range(height)
    ]


def slow_choice(f: Tensor, delta: float, authors: bool) -> dict[tuple[int, int], tuple[int, list[int]]]:
    """Algorithm 1 for one sample ``(n, c, h, w)`` of any number of branches: place -> who won, and who is averaged."""
    n, c, h, w = f.shape
    kernel = [[1, 2, 1], [2, 12, 2], [1, 2, 1]] if authors else [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    strength, centred, found = [], [], {}
    for k in range(n):
        spread = f[k].var(0, unbiased=False) if authors else f[k].std(0, unbiased=False)
        strength.append(smoothed((spread / spread.sum()).tolist(), kernel))
        centred.append([smoothed(channel.tolist(), kernel) for channel in f[k] - f[k].mean(0)])
    for i in range(h):
        for j in range(w):
            winner = max(range(n), key=lambda k: strength[k][i][j])
            own = [centred[winner][ch][i][j] for ch in range(c)]
            chosen = []
            for k in range(n):
                other = [centred[k][ch][i][j] for ch in range(c)]
                dot = sum(p * q for p, q in zip(own, other, strict=True))
                if k == winner or dot / math.hypot(*own) / math.hypot(*other) > delta:
                    chosen.append(k)
            found[i, j] = winner, chosen
    return found


def slow_pix(x: Tensor, delta: float = 0.7, authors: bool = False) -> Tensor:
    """The mean of the chosen, one sample after the other."""
    out = torch.zeros(x.shape[1:], dtype=torch.float64)
    for s in range(x.shape[1]):
        f = x[:, s].double()
        for (i, j), (_, chosen) in slow_choice(f, delta, authors).items():
            out[s, :, i, j] = sum(f[k, :, i, j] for k in chosen) / len(chosen)
    return out


def slow_authors_exchange(x: Tensor, delta: float = 0.7) -> Tensor:
    """The chosen take their mean, the others the winner at the ratio of standard deviations over channels."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for s in range(x.shape[1]):
        f = x[:, s].double()
        spread = f.std(1, unbiased=False)
        for (i, j), (winner, chosen) in slow_choice(f, delta, authors=True).items():
            for k in range(len(f)):
                mean = sum(f[other, :, i, j] for other in chosen) / len(chosen)
                ratio = spread[k, i, j] / spread[winner, i, j]
                out[k, s, :, i, j] = mean if k in chosen else ratio * f[winner, :, i, j]
    return out


def slow_channel(x: Tensor, delta: float = 0.7, authors: bool = False) -> Tensor:
    """Eqs. 6 to 8 for two branches as printed; for more, the rule of the winner and whatever comes near it.

    The authors' code has variances where the equations have deviations.
    """
    n, b, c = x.shape[:3]
    out = torch.zeros(x.shape[1:], dtype=torch.float64)
    for s in range(b):
        for ch in range(c):
            maps = [x[k, s, ch].double() for k in range(n)]
            sigma = [float(m.var(unbiased=False) if authors else m.std(unbiased=False)) for m in maps]
            if n == 2:
                ratio = 1 - abs(sigma[0] - sigma[1]) / max(sigma)
                if ratio < delta:
                    out[s, ch] = maps[0] if sigma[0] > sigma[1] else maps[1]
                else:
                    out[s, ch] = (sigma[0] * maps[0] + sigma[1] * maps[1]) / sum(sigma)
                continue
            kept = [k for k in range(n) if sigma[k] / max(sigma) >= delta]
            out[s, ch] = sum(sigma[k] * maps[k] for k in kept) / sum(sigma[k] for k in kept)
    return out


def slow_maxfusion(x: Tensor) -> tuple[Tensor, Tensor]:
    """Host feature and exchanged features."""
    n, b, c, h, w = x.shape
    out, exchanged = torch.zeros(b, c, h, w, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for s in range(b):
        f = x[:, s].double()
        variance = f.var(1, unbiased=False)
        share = variance / variance.sum((1, 2), keepdim=True)
        for i in range(h):
            for j in range(w):
                winner = int(share[:, i, j].argmax())
                rho = [float(torch.corrcoef(torch.stack([f[winner, :, i, j], f[k, :, i, j]]))[0, 1]) for k in range(n)]
                chosen = [k for k in range(n) if k == winner or rho[k] > DELTA]
                together = sum(f[k, :, i, j] for k in chosen) / len(chosen)
                out[s, :, i, j] = together
                for k in range(n):
                    ratio = variance[k, i, j].sqrt() / variance[winner, i, j].sqrt()
                    exchanged[k, s, :, i, j] = together if k in chosen else ratio * f[winner, :, i, j]
    return out, exchanged


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("delta", [-0.2, 0.3, 0.7])
def test_pix_fusion(n: int, delta: float) -> None:
    x = features(n)
    torch.testing.assert_close(pix_fusion(delta)(x).double(), slow_pix(x, delta), rtol=1e-4, atol=1e-5)


def test_pix_fusion_of_the_authors() -> None:
    x = features(2, 5)
    torch.testing.assert_close(pix_fusion(authors=True)(x).double(), slow_pix(x, authors=True), rtol=1e-4, atol=1e-5)
    assert not torch.equal(pix_fusion(authors=True)(x), pix_fusion()(x))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("delta", [0.3, 0.9])
def test_channel_fusion(n: int, delta: float) -> None:
    x = features(n) * torch.rand(n, 2, 6, 1, 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(channel_fusion(delta)(x).double(), slow_channel(x, delta), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_channel_fusion_of_the_authors(n: int) -> None:
    x = features(n) * torch.rand(n, 2, 6, 1, 1, generator=torch.Generator().manual_seed(1))
    got = channel_fusion(0.7, authors=True)(x)
    torch.testing.assert_close(got.double(), slow_channel(x, authors=True), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, channel_fusion(0.7)(x))


@pytest.mark.parametrize("n", [2, 3])
def test_what_branches_tell_each_other_in_the_authors_code(n: int) -> None:
    x = features(n, 7)
    got = authors_exchange()(x)
    torch.testing.assert_close(got.double(), slow_authors_exchange(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_maxfusion(n: int) -> None:
    x = features(n)
    host, exchanged = slow_maxfusion(x)
    torch.testing.assert_close(maxfusion(x).double(), host, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maxfusion_exchange(x).double(), exchanged, rtol=1e-4, atol=1e-5)


def test_thresholds_at_their_ends() -> None:
    """Below -1 everything is averaged; delta = 0 is not yet averaging."""
    x = features(2)
    torch.testing.assert_close(pix_fusion(-1.1)(x), x.mean(0))
    assert not torch.allclose(pix_fusion(0.0)(x), x.mean(0))
    picked = pix_fusion(1.1)(x)
    assert ((picked == x[0]) | (picked == x[1])).all()


@pytest.mark.parametrize("authors", [False, True])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.05, 20))
def test_a_conditioning_scale_never_changes_who_wins(authors: bool, seed: int, scale: float) -> None:
    x = features(2, seed)
    scaled = x * torch.tensor([scale, 1.0])[:, None, None, None, None]
    pick = pix_fusion(2.0, authors=authors)
    assert torch.equal(pick(scaled) == scaled[0], pick(x) == x[0])


@pytest.mark.parametrize("name", RULES)
def test_tokens_are_maps_in_another_layout(name: str) -> None:
    maps = features(3)
    tokens = maps.flatten(3).transpose(2, 3)
    got = RULES[name](tokens, grid=(4, 5))
    torch.testing.assert_close(got, RULES[name](maps).flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="does not hold 20 tokens"):
        RULES[name](tokens, grid=(4, 4))
    with pytest.raises(ValueError, match="takes"):
        RULES[name](maps[..., None])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 3e4])
def test_half_precision_extremes(name: str, dtype: torch.dtype, scale: float) -> None:
    x = (features(3) * scale).clamp(-6e4, 6e4).to(dtype)
    assert RULES[name](x).isfinite().all()
    assert RULES[name](x).dtype == dtype


@pytest.mark.parametrize("name", RULES)
def test_silence_and_equality(name: str) -> None:
    x = features(3).requires_grad_()
    silent = torch.cat([x, torch.zeros_like(x[:1])])
    RULES[name](silent).square().sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(RULES[name](x.detach()[:1].expand(3, -1, -1, -1, -1)), x.detach()[0])
    assert (RULES[name](torch.zeros(2, 1, 3, 4, 4)) == 0).all()
