"""MaxFusion (Nair et al. 2024, arXiv:2404.09977): per place the branch with the larger normalised variance.

For any number of branches: the winner is averaged with the branches that correlate with it. Statistics are per sample;
the public code takes them over the batch and returns the halves of a guided batch in each other's place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoint.fusion.layout import Maps, agreement, average, exchange_on_maps, on_maps

DELTA = 0.7
"""Correlation above which branches are averaged."""


@on_maps
def maxfusion(features: Maps) -> Tensor:
    """What the host gets: at each place the mean of the winner and of what correlates with it."""
    with torch.no_grad():
        chosen, _ = _choose(features.float())
    return average(features, chosen[:, :, None].float())


@exchange_on_maps
def maxfusion_exchange(features: Maps) -> Maps:
    """What the branches tell each other: the chosen ones take their mean, the others the winner at their own scale."""
    with torch.no_grad():
        chosen, winners = _choose(features.float())
    return hand_over(features, chosen, winners)


def hand_over(features: Maps, chosen: Tensor, winners: Tensor) -> Maps:
    """Branches that are chosen at a place take their mean; the others the winner, at their own standard deviation.

    Args:
        features: of n branches.
        chosen: ``(n, b, h, w)``: who is averaged.
        winners: likewise: who won.
    """
    x = features.float()
    with torch.no_grad():
        deviation = (x - x.mean(2, keepdim=True)).square().mean(2, keepdim=True).sqrt()
        strongest = (deviation * winners[:, :, None]).amax(0)
        scale = torch.where(strongest > 0, deviation / strongest, 1.0)
    first = average(features, winners[:, :, None].float()).float()
    shared = average(features, chosen[:, :, None].float()).float()
    # a strong branch's scale may be more than half precision holds
    limit = min(torch.finfo(one).max for one in (features.dtype, first.dtype))
    return torch.where(chosen[:, :, None], shared, (scale * first).clamp(-limit, limit)).to(features.dtype)


def _choose(x: Maps) -> tuple[Tensor, Tensor]:
    """Which branches are averaged, and which won, ``(n, b, h, w)`` each."""
    centred = x - x.mean(2, keepdim=True)
    variance = centred.square().mean(2)
    total = variance.sum((2, 3), keepdim=True)
    share = torch.where(total > 0, variance / total, 0.0)
    winners = share == share.amax(0)
    agree = agreement(centred, winners) > DELTA
    return winners | agree, winners
