"""Branches: when they speak, how loudly, and that silent ones are not run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.control.keys import Lending
from counterpoint.control.sites import fuse
from counterpoint.control.stack import Branch, run_stack
from counterpoint.control.weight import Weight
from counterpoint.fusion import FUSIONS
from counterpoint.fusion.maxfusion import maxfusion_exchange
from counterpoint.types import Fusion, Keys, Moment, UserError


def moment(index: int, total: int = 10) -> Moment:
    return Moment(index, total, torch.tensor(500))


def test_weight_is_linear_between_knots() -> None:
    weight = Weight.parse("0:1,0.5:0.4")
    assert [round(weight.at(p), 6) for p in (0, 0.25, 0.5, 0.9)] == [1, 0.7, 0.4, 0.4]
    assert Weight.parse("0.8").at(0.3) == 0.8
    assert Weight.parse("0.2:1,0.6:0").at(0.1) == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-2, 2)), min_size=1, max_size=5, unique_by=lambda knot: knot[0]))
def test_weight_stays_between_its_knots(knots: list[tuple[float, float]]) -> None:
    weight = Weight(tuple(sorted(knots)))
    values = [value for _, value in knots]
    for progress in (0, 0.1, 0.37, 0.5, 0.99, 1):
        assert min(values) - 1e-9 <= weight.at(progress) <= max(values) + 1e-9


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "0:1,0:2", "0.5:1,0.2:1", "0:1,2:1", "1:2:3"])
def test_wrong_weights_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        Weight.parse(text)


@pytest.mark.parametrize("window", [(0.5, 0.2), (-0.1, 1), (0, 1.1), (0.5, 0.5), (float("nan"), 1)])
def test_wrong_windows_are_refused(parts: dict, window: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="window"):
        Branch("pose", parts["networks"][0], torch.zeros(1, 3, 64, 64), windows=(window,))


def test_silent_branches_are_not_run(parts: dict) -> None:
    networks = [parts["networks"][0], parts["networks"][1], parts["networks"][0]]
    settings = [
        {"weights": (Weight.parse(1),)}, {"windows": ((0.0, 0.3),)}, {"weights": (Weight.parse("0:0,0.5:0,0.6:1"),)}
    ]  # fmt: skip
    branches = [
        Branch(name, network, torch.rand(2, 3, 64, 64), **setting)
        for name, network, setting in zip("abc", networks, settings, strict=True)
    ]
    seen = []
    handles = [network.register_forward_hook(lambda module, *_: seen.append(module)) for network in parts["networks"]]
    text = torch.zeros(2, 24, 32)
    for index in range(10):
        run_stack(branches, FUSIONS["sum"], torch.zeros(2, 4, 8, 8), moment(index), text)
    for handle in handles:
        handle.remove()
    # a runs in all ten steps, b in the first three, c after progress 0.5, where its weight leaves zero
    assert seen.count(parts["networks"][0]) == 10 + 4
    assert seen.count(parts["networks"][1]) == 3


def test_a_sum_may_have_an_exchange(parts: dict) -> None:
    """What a rule of one's own has besides its sum is not passed over, watched or not."""
    hints = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    branches = [
        Branch(name, network, hint) for name, network, hint in zip("ab", parts["networks"], hints, strict=False)
    ]
    latents, text = torch.rand(2, 4, 8, 8), torch.rand(2, 24, 32)
    mine = replace(FUSIONS["sum"], name="mine", exchange=maxfusion_exchange)
    plain, exchanged, watched = (
        run_stack(branches, fusion, latents, moment(0), text, watch=watch)
        for fusion, watch in ((FUSIONS["sum"], None), (mine, None), (mine, lambda *_: None))
    )
    assert plain is not None
    assert exchanged is not None
    assert watched is not None
    torch.testing.assert_close(exchanged.mid, watched.mid)
    assert not torch.allclose(plain.mid, exchanged.mid)


def test_nobody_speaks() -> None:
    assert run_stack([], FUSIONS["sum"], torch.zeros(1, 4, 8, 8), moment(0), torch.zeros(1, 24, 32)) is None


@torch.no_grad()
def test_a_rule_can_differ_by_site(parts: dict) -> None:
    branches = [Branch(name, net, torch.rand(2, 3, 64, 64)) for name, net in zip("ab", parts["networks"], strict=True)]
    seen: list[str] = []

    def noting(site: str):
        def combine(features: torch.Tensor) -> torch.Tensor:
            seen.append(site)
            return features[0]

        return combine

    rule = Fusion("mixed", "", noting("any"), sites={"down.1": noting("down.1"), "last": noting("last")})
    said = run_stack(branches, rule, torch.zeros(2, 4, 8, 8), moment(0), torch.zeros(2, 24, 32))
    assert len(said.down) == 4
    assert seen == ["any", "down.1", "any", "any", "last"]


@torch.no_grad()
def test_keys_are_lent_from_the_foreground_to_the_others(parts: dict) -> None:
    pair = [Branch(name, net, torch.rand(2, 3, 64, 64)) for name, net in zip("ab", parts["networks"], strict=True)]
    half = torch.zeros(1, 1, 8, 8)
    half[..., 4:] = 1
    said: list[torch.Tensor] = []

    def note(features: torch.Tensor) -> torch.Tensor:
        said.append(features)
        return features.sum(0)

    rule = Fusion("note", "", note, keys=Keys())

    def run(branches: list[Branch], lending: Lending | None, index: int = 5) -> torch.Tensor:
        """The branches' features at the last site."""
        said.clear()
        run_stack(branches, rule, torch.ones(2, 4, 8, 8), moment(index), torch.ones(2, 24, 32), lending)
        return said[-1]

    plain, lent = run(pair, None), run(pair, Lending({}, {"a": half}))
    assert torch.equal(lent[0], plain[0]), "the foreground hears nobody"
    assert not torch.allclose(lent[1], plain[1])
    assert torch.equal(run(pair[::-1], Lending({}, {"a": half})), lent.flip(0)), "the user's order stays"
    assert torch.equal(run(pair, Lending({}, {"a": half}), index=0), plain), "before the start"
    rule = replace(rule, keys=Keys(start=0.0))
    assert torch.equal(run(pair, Lending({}, {"a": half}), index=0), lent), "this rule starts at once"
    rule = replace(rule, keys=Keys(layer=99))
    with pytest.raises(UserError, match="layer=99 is too many"):
        run(pair, Lending({}, {"a": half}))
    rule = replace(rule, keys=Keys())
    assert torch.equal(run(pair, Lending({"a": [[1]]})), plain), "before there is a mask"
    assert torch.equal(run(pair[:1], Lending({}, {"a": half})), plain[:1]), "with one control"
    assert torch.equal(run(pair, Lending({}, {"a": half, "b": half})), plain), "nobody is left to listen"
    same = [Branch("a", pair[0].network, pair[0].hint), Branch("b", pair[0].network, pair[1].hint)]
    assert not torch.allclose(run(same, Lending({}, {"a": half}))[1], run(same, None)[1]), "two hints, one network"


@torch.no_grad()
def test_a_branch_speaks_in_its_region(parts: dict) -> None:
    """Outside the region of one branch only the other one is heard; a soft edge fades."""
    region = torch.zeros(2, 1, 64, 64)
    region[..., 32:] = 1
    region[..., 24:32] = 0.25
    hints = [torch.rand(2, 3, 64, 64) for _ in "ab"]
    args = FUSIONS["sum"], torch.randn(2, 4, 8, 8), moment(0), torch.randn(2, 24, 32)
    a, b = (Branch(name, net, hint) for name, net, hint in zip("ab", parts["networks"], hints, strict=True))
    alone_a, alone_b = (run_stack([one], *args) for one in (a, b))
    both = run_stack([replace(a, region=region), b], *args)
    first = both.down[0]  # 8 x 8: one place for 8 pixels
    assert torch.equal(first[..., :3], alone_b.down[0][..., :3])
    torch.testing.assert_close(first[..., 3], 0.25 * alone_a.down[0][..., 3] + alone_b.down[0][..., 3])
    torch.testing.assert_close(first[..., 4:], (alone_a.down[0] + alone_b.down[0])[..., 4:])


@torch.no_grad()
def test_decay_weakens_all_but_the_deepest_site(parts: dict) -> None:
    branch = Branch("a", parts["networks"][0], torch.rand(2, 3, 64, 64))
    args = FUSIONS["sum"], torch.randn(2, 4, 8, 8), moment(0), torch.randn(2, 24, 32)
    full, weak = run_stack([branch], *args), run_stack([replace(branch, decay=0.5)], *args)
    assert torch.equal(full.mid, weak.mid)
    for depth, (one, other) in enumerate(zip(full.down, weak.down, strict=True)):
        torch.testing.assert_close(other, one * 0.5 ** (len(full.down) - depth))


@torch.no_grad()
def test_a_control_that_comes_first_is_no_part_of_the_unconditional_half(parts: dict) -> None:
    """Zeros in its place would wipe the others out under mgda, and halve them under mean."""
    hint, args = torch.rand(2, 3, 64, 64), (torch.randn(2, 4, 8, 8), moment(0), torch.randn(2, 24, 32))
    first = Branch("a", parts["networks"][0], hint, conditional_only=True)
    other = Branch("b", parts["networks"][1], hint)
    for name in ("sum", "mean", "mgda", "pix"):
        found = run_stack([first, other], FUSIONS[name], *args)
        alone, both = (
            run_stack(some, FUSIONS[name], *args) for some in ([other], [replace(first, conditional_only=False), other])
        )
        assert torch.equal(found.mid[:1], alone.mid[:1]), name
        torch.testing.assert_close(found.mid[1:], both.mid[1:])
    assert not run_stack([first], FUSIONS["sum"], *args).mid[:1].any()


def test_what_does_not_fit_together_is_named() -> None:
    def said(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(*shape) for shape in shapes]

    small, large = said((2, 8, 4, 4), (2, 8, 2, 2)), said((2, 8, 4, 4), (2, 16, 2, 2))
    with pytest.raises(UserError, match=r"fit together at mid \(pose \(2, 8, 2, 2\), depth \(2, 16, 2, 2\)\)"):
        fuse(FUSIONS["pix"], {"pose": small, "depth": large})
    with pytest.raises(UserError, match=r"numbers of sites \(pose 2, depth 1\)"):
        fuse(FUSIONS["sum"], {"pose": small, "depth": large[:1]})
    with pytest.raises(UserError, match=r"made \(8, 4, 4\) of \(2, 2, 8, 4, 4\) at down\.0"):
        fuse(Fusion("mine", "", lambda features: features.mean((0, 1))), {"pose": small, "depth": small})
    with pytest.raises(UserError, match=r"site 'down\.7'"):
        fuse(replace(FUSIONS["sum"], sites={"down.7": FUSIONS["mean"].combine}), {"pose": small})
    pooled = said((2, 8, 1, 1), (2, 8, 1, 1))
    assert fuse(FUSIONS["sum"], {"pose": small, "style": pooled})[0].shape == (2, 8, 4, 4)
