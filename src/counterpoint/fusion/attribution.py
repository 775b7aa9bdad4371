"""Whose feature a fused feature is made of (ours): one measure for every rule, also for a user's own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.fusion.layout import Maps

RIDGE = 1e-4
"""Of the mean squared length of the branches' features: where two are parallel they share what they explain."""


def shares(features: Maps, fused: Float[Tensor, "b c h w"]) -> Float[Tensor, "n b h w"]:
    """At each place, each branch's part in the fused feature, summing to 1; 0 for all where nobody says anything.

    ``a = argmin |fused - sum_n a_n f_n|^2`` over channels; the share of branch n is ``|a_n| |f_n|`` over the sum. Of a
    rule that weighs branches place by place it recovers the weights exactly; of one that weighs channels, their mean.

    Args:
        features: of n branches at one site.
        fused: what the rule made of them.
    """
    f, y = features.float(), fused.float()
    gram = torch.einsum("nbchw,mbchw->bhwnm", f, f)
    seen = torch.einsum("nbchw,bchw->bhwn", f, y)
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    ridge = RIDGE * lengths.mean(-1, keepdim=True)
    silent = ridge == 0
    weights = torch.linalg.solve(gram + torch.diag_embed((ridge + silent).expand_as(lengths)), seen)
    parts = (weights.abs() * lengths.sqrt()).movedim(-1, 0)
    total = parts.sum(0)
    return torch.where(total > 0, parts / total, 0.0)
