"""Minimal Impact ControlNet (ICLR 2025): balanced combination and injection by multi-objective descent.

The paper defines the min-norm coefficient of the first vector (Eq. 8, after Désidéri's MGDA) and then puts it on the
second one (Eqs. 9, 10, 12). The two readings behave oppositely: with a silent second control, ``"min-norm"`` wipes the
active one out, ``"literal"`` keeps it. Both are here, for combination and injection separately.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.fusion.layout import Maps, on_maps, products, weighted
from counterpoint.types import Combine, Inject, UserError

Reading = Literal["min-norm", "literal"]
Granularity = Literal["sample", "pixel"]
Gram = Float[Tensor, "... n n"]
CAP = 20.0
"""Largest factor of an injected control (section 4.2)."""
INJECTION = "_injection"
"""In a ControlNet's configuration: the settings of the :class:`BalancedInjection` that it was trained with."""
_EXACT = 6
"""Branches up to which every face of the simplex is tried."""


def balanced_combination(
    reading: Reading, *, total_scale: float | None = None, granularity: Granularity = "sample"
) -> Combine:
    """One convex combination of the branches for each sample, or for each place.

    Args:
        reading: ``"min-norm"`` is the point of the branches' convex hull that is nearest to zero (MGDA); its inner
            product with every branch is at least its squared norm, so it opposes none of them. ``"literal"`` weighs
            branch n by ``relu(N |f_n|^2 - <f_n, sum_m f_m>)``, which is Eq. 12 as printed for two.
        total_scale: what the weights sum to; default the number of branches, which compares with a sum. The paper's
            Eq. 12 has 1.
        granularity: one weight a sample, or one a place (ours).

    A larger conditioning scale *lowers* a branch's share of a min-norm combination.
    """
    weigh = min_norm_weights if reading == "min-norm" else literal_weights
    over = (2, 3, 4) if granularity == "sample" else (2,)

    @on_maps
    def combine(features: Maps) -> Tensor:
        x = features.float()
        size = x.abs().amax((0, *over), keepdim=True)
        x = x / torch.where(size > 0, size, 1.0)  # products of half-precision extremes must not overflow
        gram = products(x, tuple(axis - 1 for axis in over)).movedim((0, 1), (-2, -1))
        weights = weigh(gram).movedim(-1, 0)
        weights = weights.reshape(*weights.shape[:2], *([1] * (5 - weights.ndim)), *weights.shape[2:])
        return weighted(features, (len(features) if total_scale is None else total_scale) * weights)

    return combine


@dataclass(frozen=True)
class BalancedInjection:
    """``e + lambda f`` with the weight that balances host and control (Eqs. 9 and 10).

    With ``a = relu(|e|^2 - <e, f>)`` and ``b = relu(|f|^2 - <e, f>)``, ``lambda`` is ``a / b`` in the min-norm reading
    and ``b / a`` in the literal one, at most ``cap``; equal vectors give 1. ``lambda`` is differentiated through.

    Under the literal reading a control that is zero has no gradient: start from a trained ControlNet.
    """

    reading: Reading
    cap: float = CAP
    granularity: Granularity = "sample"

    @property
    def rule(self) -> str:
        """The name of a rule that takes controls in so."""
        cap = "" if self.cap == CAP else f",cap={self.cap:g}"
        return f"minimal-impact:injection={self.reading},granularity={self.granularity}{cap}"

    def __call__(self, host: Tensor, control: Tensor) -> Tensor:
        """The host's feature with the control in it; both ``(b, c, h, w)`` or ``(b, tokens, c)``."""
        channels = 2 if host.ndim == 3 else 1
        over = tuple(range(1, host.ndim)) if self.granularity == "sample" else (channels,)
        e, f = host.float(), control.float()
        size = torch.maximum(e.abs(), f.abs()).amax(over, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        e, f = e / size, f / size
        cross = (e * f).sum(over, keepdim=True)
        a = ((e * e).sum(over, keepdim=True) - cross).relu()
        b = ((f * f).sum(over, keepdim=True) - cross).relu()
        above, below = (a, b) if self.reading == "min-norm" else (b, a)
        capped = above >= self.cap * below  # decided before dividing: at f = 0 the division has no gradient
        factor = torch.where(capped, self.cap, above / torch.where(capped, 1.0, below))
        factor = torch.where((a == 0) & (b == 0), 1.0, factor)
        return (host.float() + factor * control.float()).to(host.dtype)


def trained_injection(network: nn.Module) -> Inject:
    """How a ControlNet was taken in when it was trained, as its configuration says; a sum if it says nothing.

    Raises:
        UserError: it names an injection that is unknown here.
    """
    trained = getattr(network, "config", {}).get(INJECTION)
    try:
        return torch.add if trained is None else BalancedInjection(**trained)
    except TypeError:
        raise UserError(f"the ControlNet was trained with an injection that is unknown here: {trained}") from None


def min_norm_weights(gram: Gram) -> Float[Tensor, "... n"]:
    """Weights of the point of least norm in the convex hull of n vectors, from their inner products.

    Exact up to six vectors: the point is the least-norm point of some face's affine hull, and every face is tried.
    Beyond, Wolfe's algorithm (1976), whose tolerance is relative to the largest squared norm.
    """
    n = gram.shape[-1]
    wide = (gram.cpu() if gram.device.type == "mps" else gram).double()  # which has no double precision
    top = wide.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    wide = wide / torch.where(top > 0, top, 1.0)
    weights = _of_two(wide) if n == 2 else _by_faces(wide) if n <= _EXACT else _by_wolfe(wide)
    return weights.to(gram)


def literal_weights(gram: Gram) -> Float[Tensor, "... n"]:
    """``w_n ~ relu(N |f_n|^2 - <f_n, sum_m f_m>)``; equal where all of them are 0. Silent branches get nothing."""
    raw = (gram.shape[-1] * gram.diagonal(dim1=-2, dim2=-1) - gram.sum(-1)).relu()
    raw = torch.where(raw.sum(-1, keepdim=True) > 0, raw, 1.0)
    return raw / raw.sum(-1, keepdim=True)


def _of_two(gram: Gram) -> Float[Tensor, "... 2"]:
    """In closed form; equal vectors share."""
    cross = gram[..., 0, 1]
    first, second = gram[..., 0, 0] - cross, gram[..., 1, 1] - cross
    apart = first + second
    share = torch.where(apart > 1e-12, second / torch.where(apart > 1e-12, apart, 1.0), 0.5).clamp(0, 1)
    return torch.stack([share, 1 - share], -1)


def _by_faces(gram: Gram) -> Float[Tensor, "... n"]:
    n = gram.shape[-1]
    candidates, norms = [], []
    for size in range(1, n + 1):
        for face in combinations(range(n), size):
            weights, feasible = _affine_minimum(gram, list(face))
            norm = (weights[..., None, :] @ gram @ weights[..., None])[..., 0, 0]
            candidates.append(weights)
            norms.append(torch.where(feasible, norm, torch.inf))
    norm = torch.stack(norms)
    # Equal vectors make several faces equally good: their average treats branches alike in any order.
    best = (norm <= norm.amin(0) + 1e-12).double()
    return (best[..., None] * torch.stack(candidates)).sum(0) / best.sum(0)[..., None]


def _affine_minimum(gram: Gram, face: list[int]) -> tuple[Tensor, Tensor]:
    """Weights of the least-norm point of a face's affine hull, and whether it lies in the face."""
    part = gram[..., face, :][..., face]
    goal = torch.zeros(*part.shape[:-1], dtype=gram.dtype, device=gram.device)
    goal = torch.nn.functional.pad(goal, (0, 1), value=1.0)[..., None]
    system = _bordered(part, torch.ones_like(part[..., 0]))
    with torch.no_grad():
        solved, failed = torch.linalg.solve_ex(system, goal)
        share = solved[..., :-1, 0]
        feasible = (failed == 0) & share.isfinite().all(-1) & (share >= -1e-12).all(-1)
    # Solved again where it can be: the gradient of a singular system is not a number, whatever is done with it later.
    system = torch.where(
        feasible[..., None, None], system, torch.eye(system.shape[-1], dtype=gram.dtype, device=gram.device)
    )
    share = torch.linalg.solve(system, goal)[..., :-1, 0]
    share = torch.where(feasible[..., None], share, 0.0).clamp(min=0)
    weights = torch.zeros(*gram.shape[:-1], dtype=gram.dtype, device=gram.device)
    weights[..., face] = share
    return weights, feasible


def _bordered(gram: Gram, ones: Float[Tensor, "... n"]) -> Float[Tensor, "... m m"]:
    """``[[G, 1], [1, 0]]``: solvable wherever the vectors are affinely independent, also if their hull holds zero."""
    framed = torch.nn.functional.pad(gram, (0, 1, 0, 1))
    framed[..., -1, :-1] = ones
    framed[..., :-1, -1] = ones
    return framed


def _by_wolfe(gram: Gram, tolerance: float = 1e-10) -> Float[Tensor, "... n"]:
    """Wolfe's min-norm-point algorithm on a batch: a set of active vectors grows by the one that opposes the point most
    and loses those whose weight would turn negative."""
    shape, n = gram.shape[:-1], gram.shape[-1]
    gram = gram.reshape(-1, n, n)
    weights = torch.nn.functional.one_hot(gram.diagonal(dim1=1, dim2=2).argmin(1), n).to(gram.dtype)
    for _ in range(20 * n):
        products = (gram @ weights[..., None])[..., 0]
        value, worst = (weights * products).sum(1), products.min(1)
        open_ = worst.values < value - tolerance
        if not open_.any():
            break
        active = weights > 0
        active[open_, worst.indices[open_]] = True
        weights = torch.where(open_[:, None], _descend(gram, weights, active), weights)
    return weights.reshape(shape)


def _descend(gram: Tensor, weights: Tensor, active: Tensor) -> Tensor:
    """Wolfe's minor cycles: to the least-norm point of the active vectors' affine hull, as far as weights allow."""
    for _ in range(gram.shape[-1]):
        mask = active.to(gram.dtype)
        system = _bordered(gram * mask[:, :, None] * mask[:, None] + torch.diag_embed(1 - mask), mask)
        goal: Tensor = torch.linalg.pinv(system, hermitian=True)[:, :-1, -1] * mask
        negative = active & (goal <= 0)
        if not negative.any():
            return goal
        step = torch.where(negative, weights / (weights - goal).clamp(min=1e-300), 1.0).amin(1, keepdim=True)
        weights = weights + step * (goal - weights)
        leaving = negative & (weights <= 1e-14)
        weights, active = torch.where(leaving, 0.0, weights), active & ~leaving
    return weights / weights.sum(1, keepdim=True)
