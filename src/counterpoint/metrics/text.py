"""Agreement of pictures and words."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def clip_score(pictures: Float[Tensor, "b d"], texts: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """100 times the cosine of each picture's and its text's CLIP embedding, at least 0 (Hessel et al. 2021,
    arXiv:2104.08718, without that paper's factor 2.5, as the field reports it)."""
    return 100 * F.cosine_similarity(pictures.double(), texts.double()).clamp(min=0)
