"""How far two sets of pictures are from each other, by features of a network that is handed in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.metrics.metric import Reduce
from counterpoint.types import UserError

Features = Float[Tensor, "_ d"]
LEAST = 2048
"""Samples below which a Frechet distance says more about their number than about the pictures."""


def frechet_distance(features: Features, references: Features) -> float:
    """Frechet distance of two Gaussians fitted to features (Heusel et al. 2017, arXiv:1706.08500, Eq. 6).

    It is called FID only on the Inception features of that paper. It is biased upwards for few samples: report
    :func:`kernel_distance` below :data:`LEAST`.

    Raises:
        UserError: fewer than two samples in a set.
    """
    return frechet_from(references)(features)


def frechet_from(references: Features) -> Reduce:
    """:func:`frechet_distance` from one set to many, of which only the others are looked at again each time."""
    centre, spread = _gaussian(references)
    values, vectors = torch.linalg.eigh(spread)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def distance(features: Tensor) -> float:
        mean, covariance = _gaussian(features)
        cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        return float((mean - centre).square().sum() + covariance.trace() + spread.trace() - 2 * cross)

    return distance


def kernel_distance(features: Features, references: Features) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3``.

    KID (Binkowski et al. 2018, arXiv:1801.01401, Eq. 4) on its Inception features; may be slightly negative. Over all
    pairs instead of random subsets, so the same sets always give the same number. (torchmetrics' own sum divides by
    one set's size for both.)

    Raises:
        UserError: fewer than two samples in a set.
    """
    return kernel_from(references)(features)


def kernel_from(references: Features) -> Reduce:
    """:func:`kernel_distance` from one set to many."""
    y = _set(references)
    own = _within(y)

    def distance(features: Tensor) -> float:
        x = _set(features)
        return float(_within(x) + own - 2 * _kernel(x, y).mean())

    return distance


def _set(rows: Tensor) -> Tensor:
    if len(rows) < 2:
        raise UserError(f"a distance of two sets wants at least two samples in each, got {len(rows)}")
    return rows.double()


def _gaussian(rows: Tensor) -> tuple[Tensor, Tensor]:
    return _set(rows).mean(0), torch.cov(rows.double().T)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: Tensor) -> Tensor:
    """Mean over all pairs of two different samples."""
    square = _kernel(x, x)
    return (square.sum() - square.trace()) / (len(x) * (len(x) - 1))
