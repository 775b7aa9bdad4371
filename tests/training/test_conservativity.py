"""The conservativity losses against exact Jacobians, and their gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from counterpoint.training.losses.conservativity import conservativity_loss, full_conservativity_loss

D = 3
SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=D)), dtype=torch.float64)
"""Every probe of random signs: their average is the expectation."""


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, D)).double()


def jacobian(field, x: Tensor) -> Tensor:
    """Differentiable with respect to the field's parameters."""
    return torch.autograd.functional.jacobian(field, x, create_graph=True)


def asymmetry(matrix: Tensor) -> Tensor:
    return (matrix - matrix.T).square().sum() / 2


def mean_loss(net: nn.Module, x: Tensor, estimator: str) -> Tensor:
    """Over every probe."""
    return conservativity_loss(net, x.expand(len(SIGNS), D), SIGNS, estimator, step=1e-4).mean()


def gradient(loss: Tensor, net: nn.Module) -> Tensor:
    """With respect to all parameters that it depends on."""
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
                      for g, p in zip(found, net.parameters(), strict=True)])  # fmt: skip


@pytest.mark.parametrize("estimator", ["hutchinson", "symmetric", "paired"])
def test_every_estimator_is_unbiased_and_so_is_its_gradient(estimator: str) -> None:
    net, x = network(0), torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted, got = asymmetry(jacobian(net, x)), mean_loss(net, x, estimator)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(got, net), gradient(wanted, net), rtol=1e-5, atol=1e-8)


def test_symmetric_is_never_negative_and_zero_for_a_gradient_field() -> None:
    torch.manual_seed(0)
    weight = torch.randn(D, D, dtype=torch.float64)
    probe = torch.randn(50, D, dtype=torch.float64)
    x = torch.randn(50, D, dtype=torch.float64)
    assert (conservativity_loss(lambda x: x @ weight.T, x, probe) >= 0).all()
    assert (conservativity_loss(lambda x: x @ weight.T, x, probe, "hutchinson") < 0).any()
    even = weight + weight.T
    torch.testing.assert_close(
        conservativity_loss(lambda x: x @ even.T, x, probe), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_the_nearer_to_a_gradient_the_surer() -> None:
    """One-probe relative deviations of the two estimators of the same cost, on a matrix whose NAsym is 0.03."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(64, 64, dtype=torch.float64, generator=generator)
    even, odd = (raw + raw.T) / 2, (raw - raw.T) / 2
    matrix = even + (0.03 / 0.97) ** 0.5 * odd * even.norm() / odd.norm()
    x, probe = torch.randn(2, 2000, 64, dtype=torch.float64, generator=generator)
    spread = {}
    for estimator in ("hutchinson", "symmetric"):
        values = conservativity_loss(lambda x: x @ matrix.T, x, probe.sign(), estimator)
        torch.testing.assert_close(values.mean(), asymmetry(matrix), rtol=0.05, atol=0)
        spread[estimator] = float(values.std() / values.mean())
    assert spread["symmetric"] < spread["hutchinson"] / 2, spread


def test_the_full_loss_is_the_whole_models_less_a_constant() -> None:
    """Proposition 4.2 and theorem 4.1 on small networks."""
    control, host = network(2), network(3)
    x = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    inner, outer = jacobian(control, x), jacobian(host, x)
    whole = asymmetry(inner + outer) - asymmetry(outer)
    got = full_conservativity_loss(control, host, x.expand(len(SIGNS), D), SIGNS).mean()
    torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(got, control), gradient(whole, control), rtol=1e-7, atol=1e-10)
    simple = mean_loss(control, x, "symmetric")
    assert got <= 2 * 2**0.5 * outer.norm() * simple.sqrt() + simple


class Once(torch.autograd.Function):
    """A tanh without a second derivative, as fused attention is."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        made = x.tanh()
        context.save_for_backward(made)
        return made

    @staticmethod
    @once_differentiable
    def backward(context: Any, slope: Tensor) -> Tensor:
        return slope * (1 - context.saved_tensors[0] ** 2)


def test_paired_is_symmetric_without_second_derivatives() -> None:
    """Sample by sample, value and gradient."""
    net, (x, probe) = network(5), torch.randn(2, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def fused(x: Tensor) -> Tensor:
        first, _, last = net
        return last(Once.apply(first(x)))

    wanted = conservativity_loss(net, x, probe)
    got = conservativity_loss(fused, x, probe, "paired", step=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-12)
    for one, other in zip(got, wanted, strict=True):
        slope, right = (
            torch.autograd.grad(loss, list(net.parameters())[:3], retain_graph=True) for loss in (one, other)
        )
        torch.testing.assert_close(slope, right, rtol=1e-4, atol=1e-7)
    with pytest.raises(RuntimeError, match="used in the graph"):
        gradient(conservativity_loss(fused, x, probe).sum(), net)


def test_paired_is_zero_where_nothing_is_asymmetric() -> None:
    """And its gradient a number: what is fixed has no direction there."""
    weight = torch.eye(D, dtype=torch.float64, requires_grad=True)
    x, probe = torch.randn(2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for field in (lambda x: x @ weight.T, lambda x: 0 * (x @ weight.T)):
        loss = conservativity_loss(field, x, probe, "paired").sum()
        assert loss < 1e-12
        assert torch.autograd.grad(loss, weight)[0].isfinite().all()
