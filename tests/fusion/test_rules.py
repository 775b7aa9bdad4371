"""What holds for every operator of every rule in the table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterpoint.apps.citations import CITATIONS
from counterpoint.fusion import FUSIONS, RULES, get_fusion
from counterpoint.types import Fusion, Keys, UserError

SHAPES = [(2, 8, 4, 4), (2, 12, 6)]
COMBINE = {
    f"{rule.name}{site and '@'}{site}": combine
    for rule in FUSIONS.values()
    for site, combine in (("", rule.combine), *rule.sites.items())
}
EXCHANGE = {rule.name: rule.exchange for rule in FUSIONS.values() if rule.exchange}
INJECT = {rule.name: rule.inject for rule in FUSIONS.values() if rule.inject is not torch.add}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    **COMBINE,
    **{f"{name}, exchange": exchange for name, exchange in EXCHANGE.items()},
    **{f"{name}, inject": lambda x, inject=inject: inject(x[0], x[1]) for name, inject in INJECT.items()},
}
operators = pytest.mark.parametrize("name", OPERATORS)


def features(n: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=FUSIONS.values(), ids=FUSIONS)
def rule(request: pytest.FixtureRequest) -> Fusion:
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COMBINE)
def test_one_branch_is_the_identity(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = features(1, shape, dtype=dtype)
    assert torch.equal(COMBINE[name](x), x[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXCHANGE)
def test_one_branch_has_nobody_to_exchange_with(name: str, dtype: torch.dtype) -> None:
    x = features(1, SHAPES[0], dtype=dtype)
    assert torch.equal(EXCHANGE[name](x), x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COMBINE)
def test_shape_and_dtype_stay(name: str, shape: tuple[int, ...], n: int, dtype: torch.dtype) -> None:
    result = COMBINE[name](features(n, shape, dtype=dtype))
    assert result.shape == shape
    assert result.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@operators
def test_dtype_stays_everywhere(name: str, dtype: torch.dtype) -> None:
    assert OPERATORS[name](features(3, SHAPES[0], dtype=dtype)).dtype == dtype


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 5), shape=st.sampled_from(SHAPES))
@pytest.mark.parametrize("name", COMBINE)
def test_order_does_not_matter(name: str, seed: int, n: int, shape: tuple[int, ...]) -> None:
    x = features(n, shape, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(COMBINE[name](x[order]), COMBINE[name](x))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 5))
@pytest.mark.parametrize("name", EXCHANGE)
def test_exchanges_follow_the_order(name: str, seed: int, n: int) -> None:
    x = features(n, SHAPES[0], seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(EXCHANGE[name](x[order]), EXCHANGE[name](x)[order])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
@operators
def test_samples_do_not_see_each_other(name: str, seed: int) -> None:
    x = features(3, (4, 8, 4, 4), seed)
    together = OPERATORS[name](x)
    for sample in range(4):
        alone = OPERATORS[name](x[:, sample : sample + 1])
        torch.testing.assert_close(alone, together[..., sample : sample + 1, :, :, :])


@operators
@pytest.mark.parametrize("silent", [(0, 1, 2), (1,), (0, 2)])
def test_silent_branches_are_legal(name: str, silent: tuple[int, ...]) -> None:
    x = features(3, SHAPES[0])
    x[list(silent)] = 0
    x.requires_grad_()
    result = OPERATORS[name](x)
    result.sum().backward()
    assert torch.isfinite(result).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scale", [1e-6, 1e3])
@operators
def test_extreme_scales_stay_finite_in_half_precision(name: str, scale: float) -> None:
    assert torch.isfinite(OPERATORS[name]((features(3, SHAPES[0]) * scale).half())).all()


@pytest.mark.parametrize("name", sorted({*OPERATORS} - {"sum", "mgda"}))
def test_finite_branches_stay_finite_near_the_limit_of_half_precision(name: str) -> None:
    """All but those whose scale is a sum's."""
    x = 6e4 * features(3, (2, 4, 3, 3)).sign()
    x[1] *= 1e-3
    if "inject" not in name:  # a host and a control that add up to more than there is are not a rule's mistake
        assert OPERATORS[name](x.half()).isfinite().all()


@pytest.mark.parametrize("name", [*EXCHANGE, *INJECT])
def test_tokens_are_maps_in_a_row(name: str) -> None:
    maps = features(2, (2, 6, 4, 4))
    tokens = maps.flatten(3).transpose(2, 3)
    if name in EXCHANGE:
        torch.testing.assert_close(EXCHANGE[name](tokens), EXCHANGE[name](maps).flatten(3).transpose(2, 3))
    else:
        rule = get_fusion(f"{name}:granularity=pixel").inject
        torch.testing.assert_close(rule(*tokens), rule(*maps).flatten(2).transpose(1, 2))


def test_a_function_is_a_rule() -> None:
    def halved(features: Tensor) -> Tensor:
        return features.mean(0) / 2

    assert get_fusion(halved).combine is halved
    assert get_fusion(halved).name == "halved"
    assert get_fusion(FUSIONS["pix"]) is FUSIONS["pix"]


@operators
def test_same_again(name: str) -> None:
    x = features(3, SHAPES[0])
    assert torch.equal(OPERATORS[name](x), OPERATORS[name](x.clone()))


def test_sum_mean_and_max_by_their_equations() -> None:
    x = features(3, SHAPES[0])
    wide = x.double()
    torch.testing.assert_close(FUSIONS["sum"].combine(x), (wide[0] + wide[1] + wide[2]).float())
    torch.testing.assert_close(FUSIONS["mean"].combine(x), wide.mean(0).float())
    assert torch.equal(FUSIONS["sum"].combine(x), (x[0] + x[1]) + x[2])
    largest = FUSIONS["max"].combine(x)
    assert torch.equal(largest.abs(), x.abs().amax(0))
    assert ((largest == x).sum(0) == 1).all()
    tie = torch.tensor([[[[[1.0]]]], [[[[-1.0]]]]])
    assert FUSIONS["max"].combine(tie).item() == 0


def test_only_minimal_impact_changes_a_single_control() -> None:
    assert set(INJECT) == {"minimal-impact"}


def test_every_rule_can_be_cited(rule: Fusion) -> None:
    assert rule.cite
    assert set(rule.cite) <= set(CITATIONS)


def test_names_are_the_tables(rule: Fusion) -> None:
    assert rule is FUSIONS[rule.name] is get_fusion(rule.name)
    assert set(RULES) == set(FUSIONS)


def test_settings_in_a_name() -> None:
    x = features(3, SHAPES[0])
    averaged = get_fusion("pix:delta=-1.5")
    assert averaged.name == "pix:delta=-1.5"
    torch.testing.assert_close(averaged.combine(x), x.mean(0))
    pixel = get_fusion("mgda:reading=literal,granularity=pixel")
    assert not torch.equal(pixel.combine(x), FUSIONS["mgda"].combine(x))
    assert get_fusion("cross:start=0.2,layer=4").keys == Keys(0.2, 4)
    assert get_fusion("0:sum,0.5:cross:layer=2").keys == Keys(layer=2)
    for name, said in (("cross:layer=1.5", "whole number"), ("cross:start=1", "from a share of the steps")):
        with pytest.raises(UserError, match=said):
            get_fusion(name)


def test_a_rule_for_each_part_of_the_schedule() -> None:
    rule = get_fusion("0:cross:delta=0.5,0.4:mgda:reading=literal,granularity=pixel,0.8:sum")
    assert [rule.during(progress).name for progress in (0, 0.39, 0.4, 0.79, 0.8, 1)] == [
        *["cross:delta=0.5"] * 2,
        *["mgda:reading=literal,granularity=pixel"] * 2,
        *["sum"] * 2,
    ]
    assert rule.keys
    assert {"cross-controlnet", "mgda", "controlnet"} < set(rule.cite)
    assert FUSIONS["pix"].during(0.7) is FUSIONS["pix"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("best", "unknown fusion 'best'; there are sum, mean"),
        ("sum:delta=1", "the fusion sum has no setting 'delta'; it has none"),
        ("pix:gamma=1", "it has delta"),
        ("pix:delta=high", "is a number, got 'high'"),
        ("pix:delta=nan", "is a number, got 'nan'"),
        ("0.1:sum", "rise from 0 and stay below 1, got 0.1:sum"),
        ("0:sum,1:mean", "stay below 1"),
        ("0:sum,0.5:mean,0.2:max", "rise from 0"),
        ("0:best", "unknown fusion 'best'"),
        ("0:", "unknown fusion ''"),
        ("mgda:reading=left", "one of min-norm, literal, got 'left'"),
    ],
)
def test_what_is_no_rule(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        get_fusion(name)
