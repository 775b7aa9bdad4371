"""What holds for every rule of the table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.apps.citations import CITATIONS
from counterpoint.fusion import FUSIONS, get_fusion
from counterpoint.types import Fusion, UserError

SHAPES = [(2, 8, 4, 4), (2, 12, 6)]


def features(n: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=FUSIONS.values(), ids=FUSIONS)
def rule(request: pytest.FixtureRequest) -> Fusion:
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_branch_is_the_identity(rule: Fusion, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = features(1, shape, dtype=dtype)
    assert torch.equal(rule.combine(x), x[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_stay(rule: Fusion, shape: tuple[int, ...], n: int, dtype: torch.dtype) -> None:
    result = rule.combine(features(n, shape, dtype=dtype))
    assert result.shape == shape
    assert result.dtype == dtype


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 5))
@pytest.mark.parametrize("name", FUSIONS)
def test_order_does_not_matter(name: str, seed: int, n: int) -> None:
    x = features(n, SHAPES[0], seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(FUSIONS[name].combine(x[order]), FUSIONS[name].combine(x))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", FUSIONS)
def test_samples_do_not_see_each_other(name: str, seed: int) -> None:
    x = features(3, (4, 8, 4, 4), seed)
    together = FUSIONS[name].combine(x)
    for sample in range(4):
        torch.testing.assert_close(FUSIONS[name].combine(x[:, sample : sample + 1])[0], together[sample])


def test_silent_branches_are_legal(rule: Fusion) -> None:
    x = torch.zeros(3, *SHAPES[0], requires_grad=True)
    result = rule.combine(x)
    result.sum().backward()
    assert torch.isfinite(result).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_extreme_scales_stay_finite_in_half_precision(rule: Fusion, scale: float) -> None:
    assert torch.isfinite(rule.combine((features(3, SHAPES[0]) * scale).half())).all()


def test_same_again(rule: Fusion) -> None:
    x = features(3, SHAPES[0])
    assert torch.equal(rule.combine(x), rule.combine(x.clone()))


def test_sum_and_mean_by_their_equations() -> None:
    x = features(3, SHAPES[0])
    wide = x.double()
    torch.testing.assert_close(FUSIONS["sum"].combine(x), (wide[0] + wide[1] + wide[2]).float())
    torch.testing.assert_close(FUSIONS["mean"].combine(x), wide.mean(0).float())
    assert torch.equal(FUSIONS["sum"].combine(x), (x[0] + x[1]) + x[2])


def test_every_rule_can_be_cited(rule: Fusion) -> None:
    assert rule.cite
    assert set(rule.cite) <= set(CITATIONS)


def test_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="sum, mean"):
        get_fusion("best")
