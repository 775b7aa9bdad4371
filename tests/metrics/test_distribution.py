"""Distances of sets against closed forms and against the definition, pair by pair."""

from __future__ import annotations

import pytest
import torch

from counterpoint.metrics.distribution import frechet_distance, kernel_distance


def exact_gaussian(n: int, mean: torch.Tensor, scale: torch.Tensor, seed: int) -> torch.Tensor:
    """Samples whose mean and covariance are exactly ``mean`` and ``diag(scale^2)``."""
    raw = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    raw -= raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    return white * scale + mean


def test_frechet_distance_of_gaussians_is_its_closed_form() -> None:
    means = torch.tensor([[0.0, 1.0, -2.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    scales = torch.tensor([[1.0, 2.0, 0.5], [2.0, 2.0, 1.5]], dtype=torch.float64)
    first, second = (exact_gaussian(500, mean, scale, i) for i, (mean, scale) in enumerate(zip(means, scales)))  # noqa: B905
    wanted = (means[0] - means[1]).square().sum() + (scales[0] - scales[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(float(wanted), abs=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_with_correlated_features() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, 64, 5, generator=generator, dtype=torch.float64)
    second = second @ torch.randn(5, 5, generator=generator, dtype=torch.float64)
    a, b = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    wanted = (first.mean(0) - second.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross
    assert frechet_distance(first, second) == pytest.approx(float(wanted), abs=1e-6)


def test_kernel_distance_is_the_mean_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 4, generator=generator), torch.randn(9, 4, generator=generator) + 0.5

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() @ b.double() / 4 + 1) ** 3)

    within_x = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    within_y = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    across = [k(a, b) for a in x for b in y]
    wanted = sum(within_x) / 30 + sum(within_y) / 72 - 2 * sum(across) / 54
    assert kernel_distance(x, y) == pytest.approx(wanted, rel=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.tensor([kernel_distance(*torch.randn(2, 8, 3, generator=generator)) for _ in range(400)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_one_sample_is_no_set(distance) -> None:
    with pytest.raises(ValueError, match="at least two samples"):
        distance(torch.zeros(1, 4), torch.zeros(5, 4))
