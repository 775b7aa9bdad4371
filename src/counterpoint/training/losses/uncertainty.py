"""Rewards weighed by how sure they are: Ctrl-U (Zhang et al. 2024, arXiv:2410.11236).

The reader looks at two estimates of the same picture, from a timestep and from the next noisier one; where its two
readings differ, neither is to be trusted. Nothing is detached: disagreement itself is paid for.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.training.losses.reward import valid_mean

Maps = Float[Tensor, "b c h w"]
Places = Float[Tensor, "b h w"]


def disagreement(first: Maps, second: Maps) -> Places:
    """Of two readings of depth or edges: their absolute difference, the mean over channels."""
    return (first - second).abs().mean(1)


def divergence(first: Maps, second: Maps) -> Places:
    """Of two readings of classes, as logits: the Kullback-Leibler divergence of the second from the first."""
    one, two = first.log_softmax(1), second.log_softmax(1)
    return F.kl_div(one, two, log_target=True, reduction="none").sum(1)


def uncertain_error(error: Places, uncertainty: Places, scale: float) -> Float[Tensor, " b"]:
    """``exp(-u) error + scale u`` of each sample, the mean over places."""
    return ((-uncertainty).exp() * error + scale * uncertainty).flatten(1).mean(1)


def uncertain_class_error(
    error: Places, uncertainty: Places, classes: Int[Tensor, "b h w"], scale: float
) -> Float[Tensor, " b"]:
    """The same for classes, whose divergence is scaled first: ``exp(-scale u) error + scale u``, over places whose
    class is not -1."""
    u = scale * uncertainty
    return valid_mean((-u).exp() * error + u, classes)
