"""Where a rule's features have their channels and their places."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.types import Features, UserError

Maps = Float[Tensor, "n b c h w"]
"""The features of n branches as maps."""
Grid = tuple[int, int]
"""Rows and columns of tokens."""


def on_maps(rule: Callable[[Maps], Tensor]) -> Callable[..., Tensor]:
    """Let a rule over ``(n, b, c, h, w)`` take tokens ``(n, b, t, c)`` too, and be the identity for one branch.

    Tokens are laid out on ``grid``, row by row; without one, on a square if their number is a square, else in a row.

    Raises (the wrapped rule):
        UserError: features of another rank, or a grid that does not hold the tokens.
    """

    @wraps(rule)
    def combined(features: Features, grid: Grid | None = None) -> Tensor:
        if len(features) == 1:
            return features[0]
        if features.ndim == 5:
            return rule(features)
        return rule(_laid_out(rule.__name__, features, grid)).flatten(2).transpose(1, 2)

    return combined


def exchange_on_maps(rule: Callable[[Maps], Maps]) -> Callable[..., Features]:
    """The same for what branches tell each other, ``(n, b, ...) -> (n, b, ...)``."""

    @wraps(rule)
    def exchanged(features: Features, grid: Grid | None = None) -> Features:
        if len(features) == 1:
            return features
        if features.ndim == 5:
            return rule(features)
        return rule(_laid_out(rule.__name__, features, grid)).flatten(3).transpose(2, 3)

    return exchanged


def _laid_out(rule: str, features: Features, grid: Grid | None) -> Maps:
    if features.ndim != 4:
        raise UserError(
            f"{rule} takes (branches, batch, channels, height, width) or (branches, batch, tokens, channels), got "
            f"{tuple(features.shape)}"
        )
    rows, columns = grid or _square(features.shape[2])
    if rows * columns != features.shape[2]:
        raise UserError(f"a grid of {rows} x {columns} does not hold {features.shape[2]} tokens")
    n, b, _, c = features.shape
    return features.transpose(2, 3).reshape(n, b, c, rows, columns)


def average(features: Features, weights: Tensor) -> Tensor:
    """``sum_n w_n f_n / sum_n w_n`` in float32, back in the features' dtype; equal weights where they sum to 0."""
    weights = torch.where(weights.sum(0) > 0, weights, 1.0)
    return weighted(features, weights / weights.sum(0))


def weighted(features: Features, weights: Tensor) -> Tensor:
    """``sum_n w_n f_n`` in float32, back in the features' dtype."""
    total = weights[0] * features[0]
    for weight, feature in zip(weights[1:], features[1:], strict=True):
        total = total + weight * feature
    return total.to(features.dtype)


def products(x: Maps, over: tuple[int, ...]) -> Float[Tensor, "n n b ..."]:
    """Inner products of every two branches over axes of one branch, ``(b, c, h, w)``; each pair is multiplied once."""
    found: dict[tuple[int, int], Tensor] = {}
    for i in range(len(x)):
        for j in range(i, len(x)):
            found[i, j] = found[j, i] = (x[i] * x[j]).sum(over)
    return torch.stack([torch.stack([found[i, j] for j in range(len(x))]) for i in range(len(x))])


def agreement(centred: Maps, winners: Tensor) -> Float[Tensor, "n b h w"]:
    """Each branch's cosine over channels with the winner at each place, the largest where several won."""
    dots = products(centred, (1,))
    norms = dots.diagonal().movedim(-1, 0).sqrt()
    scale = norms[:, None] * norms
    cosine = torch.where(scale > 0, dots / scale, 0.0)
    return torch.where(winners[:, None], cosine, -2.0).amax(0)


def _square(tokens: int) -> Grid:
    side = isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)
