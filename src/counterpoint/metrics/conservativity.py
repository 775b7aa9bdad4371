"""How far a vector field is from being a gradient: the asymmetry of its Jacobian.

Chao et al. 2022 (arXiv:2209.12753), used by Minimal Impact ControlNet (ICLR 2025, section 5.2.1) for the part that a
ControlNet adds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Field = Callable[[Tensor], Tensor]
"""``(b, ...) -> (b, ...)``, each sample by itself."""


def asymmetry(field: Field, x: Float[Tensor, "b ..."], probe: Float[Tensor, "b ..."]) -> Float[Tensor, "b 2"]:
    """Unbiased one-probe estimates of ``tr(J J^T) - tr(J J)`` and ``tr(J J^T)`` of each sample's Jacobian at ``x``.

    The first is ``|J - J^T|^2 / 2`` and is had as ``|J v - J^T v|^2 / 2``, which is never negative. Attention must be
    differentiable twice: enter ``sdpa_kernel(SDPBackend.MATH)`` around the call.

    Args:
        field: the vector field.
        x: where.
        probe: independent entries of mean 0 and variance 1, such as random signs.
    """
    forward, backward = (product.detach().cpu().double() for product in jacobian_products(field, x, probe))
    return torch.stack([(forward - backward).square().flatten(1).sum(1) / 2, backward.square().flatten(1).sum(1)], 1)


def jacobian_products(
    field: Field, x: Float[Tensor, "b ..."], probe: Float[Tensor, "b ..."], *, create_graph: bool = False
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """``J v`` and ``J^T v`` of each sample's Jacobian at ``x``; both can be differentiated if ``create_graph``."""
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        output = field(start)
        (backward,) = torch.autograd.grad(output, start, probe, retain_graph=True, create_graph=create_graph)
        cotangent = torch.zeros_like(output, requires_grad=True)
        (transposed,) = torch.autograd.grad(output, start, cotangent, create_graph=True)  # J^T u, linear in u
        (forward,) = torch.autograd.grad(transposed, cotangent, probe, create_graph=create_graph)
    return forward, backward


def asym(rows: Float[Tensor, "n 2"]) -> float:
    """Asym: the mean of ``|J - J^T|^2 / 2``."""
    return float(rows[:, 0].mean())


def normalised_asym(rows: Float[Tensor, "n 2"]) -> float:
    """NAsym: half of Asym over the mean of ``tr(J J^T)``; 0 is a gradient field, 1 the other extreme."""
    return float(rows[:, 0].mean() / rows[:, 1].mean() / 2)
