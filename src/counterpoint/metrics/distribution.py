"""How far two sets of pictures are from each other, by features of a network that is handed in."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

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
    _check(features, references)
    metric = FrechetInceptionDistance(feature=_AsIs(features.shape[1]), normalize=True)
    metric.update(references.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def kernel_distance(features: Features, references: Features) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3``.

    KID (Binkowski et al. 2018, arXiv:1801.01401, Eq. 4) on its Inception features; may be slightly negative. Over all
    pairs instead of random subsets, so the same sets always give the same number. (torchmetrics' own sum divides by
    one set's size for both.)

    Raises:
        UserError: fewer than two samples in a set.
    """
    _check(features, references)
    x, y = features.double(), references.double()
    within = sum(_off_diagonal_mean(_kernel(rows, rows)) for rows in (x, y))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(square: Tensor) -> Tensor:
    n = len(square)
    return (square.sum() - square.trace()) / (n * (n - 1))


def _check(*sets: Tensor) -> None:
    for rows in sets:
        if len(rows) < 2:
            raise UserError(f"a distance of two sets wants at least two samples in each, got {len(rows)}")


class _AsIs(nn.Module):
    """What torchmetrics takes for a network: features pass through."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        return features
