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
    """Structural similarity of each picture, -1..1; values in 0..1, sides of at least 11.

    Wang et al. 2004 with the 11 x 11 Gaussian window of sigma 1.5, averaged over the windows that lie wholly inside
    the picture, as scikit-image has it.
    """
    _, everywhere = structural_similarity_index_measure(
        pictures.double(), references.double(), sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    return everywhere[..., 5:-5, 5:-5].flatten(1).mean(1)
