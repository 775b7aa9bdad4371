"""Cross-ControlNet (2025): per pixel the branch that varies most, per channel the stronger one.

PixFusion is the paper's Eqs. 1 to 4 and Algorithm 1, ChannelFusion its Eqs. 6 to 8, both for any number of branches:
whatever agrees with the winner is averaged with it. Statistics are per sample; the public code takes them over the
batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.fusion.layout import Maps, agreement, average, exchange_on_maps, on_maps
from counterpoint.fusion.maxfusion import hand_over
from counterpoint.types import Combine, Exchange, UserError

PlaceMaps = Float[Tensor, "n b h w"]
BINOMIAL, AUTHORS = 4, 12
"""The middle of the kernel ``((1, 2, 1), (2, middle, 2), (1, 2, 1))``: the paper's, and the authors' public code's."""


def pix_fusion(delta: float = 0.7, *, authors: bool = False) -> Combine:
    """PixFusion: at each place the mean of the winner and of every branch whose correlation with it exceeds ``delta``.

    The winner has the largest standard deviation over channels, as a share of its sum over places, after smoothing. A
    conditioning scale never changes who wins.

    Args:
        delta: threshold of the correlation, in -1..1. Below -1 everything is averaged; 0 is not yet averaging.
        authors: as the public code has it: variance for standard deviation, and :data:`AUTHORS` in the kernel.
    """

    @on_maps
    def pix(features: Maps) -> Tensor:
        chosen, _ = _choose(features, delta, authors)
        return average(features, chosen[:, :, None].float())

    return pix


def authors_exchange(delta: float = 0.7) -> Exchange:
    """What the branches tell each other in the authors' public code, which the paper does not mention: PixFusion's
    choice, handed over as in MaxFusion."""

    @exchange_on_maps
    def exchange(features: Maps) -> Maps:
        return hand_over(features, *_choose(features, delta, authors=True))

    return exchange


def channel_fusion(delta: float = 0.7, *, authors: bool = False) -> Combine:
    """ChannelFusion: of each channel the mean of the branches, weighted by standard deviation over places.

    Branches whose deviation is less than ``delta`` times the largest one's are left out.

    Args:
        delta: threshold of the ratio of deviations, in 0..1.
        authors: as the public code has it: variance for standard deviation.

    Raises:
        UserError: ``delta`` is outside 0..1; above 1 nobody would be strong enough.
    """
    if not 0 <= delta <= 1:
        raise UserError(f"the threshold of ChannelFusion is a ratio in 0..1, got {delta:g}")

    @on_maps
    def channel(features: Maps) -> Tensor:
        x = features.float()
        variance = (x - x.mean((3, 4), keepdim=True)).square().mean((3, 4), keepdim=True)
        deviation = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)  # the root has no slope at 0
        strength = variance if authors else deviation
        return average(features, strength * (strength >= delta * strength.amax(0)))

    return channel


def smooth(maps: Tensor, middle: int = BINOMIAL) -> Tensor:
    """A 3 x 3 kernel over the last two axes, its sum 1 and its middle :data:`BINOMIAL` or another; zeros outside.

    Sums of neighbours, twice along each axis: thirty times faster on a CPU than a convolution of so many maps.
    """
    total = F.pad(maps, (1, 1, 1, 1))
    for _ in range(2):
        total = total[..., 1:] + total[..., :-1]
    for _ in range(2):
        total = total[..., 1:, :] + total[..., :-1, :]
    if middle != BINOMIAL:
        total = total + (middle - BINOMIAL) * maps
    return total / (12 + middle)


@torch.no_grad()  # who wins is a decision, not a function to differentiate
def _choose(features: Maps, delta: float, authors: bool) -> tuple[Tensor, Tensor]:
    """Who is averaged, and who won, ``(n, b, h, w)`` each."""
    middle = AUTHORS if authors else BINOMIAL
    x = features.float()
    centred = x - x.mean(2, keepdim=True)
    spread = centred.square().mean(2)
    strength = smooth(_shares(spread if authors else spread.sqrt()), middle)
    winners = strength == strength.amax(0)
    return winners | (agreement(smooth(centred, middle), winners) > delta), winners


def _shares(strength: PlaceMaps) -> PlaceMaps:
    """Of each branch, its strength as a share of the sum over places; 0 for a silent branch."""
    total = strength.sum((2, 3), keepdim=True)
    return torch.where(total > 0, strength / total, 0.0)
