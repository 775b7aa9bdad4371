"""Training the text and image towers together: the family's CLIP."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from counterpoint.training.losses.contrastive import contrastive_loss
from counterpoint.training.order import Draws
from counterpoint.training.stage import Stage
from counterpoint.training.stages.codec import pictures
from counterpoint.types import Batch


class TowersStage(Stage):
    """Contrastive training of a :class:`CLIPModel` on pictures and captions."""

    trained = ("clip",)

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, texts = self.embed(pictures(batch["image"]), batch["caption"])
        loss = contrastive_loss(images.float(), texts.float(), self.clip.logit_scale.exp().clamp(max=100))
        right = (images.detach() @ texts.detach().T).argmax(1) == torch.arange(len(images), device=images.device)
        return loss, {"accuracy": right.float().mean()}

    def embed(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Image and text embeddings ``(b, d)``."""
        tokens = self.tokenizer(captions, padding="longest", truncation=True, return_tensors="pt").to(images.device)
        vision = self.clip.visual_projection(self.clip.vision_model(pixel_values=images).pooler_output)
        text = self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)
        return vision, text

    def export(self, folder: Path) -> None:
        self.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
