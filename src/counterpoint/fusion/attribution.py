"""Whose feature a fused feature is made of (ours): one measure for every rule, also for a user's own; and how far
branches agree, whatever the rule."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.fusion.layout import Maps, products
from counterpoint.fusion.minimal_impact import min_norm_weights

RIDGE = 1e-4
"""Beside the ones of the branches' correlations: where two are parallel they share what they explain."""


def shares(features: Maps, fused: Float[Tensor, "b c h w"]) -> Float[Tensor, "n b h w"]:
    """At each place, each branch's part in the fused feature, summing to 1; 0 for all where nobody says anything.

    ``a = argmin |fused - sum_n a_n f_n|^2`` over channels; the share of branch n is ``|a_n| |f_n|`` over the sum. Of a
    rule that weighs branches place by place that is each one's weight times its length, to the ridge.

    Args:
        features: of n branches at one site.
        fused: what the rule made of them.
    """
    f, y = features.float(), fused.float()
    length = f.square().sum(2, keepdim=True).sqrt()
    unit = f / torch.where(length > 0, length, 1.0)
    correlation = torch.einsum("nbchw,mbchw->bhwnm", unit, unit)
    ridge = RIDGE * torch.eye(len(f), device=f.device)
    silent = torch.diag_embed((correlation.diagonal(dim1=-2, dim2=-1) == 0).float())
    seen = torch.einsum("nbchw,bchw->bhwn", unit, y)
    parts = torch.linalg.solve(correlation + ridge + silent, seen).abs().movedim(-1, 0)
    total = parts.sum(0)
    return torch.where(total > 0, parts / total, 0.0)


def correlation(features: Maps) -> Float[Tensor, "b h w"]:
    """At each place the Pearson correlation over channels of two branches, the rho of MaxFusion and PixFusion; the mean
    over all pairs, 0 with a branch that is constant there, 1 for one branch alone."""
    x = features.float()
    if len(x) == 1:
        return torch.ones_like(x[0, :, 0])
    dots = products(x - x.mean(2, keepdim=True), (1,))
    norms = dots.diagonal().movedim(-1, 0).sqrt()
    scale = norms[:, None] * norms
    pairs = torch.where(scale > 0, dots / scale, 0.0)
    places = torch.triu_indices(len(x), len(x), 1)
    return pairs[places[0], places[1]].mean(0)


def min_norm_shares(features: Maps) -> Float[Tensor, "b n"]:
    """Of each sample the weights of MGDA's combination (Minimal Impact ControlNet, Eq. 8): small for a long branch
    whose direction a shorter one has too, towards one half each for two that oppose each other, all on one that is
    silent."""
    x = features.float()
    size = x.abs().amax()
    x = x / torch.where(size > 0, size, 1.0)
    return min_norm_weights(products(x, (1, 2, 3)).movedim((0, 1), (-2, -1)))
