"""NIQE: how natural a picture's local statistics are, without a reference.

Mittal, Soundararajan and Bovik 2013, "Making a completely blind image quality analyzer". The model of pristine
pictures (mean and covariance of 36 features) is handed in; smaller is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.special import gamma
from torch import Tensor

from counterpoint.types import UserError

BLOCK = 96
"""Side of a patch in pixels at the first of two scales."""
ENLARGED = "shorter side enlarged to 512 pixels by a cubic first"
_SHAPES = np.arange(0.2, 10.001, 0.001)
_RATIOS = gamma(2 / _SHAPES) ** 2 / (gamma(1 / _SHAPES) * gamma(3 / _SHAPES))
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True, eq=False)
class Pristine:
    """Mean ``(36,)`` and covariance ``(36, 36)`` of the features of pristine pictures, and the 7 x 7 window."""

    mean: np.ndarray
    covariance: np.ndarray
    window: np.ndarray


def is_small(pictures: Float[Tensor, "b c h w"]) -> bool:
    """Whether :func:`enlarged` changes them."""
    return min(pictures.shape[2:]) < 2 * BLOCK


def enlarged(pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
    """Pictures whose shorter side is under two patches, by a cubic to one of 512 pixels; others as they are.

    Their numbers compare with each other only.
    """
    if not is_small(pictures):
        return pictures
    size = [round(512 * side / min(pictures.shape[2:])) for side in pictures.shape[2:]]
    return F.interpolate(pictures, size=size, mode="bicubic").clamp(0, 1)


def luma(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Rounded BT.601 luma, 16..235, of RGB in 0..1: what the published model was measured on."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=pictures.device)
    return (16 + (pictures.double() * weights[:, None, None]).sum(1, keepdim=True)).round()


def niqe(grey: Float[Tensor, "b 1 h w"], pristine: Pristine) -> Float[Tensor, " b"]:
    """Distance of each picture from the pristine model; ``grey`` in 0..255. A picture without texture gives ``nan``.

    Raises:
        UserError: a side is shorter than two patches, which leaves no covariance to compare.
    """
    height, width = (side // BLOCK * BLOCK for side in grey.shape[2:])
    if height * width < 2 * BLOCK**2:
        raise UserError(f"NIQE wants at least two patches of {BLOCK} pixels, got {tuple(grey.shape[2:])}")
    return torch.tensor(
        [_distance(one[None, :, :height, :width].double(), pristine) for one in grey], dtype=torch.float64
    )


def _distance(grey: Tensor, pristine: Pristine) -> float:
    features = np.concatenate(
        [_features(grey, pristine.window, BLOCK), _features(_halve(grey), pristine.window, BLOCK // 2)], 1
    )
    whole = features[~np.isnan(features).any(1)]  # a flat patch has no statistics
    if len(whole) < 2:
        return float("nan")
    difference = pristine.mean - np.nanmean(features, 0)
    pooled = (pristine.covariance + np.cov(whole, rowvar=False)) / 2
    return float(np.sqrt(difference @ np.linalg.pinv(pooled) @ difference))


def _features(grey: Tensor, window: np.ndarray, block: int) -> np.ndarray:
    """Eighteen features of each patch: the shape of the normalised luma and of its products with four neighbours."""
    kernel = torch.from_numpy(window)[None, None]
    padded = F.pad(grey, (3,) * 4, mode="replicate")
    mean = F.conv2d(padded, kernel)
    deviation = (F.conv2d(padded**2, kernel) - mean**2).abs().sqrt()
    normal = ((grey - mean) / (deviation + 1))[0, 0].numpy()
    rows, columns = (side // block for side in normal.shape)
    patches = normal.reshape(rows, block, columns, block).swapaxes(1, 2).reshape(-1, block, block)
    return np.array([_describe(patch) for patch in patches])


def _describe(patch: np.ndarray) -> list[float]:
    shape, left, right = _asymmetric(patch)
    numbers = [shape, (left + right) / 2]
    for shift in _NEIGHBOURS:
        shape, left, right = _asymmetric(patch * np.roll(patch, shift, (0, 1)))
        numbers += [shape, (right - left) * gamma(2 / shape) / gamma(1 / shape), left, right]
    return numbers


def _asymmetric(values: np.ndarray) -> tuple[float, float, float]:
    """Fit an asymmetric generalised Gaussian by moments: its shape and its two scales."""
    if not (values < 0).any() or not (values > 0).any():
        return (float("nan"),) * 3
    left = np.sqrt(np.mean(values[values < 0] ** 2))
    right = np.sqrt(np.mean(values[values > 0] ** 2))
    skew = left / right
    ratio = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
    wanted = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = float(_SHAPES[np.argmin((_RATIOS - wanted) ** 2)])
    spread = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, float(left * spread), float(right * spread)


def _halve(grey: Tensor) -> Tensor:
    """Half the size by the antialiased cubic that MATLAB uses: the picture is mirrored at its borders."""
    mirrored = torch.from_numpy(np.pad(grey[0, 0].numpy(), 8, mode="symmetric"))[None, None]
    return F.interpolate(mirrored, scale_factor=0.5, mode="bicubic", antialias=True)[..., 4:-4, 4:-4]
