"""How alike two pictures are."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from counterpoint.types import UserError

Pictures = Float[Tensor, "b c h w"]
SMALLEST = 176
"""Side in pixels below which the window does not fit MS-SSIM's coarsest scale."""


def mse(pictures: Pictures, references: Pictures, region: Bool[Tensor, "b h w"] | None = None) -> Float[Tensor, " b"]:
    """Mean squared error of each picture, or of a region of it; ``nan`` where that is empty."""
    squares = (pictures.double() - references.double()).square().mean(1)
    if region is None:
        return squares.mean((1, 2))
    return (squares * region).sum((1, 2)) / region.sum((1, 2))


def psnr(pictures: Pictures, references: Pictures) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of each picture; values in 0..1. Identical pictures give infinity."""
    return -10 * mse(pictures, references).log10()


def ssim(pictures: Pictures, references: Pictures) -> Float[Tensor, " b"]:
    """Structural similarity of each picture, -1..1; values in 0..1, sides of at least 11.

    Wang et al. 2004 with the 11 x 11 Gaussian window of sigma 1.5, averaged over the windows that lie wholly inside
    the picture, as scikit-image has it.

    Raises:
        UserError: a side is shorter than the window.
    """
    if min(pictures.shape[2:]) < 11:
        raise UserError(f"SSIM wants sides of at least 11 pixels, got {tuple(pictures.shape[2:])}")
    _, everywhere = structural_similarity_index_measure(
        pictures.double(), references.double(), sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    return everywhere[..., 5:-5, 5:-5].flatten(1).mean(1)


def ms_ssim(pictures: Pictures, references: Pictures) -> Float[Tensor, " b"]:
    """Structural similarity over five scales of each picture, 0..1; values in 0..1 (Wang et al. 2003).

    Raises:
        UserError: a side is shorter than :data:`SMALLEST`.
    """
    if min(pictures.shape[2:]) < SMALLEST:
        raise UserError(f"MS-SSIM wants sides of at least {SMALLEST} pixels, got {tuple(pictures.shape[2:])}; use ssim")
    score = multiscale_structural_similarity_index_measure(
        pictures.double(), references.double(), sigma=1.5, kernel_size=11, data_range=1.0, reduction="none"
    )
    return score.reshape(len(pictures))
