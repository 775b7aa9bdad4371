"""How far what a ControlNet adds is from a gradient, as a loss (Minimal Impact ControlNet, ICLR 2025, section 4.3).

With ``J`` the Jacobian of the prediction through the ControlNet, all of these are unbiased for ``|J - J^T|^2 / 2``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from counterpoint.metrics.conservativity import Field, jacobian_products

Estimator = Literal["hutchinson", "symmetric", "paired"]


def conservativity_loss(
    field: Field,
    x: Float[Tensor, "b ..."],
    probe: Float[Tensor, "b ..."],
    estimator: Estimator = "symmetric",
    *,
    second: Float[Tensor, "b ..."] | None = None,
    step: float = 1e-2,
) -> Float[Tensor, " b"]:
    """One estimate for each sample, differentiable with respect to the field's parameters.

    ``"hutchinson"`` is the paper's: ``|J^T v|^2 - <J^T v, J v>``. ``"symmetric"`` (ours) is ``|J v - J^T v|^2 / 2``:
    the same cost, never negative, and the surer the nearer ``J`` is to symmetric. ``"paired"`` (ours) is
    ``(u.J v - v.J u)^2 / 2`` by central differences: no second derivative, so it works with fused attention,
    checkpointing and sharding, for more variance (average it over a batch) and an error of the order of ``step^2``.

    Args:
        field: what the ControlNet does, ``(b, ...) -> (b, ...)`` sample by sample;
            :func:`counterpoint.control.influence.influence`. ``"paired"`` asks for four times as many at once.
        x: where.
        probe: independent entries of mean 0 and variance 1.
        estimator: which.
        second: another probe, for ``"paired"``.
        step: of its differences, in units of ``x``.
    """
    if estimator == "paired":
        if second is None:
            raise ValueError("the paired estimator wants a second probe")
        along, across = _differences(field, x, (probe, second), step)
        return (_inner(second, along) - _inner(probe, across)).square() / 2
    forward, backward = _products(field, x, probe)
    if estimator == "symmetric":
        return _inner(forward - backward, forward - backward) / 2
    return _inner(backward, backward) - _inner(backward, forward)


def full_conservativity_loss(
    field: Field, host: Field, x: Float[Tensor, "b ..."], probe: Float[Tensor, "b ..."]
) -> Float[Tensor, " b"]:
    """The loss of the whole model without the part that no ControlNet can change (Eq. 16), one estimate a sample.

    Its gradient with respect to the ControlNet is that of the loss of the whole model (proposition 4.2), and it is
    bounded by the simplified loss (theorem 4.1).

    Args:
        field: what the ControlNet does.
        host: what the host does where the control's features are a constant.
        x: where.
        probe: independent entries of mean 0 and variance 1.
    """
    forward, backward = _products(field, x, probe)
    _, host_backward = _products(host, x, probe)
    return _inner(2 * host_backward + backward, backward - forward)


def _products(field: Field, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """``J v`` and ``J^T v``, to be differentiated."""
    with _SpeltOut():
        return jacobian_products(field, x, probe, create_graph=True)


class _SpeltOut(TorchFunctionMode):
    """Layer norms in elementary steps: the third derivative of torch's own is silently wrong (pytorch issue 175754)."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        return _layer_norm(*args, **given) if func is torch.nn.functional.layer_norm else func(*args, **given)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    made = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    made = made if weight is None else made * weight
    return made if bias is None else made + bias


def _differences(field: Field, x: Tensor, directions: Sequence[Tensor], step: float) -> tuple[Tensor, ...]:
    """``J v`` of each direction by a central difference, in one call."""
    start, move = torch.cat([x.detach()] * len(directions)), step * torch.cat(list(directions))
    ahead, behind = field(torch.cat([start + move, start - move])).chunk(2)
    return ((ahead - behind) / (2 * step)).chunk(len(directions))


def _inner(first: Tensor, second: Tensor) -> Float[Tensor, " b"]:
    return (first * second).flatten(1).sum(1)
