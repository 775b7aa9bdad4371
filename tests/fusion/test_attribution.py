"""What a fused feature is made of is read back from it."""

from __future__ import annotations

import pytest
import torch

from counterpoint.fusion import FUSIONS
from counterpoint.fusion.attribution import correlation, min_norm_shares, shares


def features(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, 12, 5, 4, generator=torch.Generator().manual_seed(n))


def test_weights_by_place_are_recovered() -> None:
    f = features()
    weights = torch.rand(3, 2, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    found = shares(f, (weights * f).sum(0))
    wanted = weights[:, :, 0] * f.norm(dim=2)
    torch.testing.assert_close(found, wanted / wanted.sum(0), atol=2e-3, rtol=0)


def test_the_winner_of_a_choice_has_it_all() -> None:
    f = features(2)
    left = torch.zeros(5, 4, dtype=torch.bool)
    left[:, :2] = True
    found = shares(f, torch.where(left, f[0], f[1]))
    torch.testing.assert_close(found[0], left.float().expand(2, 5, 4), atol=1e-3, rtol=0)


def test_a_weak_branch_keeps_its_weight() -> None:
    f = torch.eye(12)[:2].reshape(2, 1, 12, 1, 1) * torch.tensor([1.0, 0.01]).reshape(2, 1, 1, 1, 1)
    found = shares(f, f.sum(0)).flatten()
    torch.testing.assert_close(found, torch.tensor([1 / 1.01, 0.01 / 1.01]), atol=1e-5, rtol=1e-3)


def test_silence_has_no_part() -> None:
    f = features(2)
    f[1, :, :, 2:] = 0
    f[:, :, :, 4] = 0
    found = shares(f, f.sum(0))
    assert found[1, :, 2:].max() == 0
    torch.testing.assert_close(found[0, :, 2:4], torch.ones(2, 2, 4))
    assert found[:, :, 4].max() == 0, "where nobody speaks nobody won"


def test_equal_branches_share_equally() -> None:
    f = features(1).repeat(2, 1, 1, 1, 1)
    torch.testing.assert_close(shares(f, f.sum(0)), torch.full((2, 2, 5, 4), 0.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rule", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_rule_can_be_read(rule, dtype: torch.dtype) -> None:
    f = features().to(dtype)
    found = shares(f, rule.combine(f))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(0), torch.ones(2, 5, 4))


def test_correlation_and_opposition_by_their_equations() -> None:
    x = torch.randn(3, 2, 8, 2, 2, dtype=torch.float64)
    pairs = [
        torch.corrcoef(torch.stack([x[i, 1, :, 0, 1], x[j, 1, :, 0, 1]]))[0, 1] for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    torch.testing.assert_close(correlation(x)[1, 0, 1].double(), torch.stack(pairs).mean(), atol=1e-5, rtol=1e-5)
    x[1] = 0
    assert correlation(x).isfinite().all()
    torch.testing.assert_close(min_norm_shares(x), torch.tensor([[0.0, 1.0, 0.0]] * 2))
    assert (correlation(x[:1]) == 1).all()
