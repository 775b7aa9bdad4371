"""CLIP's symmetric contrastive loss (Radford et al. 2021, arXiv:2103.00020, figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def contrastive_loss(
    images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Cross-entropy of finding each picture's text and each text's picture; embeddings are normalised here.

    ``scale`` multiplies the cosines (CLIP's ``exp(logit_scale)``).
    """
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
