"""Agreement of outlines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Lines = Bool[Tensor, "b h w"]


def boundary_f(found: Lines, wanted: Lines, radius: float = 0.0) -> Float[Tensor, " b"]:
    """Harmonic mean of precision and recall of boundary pixels that match within a distance.

    Perazzi et al. 2016 (DAVIS, section 4.1): a pixel counts if the other outline has one within ``radius``. 1 where
    both are empty, 0 where one is.

    Args:
        found: outlines in the picture.
        wanted: those asked for.
        radius: in pixels; 0 takes that paper's 0.8 % of the picture's diagonal, rounded up.
    """
    height, width = found.shape[1:]
    reach = radius or float(torch.tensor(0.008 * (height**2 + width**2) ** 0.5).ceil())
    precision, recall = _covered(found, wanted, reach), _covered(wanted, found, reach)
    score = 2 * precision * recall / (precision + recall)
    empty = ~found.flatten(1).any(1), ~wanted.flatten(1).any(1)
    score = torch.where(empty[0] | empty[1], 0.0, score.nan_to_num())
    return torch.where(empty[0] & empty[1], 1.0, score)


def outlines(classes: Int[Tensor, "b h w"]) -> Lines:
    """Pixels whose class differs from the pixel to the right or below."""
    right = F.pad(classes[:, :, 1:] != classes[:, :, :-1], (0, 1))
    below = F.pad(classes[:, 1:] != classes[:, :-1], (0, 0, 0, 1))
    return right | below


def _covered(lines: Lines, others: Lines, radius: float) -> Tensor:
    """Share of the pixels of ``lines`` that lie within ``radius`` of ``others``."""
    reach = int(radius)
    grid = torch.arange(-reach, reach + 1)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).double()[None, None]
    near = F.conv2d(others[:, None].double(), disk, padding=reach)[:, 0] > 0
    return (lines & near).flatten(1).sum(1).double() / lines.flatten(1).sum(1)
