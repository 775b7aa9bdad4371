"""Training an adapter on a frozen denoiser: it learns what a layout says besides the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from counterpoint.conditions.layout import Layout, Reference
from counterpoint.models import gligen, ip_adapter, migc
from counterpoint.sampling.guides import Adapter, make_guide
from counterpoint.sampling.prompt import PromptEncoder
from counterpoint.training.order import Draws
from counterpoint.training.stages.diffusion import DiffusionStage
from counterpoint.types import Batch, Moment

FILE = "adapter.safetensors"
STATES: Mapping[str, Callable[[UNet2DConditionModel], dict[str, Tensor]]] = {
    "interact": gligen.fuser_state,
    "gligen": gligen.fuser_state,
    "migc": migc.instance_state,
    "ip-adapter": ip_adapter.adapter_state,
}
"""Kind of adapter -> what of a UNet is its own, under the names of its file."""
_MANY = 1000
"""Steps of a run whose first one training is, where every kind is told."""


class AdapterStage(DiffusionStage):
    """The diffusion loss with a layout told; only the adapter learns.

    Args:
        kind: of adapter; layouts are the batch's ``layout``, and an IP-Adapter's reference is the batch's ``image``
            itself.
        size: height and width of the pictures.
        image_encoder: reads an IP-Adapter's references; frozen.
        image_processor: likewise.
        proportion_silent: share of samples to which nothing is told, for classifier-free guidance; half of them have
            no caption either, as the unconditional prediction has none.
    """

    def __init__(
        self,
        kind: str,
        size: tuple[int, int],
        *args: object,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        image_processor: CLIPImageProcessor | None = None,
        proportion_silent: float = 0.1,
        **settings: object,
    ) -> None:
        super().__init__(*args, **settings)
        self.size, self.proportion_silent, self.image_encoder = size, proportion_silent, image_encoder
        self.adapter = Adapter(kind, image_encoder, image_processor)
        own = {tensor.data_ptr() for tensor in STATES[kind](self.unet).values()}
        self.own = {name for name, value in self.unet.named_parameters() if value.data_ptr() in own}

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = draws.uniform()
        silent, mute = (drawn < self.proportion_silent).tolist(), (drawn < self.proportion_silent / 2).tolist()
        layouts = [Layout() if hush else layout for layout, hush in zip(self._layouts(batch), silent, strict=True)]
        captions = ["" if hush else caption for caption, hush in zip(batch["caption"], mute, strict=True)]
        return super().forward({**batch, "layout": layouts, "caption": captions}, draws, step)

    def _layouts(self, batch: Batch) -> list[Layout]:
        if self.adapter.kind == "ip-adapter":
            return [Layout(reference=Reference(image.numpy(force=True))) for image in batch["image"]]
        found: list[Layout] = batch["layout"]
        return found

    def _predict(self, x: Tensor, t: Tensor, text: Tensor, batch: Batch) -> Tensor:
        encode = PromptEncoder([self.tokenizer], [self.text_encoder])
        with torch.no_grad():
            guide = make_guide(self.adapter, self.unet, encode, batch["layout"], False, self.size)
        with guide(Moment(0, _MANY, t)) as told:
            made: Tensor = self.unet(x, t, text, **told).sample
        return made

    def learns(self, parameter: str) -> bool:
        return parameter in self.own

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = STATES[self.adapter.kind](self.unet)
        save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / FILE)
