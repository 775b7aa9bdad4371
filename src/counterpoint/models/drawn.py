"""The classical extractors of lines and edges with gradients, as rewards want them.

Pictures ``(b, 3, h, w)`` in -1..1 become ``(b, 1, h, w)`` in 0..1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint.conditions.lines import GAIN, RATIO, SHARPNESS, line_width

_LUMA = (0.299, 0.587, 0.114)
_LOW, _HIGH = 100.0, 200.0
"""Canny's thresholds, of pictures in 0..255."""
_SOFT = 25.0
"""Of the threshold between them: what is shorter than the lower one is below 0.12, beyond the higher one above 0.88."""
_STEEP = 2**0.5 + 1
"""Tangent of 67.5 degrees: gradients beyond it are upright."""


class DrawnLines(nn.Module):
    """What :func:`counterpoint.conditions.lines.lines` draws."""

    def forward(self, pictures: Tensor) -> Tensor:
        """Draw lines."""
        grey = (pictures * pictures.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True) / 2 + 0.5
        sigma = line_width(min(grey.shape[2:]))
        fine, coarse = (_blurred(grey, width) for width in (sigma, RATIO * sigma))
        return (GAIN * (coarse * SHARPNESS - fine).relu()).tanh()


class DrawnEdges(nn.Module):
    """What :func:`counterpoint.conditions.canny.canny` draws, but for its hysteresis: gradients that are the largest
    across their edge, by a soft threshold, as ControlNet++ (arXiv:2404.07987) rewards them.

    As in OpenCV a place has the gradient of the channel in which it is steepest, and its length is the sum of its
    sides. What is the largest is not differentiated.
    """

    def forward(self, pictures: Tensor) -> Tensor:
        """Draw edges."""
        across = pictures.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
        kernels = torch.stack([across, across.T])[:, None].repeat(3, 1, 1, 1)
        padded = F.pad(127.5 * (pictures.flip(1).float() + 1), (1, 1, 1, 1), "replicate")
        slopes = F.conv2d(padded, kernels.float(), groups=3).unflatten(1, (3, 2))
        steepest = slopes.abs().sum(2).argmax(1)[:, None, None].expand(-1, 1, 2, -1, -1)
        x, y = slopes.gather(1, steepest)[:, 0].unbind(1)
        length = x.abs() + y.abs()
        kept = _largest(length.detach(), x.detach(), y.detach())
        drawn: Tensor = kept * ((length - (_LOW + _HIGH) / 2) / _SOFT).sigmoid()
        return drawn[:, None].to(pictures.dtype)


DRAWN: dict[str, type[nn.Module]] = {"lineart": DrawnLines, "canny": DrawnEdges}
"""Kind of control -> what draws it from a picture with gradients, where no network does."""


def _largest(length: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Where a gradient is longer than the one before it across its edge, and no shorter than the one behind it."""
    wide = F.pad(length, (1, 1, 1, 1))

    def at(down: int, right: int) -> Tensor:
        return wide[:, 1 + down : 1 + down + length.shape[1], 1 + right : 1 + right + length.shape[2]]

    flat, upright = y.abs() * _STEEP < x.abs(), y.abs() > x.abs() * _STEEP
    falling = (x < 0) ^ (y < 0)
    sideways = (length > at(0, -1)) & (length >= at(0, 1))
    vertical = (length > at(-1, 0)) & (length >= at(1, 0))
    aslant = (length > at(-1, -1)) & (length > at(1, 1))
    against = (length > at(-1, 1)) & (length > at(1, -1))
    return torch.where(flat, sideways, torch.where(upright, vertical, torch.where(falling, against, aslant)))


def _blurred(grey: Tensor, sigma: float) -> Tensor:
    radius = round(4 * sigma)
    places = torch.arange(-radius, radius + 1, dtype=grey.dtype, device=grey.device)
    kernel = (-(places**2) / (2 * sigma**2)).softmax(0)
    padded = F.pad(grey, (radius,) * 4, "replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])
