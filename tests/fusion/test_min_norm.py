"""The min-norm point and both readings of Minimal Impact ControlNet, against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from counterpoint.fusion.minimal_impact import (
    CAP,
    BalancedInjection,
    balanced_combination,
    literal_weights,
    min_norm_weights,
)


def gram(vectors: torch.Tensor) -> torch.Tensor:
    return vectors @ vectors.transpose(-1, -2)


def by_scipy(g: np.ndarray) -> float:
    n = len(g)
    found = min(
        minimize(
            lambda w: w @ g @ w,
            start,
            jac=lambda w: 2 * g @ w,
            bounds=[(0, 1)] * n,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 500},
        ).fun
        for start in [np.full(n, 1 / n), *np.eye(n)]
    )
    return float(found)


@pytest.mark.parametrize("n", [2, 3, 4, 6, 7, 9])
@pytest.mark.parametrize("size", [2, 5, 20])
def test_weights_reach_the_least_norm(n: int, size: int) -> None:
    vectors = torch.randn(6, n, size, generator=torch.Generator().manual_seed(n * size), dtype=torch.float64)
    vectors[3:] += 1.5  # without a shift the hull often holds zero
    weights = min_norm_weights(gram(vectors))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, dtype=torch.float64))
    for g, w in zip(gram(vectors).numpy(), weights.numpy(), strict=True):
        assert w @ g @ w <= by_scipy(g) + 1e-7 * g.diagonal().max()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 9), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_point_opposes_nobody(seed: int, n: int, scale: float) -> None:
    vectors = scale * torch.randn(4, n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors[0, -1] = vectors[0, 0]  # a duplicate
    vectors[1, 0] = 0
    g = gram(vectors)
    w = min_norm_weights(g)
    products = (g @ w[..., None])[..., 0]
    norm = (w * products).sum(-1, keepdim=True)
    slack = 1e-8 * g.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    assert (products >= norm - slack).all()


def test_two_vectors_by_the_papers_equation() -> None:
    """Eq. 8: gamma = clip(<f2 - f1, f2> / |f2 - f1|^2), on f1 in the min-norm reading, on f2 in the literal one."""
    vectors = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = vectors.unbind(1)
    gamma = (((second - first) * second).sum(-1) / (second - first).square().sum(-1)).clamp(0, 1)
    torch.testing.assert_close(min_norm_weights(gram(vectors))[:, 0], gamma)
    torch.testing.assert_close(literal_weights(gram(vectors))[:, 1], gamma)


def test_a_silent_branch_in_both_readings() -> None:
    active = torch.randn(1, 8, 4, 4)
    features = torch.stack([active, torch.zeros_like(active)])
    assert balanced_combination("min-norm")(features).abs().max() == 0
    torch.testing.assert_close(balanced_combination("literal", total_scale=1)(features), active)


@pytest.mark.parametrize("granularity", ["sample", "pixel"])
@pytest.mark.parametrize("reading", ["min-norm", "literal"])
def test_combination_by_its_definition(reading: str, granularity: str) -> None:
    features = torch.randn(3, 2, 5, 4, 3, generator=torch.Generator().manual_seed(1))
    weigh = min_norm_weights if reading == "min-norm" else literal_weights
    wanted = torch.zeros(2, 5, 4, 3, dtype=torch.float64)
    places = [(slice(None), slice(None))] if granularity == "sample" else [(i, j) for i in range(4) for j in range(3)]
    for b in range(2):
        for i, j in places:
            part = features[:, b, :, i, j].double()
            flat = part.reshape(3, -1)
            w = weigh(gram(flat))
            wanted[b, :, i, j] = 2 * (w.reshape(3, *[1] * (part.ndim - 1)) * part).sum(0)
    got = balanced_combination(reading, total_scale=2, granularity=granularity)(features)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reading", ["min-norm", "literal"])
def test_injection_by_its_definition(reading: str) -> None:
    e, f = torch.randn(2, 6, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    f[1] *= 1e-3  # beyond the cap in one reading
    f[2] = 0
    f[3] = e[3]
    got = BalancedInjection(reading)(e, f)
    for b in range(6):
        x, y = e[b].double(), f[b].double()
        a = max(float((x * x).sum() - (x * y).sum()), 0.0)
        c = max(float((y * y).sum() - (x * y).sum()), 0.0)
        above, below = (a, c) if reading == "min-norm" else (c, a)
        factor = 1.0 if a == c == 0 else CAP if below == 0 else min(above / below, CAP)
        torch.testing.assert_close(got[b].double(), x + factor * y, rtol=1e-4, atol=1e-4)


def test_gradients_at_a_silent_control() -> None:
    """Zero-initialised convolutions can learn under the min-norm reading only."""
    host = torch.randn(2, 4, 3, 3)
    slopes = {}
    for reading in ("min-norm", "literal"):
        control = torch.zeros(2, 4, 3, 3, requires_grad=True)
        BalancedInjection(reading)(host, control).sum().backward()
        assert control.grad.isfinite().all()
        slopes[reading] = control.grad.abs().max()
    assert slopes["min-norm"] == CAP
    assert slopes["literal"] == 0
