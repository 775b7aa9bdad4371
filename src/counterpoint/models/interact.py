"""InteractDiffusion (arXiv:2312.05849): who does what to whom, by GLIGEN's layers and tokens of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.models.gligen import fuser_shapes, load_fusers, with_fusers
from counterpoint.types import UserError

FREQUENCIES = 8
_PLACE = 2 * 4 * FREQUENCIES
SUBJECT, OBJECT, ACTION = range(3)
Boxes = Float[Tensor, "b n 4"]
"""``x0, y0, x1, y1`` in 0..1."""


class InteractionEmbedding(nn.Module):
    """Grounding tokens: of every interaction its subject, its action, which has the place between the two, and its
    object.

    Args:
        text_width: of the phrases' embeddings (CLIP's pooled output).
        width: of the tokens, the UNet's cross-attention width.
        interactions: how many there can be.
        hidden: width of the two perceptrons.
    """

    def __init__(self, text_width: int = 768, width: int = 768, interactions: int = 30, hidden: int = 512) -> None:
        super().__init__()
        self.linears = _perceptron(text_width + _PLACE, hidden, width)
        self.linear_action = _perceptron(text_width + _PLACE, hidden, width)
        self.null_positive_feature = nn.Parameter(torch.zeros(text_width))
        self.null_action_feature = nn.Parameter(torch.zeros(text_width))
        self.null_position_feature = nn.Parameter(torch.zeros(_PLACE))
        self.interaction_embedding = _Numbered(interactions, width)
        self.position_embedding = _Numbered(3, width)

    @property
    def interactions(self) -> int:
        """How many there can be."""
        return self.interaction_embedding.emb.num_embeddings

    def forward(
        self,
        boxes: Float[Tensor, "b n 2 4"],
        phrases: Float[Tensor, "b n 3 t"],
        there: Float[Tensor, "b n"],
    ) -> Float[Tensor, "b _ d"]:
        """All subjects, then all actions, then all objects.

        Args:
            boxes: of subject and object.
            phrases: embeddings of subject, object and action.
            there: 1 for an interaction, 0 for padding, and everywhere for the unconditional half of a batch.

        Raises:
            ValueError: there are more than the embedding has numbers for.
        """
        count = boxes.shape[1]
        if count > self.interactions:
            raise ValueError(f"{count} interactions; this model takes at most {self.interactions}")
        places = [boxes[:, :, SUBJECT], boxes[:, :, OBJECT], between(boxes[:, :, SUBJECT], boxes[:, :, OBJECT])]
        nulls = [self.null_positive_feature, self.null_positive_feature, self.null_action_feature]
        layers = [self.linears, self.linears, self.linear_action]
        numbers = torch.arange(count, device=boxes.device)
        mask = there[..., None]
        tokens = []
        for role, (box, null, layer) in enumerate(zip(places, nulls, layers, strict=True)):
            text = torch.where(mask > 0, phrases[:, :, role], null)
            place = get_fourier_embeds_from_boundingbox(FREQUENCIES, box)
            place = torch.where(mask > 0, place, self.null_position_feature)
            made = layer(torch.cat([text, place], -1))
            tokens.append(made + self.interaction_embedding.emb(numbers) + self.position_embedding.emb.weight[role])
        return torch.cat([tokens[SUBJECT], tokens[ACTION], tokens[OBJECT]], 1)


def between(subjects: Boxes, objects: Boxes) -> Boxes:
    """Where an action is: the middle two of both boxes' four abscissae, and of their ordinates."""
    x = torch.stack([subjects[..., 0], subjects[..., 2], objects[..., 0], objects[..., 2]], -1).sort(-1).values
    y = torch.stack([subjects[..., 1], subjects[..., 3], objects[..., 1], objects[..., 3]], -1).sort(-1).values
    return torch.stack([x[..., 1], y[..., 1], x[..., 2], y[..., 2]], -1)


def load_interaction(unet: UNet2DConditionModel, file: Path) -> UNet2DConditionModel:
    """A UNet with the interaction layers of a safetensors file: as published (LDM's names, also of a converted
    ``.pth``), as the diffusers form of it has them, or as trained here.

    The other networks of a published file are passed over.

    Raises:
        UserError: the file is missing, a pickle, damaged, of another UNet, or holds no interaction layers.
    """
    found = fuser_shapes(file)
    rows = found.get("position_net.interaction_embedding.emb.weight")
    text = found.get("position_net.null_positive_feature")
    hidden = found.get("position_net.linears.2.weight")
    if rows is None or text is None or hidden is None:
        raise UserError(f"{file} holds no interaction layers (position_net.interaction_embedding)")
    return load_fusers(with_fusers(unet, InteractionEmbedding(text[0], rows[1], rows[0], hidden[0])), file)


class _Numbered(nn.Module):
    """A table of embeddings, under the name that is published."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(count, width)


def _perceptron(inside: int, hidden: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inside, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outside)
    )
