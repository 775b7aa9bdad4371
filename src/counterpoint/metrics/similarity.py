"""How alike two pictures are."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

Pictures = Float[Tensor, "b c h w"]


def psnr(pictures: Pictures, references: Pictures) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of each picture; values in 0..1. Identical pictures give infinity."""
    return -10 * (pictures.double() - references.double()).square().flatten(1).mean(1).log10()


def ssim(pictures: Pictures, references: Pictures) -> Float[Tensor, " b"]:
    """Structural similarity of each picture, -1..1; values in 0..1.

    Wang et al. 2004 with the 11 x 11 Gaussian window of sigma 1.5. scikit-image agrees away from the borders.
    """
    score = structural_similarity_index_measure(
        pictures.double(), references.double(), sigma=1.5, kernel_size=11, data_range=1.0, reduction="none"
    )
    return score.reshape(len(pictures))  # type: ignore[union-attr]
