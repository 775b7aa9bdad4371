"""How far what a ControlNet adds is from a gradient, as a loss (Minimal Impact ControlNet, ICLR 2025, section 4.3).

With ``J`` the Jacobian of the prediction through the ControlNet, the estimates of :func:`conservativity_loss` are
unbiased for ``|J - J^T|^2 / 2``, ``"paired"`` up to the square of its step.
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
    step: float = 1e-2,
) -> Float[Tensor, " b"]:
    """One estimate for each sample, differentiable with respect to the field's parameters.

    ``"hutchinson"`` is the paper's: ``|J^T v|^2 - <J^T v, J v>``. ``"symmetric"`` (ours) is ``|J v - J^T v|^2 / 2``:
    the same cost, never negative, and the surer the nearer ``J`` is to symmetric. ``"paired"`` (ours) is the same
    number, and its gradient that of ``u.J v - v.J u`` with ``u = J v - J^T v`` held fixed, by central differences: no
    second derivative, so it works with fused attention, checkpointing and sharding, for an error of the order of
    ``step^2``. (With an independent ``u`` the value is unbiased as well, but the gradient is lost in its noise.)

    Args:
        field: what the ControlNet does, ``(b, ...) -> (b, ...)`` sample by sample;
            :func:`counterpoint.control.influence.influence`. ``"paired"`` asks twice, for twice as many each time.
        x: where.
        probe: independent entries of mean 0 and variance 1.
        estimator: which.
        step: of the differences of ``"paired"``, in units of ``x``.
    """
    if estimator == "paired":
        return _paired(field, x.detach(), probe, step)
    forward, backward = _products(field, x, probe)
    if estimator == "symmetric":
        return _inner(forward - backward, forward - backward) / 2
    return _inner(backward, backward) - _inner(backward, forward)


def full_conservativity_loss(
    field: Field, host: Field, x: Float[Tensor, "b ..."], probe: Float[Tensor, "b ..."]
) -> Float[Tensor, " b"]:
    """The loss of the whole model without the part that no ControlNet can change (Eq. 16), one estimate a sample.

    In the mean over probes its gradient with respect to the ControlNet is that of the loss of the whole model
    (proposition 4.2). Theorem 4.1 bounds it by the simplified loss ``L`` and how steep the host is, ``2 sqrt(2) M
    sqrt(L) + L``. It may be negative.

    Args:
        field: what the ControlNet does.
        host: what the host does where the control's features are a constant, detached: no gradient reaches the
            ControlNet through it (assumption 4.1).
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


def _paired(field: Field, x: Tensor, probe: Tensor, step: float) -> Float[Tensor, " b"]:
    ends = torch.cat([x + step * probe, x - step * probe]).requires_grad_()
    with torch.enable_grad():
        made = field(ends)
    ahead, behind = made.chunk(2)
    forward = (ahead - behind) / (2 * step)
    (slopes,) = torch.autograd.grad(made, ends, torch.cat([probe, probe]) / 2, retain_graph=True)
    fixed = (forward - sum(slopes.chunk(2))).detach()
    size = _inner(fixed, fixed)
    scale = (size / fixed[0].numel()).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    scale = scale.reshape(-1, *[1] * (x.ndim - 1))  # differences are taken along vectors as long as the probe
    ahead, behind = field(torch.cat([x + step * fixed / scale, x - step * fixed / scale])).chunk(2)
    across = scale * (ahead - behind) / (2 * step)
    slope = _inner(fixed, forward) - _inner(probe, across)
    return slope - slope.detach() + size / 2


def _inner(first: Tensor, second: Tensor) -> Float[Tensor, " b"]:
    return (first * second).flatten(1).sum(1)
