"""A Stable Diffusion model, 1.5 or SDXL, with everything that it is asked with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, SchedulerMixin, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from counterpoint.conditions.layout import Layout
from counterpoint.control.stack import Branch
from counterpoint.models.openvino import PortedControlNet, PortedUNet
from counterpoint.sampling.denoise import ControlledDenoiser
from counterpoint.sampling.guides import Adapter, make_guide
from counterpoint.sampling.pixels import Pixels
from counterpoint.sampling.prompt import PromptEncoder
from counterpoint.sampling.readout import Readout
from counterpoint.sampling.residency import Residency
from counterpoint.types import Fusion, Latents, UserError

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(eq=False, repr=False)
class Model:
    """Networks that belong together.

    Attributes:
        controls: label -> ControlNet, in the order in which a call's control images come. A label such as ``"pose"``
            is what messages and reports call a control.
        tokenizer_2: of SDXL.
        text_encoder_2: likewise.
        zero_empty_prompt: whether an empty negative prompt is zeros (``force_zeros_for_empty_prompt``), as SDXL wants.
        guidance_scale: what suits the model where a call names none.
        adapter: what reads a call's layout, if the UNet has one.
        readouts: label -> what reads that control from the UNet's features; where there is none, it is not read.
        origin: the folder it came from, where its own adapters are.
        residency: lets networks be in memory only while they are at work; without, all stay.
    """

    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel | PortedUNet
    scheduler: SchedulerMixin
    controls: dict[str, ControlNetModel | PortedControlNet] = field(default_factory=dict)
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    zero_empty_prompt: bool = False
    guidance_scale: float = 7.5
    adapter: Adapter | None = None
    readouts: dict[str, Readout] = field(default_factory=dict)
    origin: Path = Path()
    residency: Residency | None = None

    def __post_init__(self) -> None:
        self.pixels = Pixels(self.factor)

    def __repr__(self) -> str:
        parts = [str(self.origin), f"controls={list(self.controls)}"]
        parts += [f"adapter={self.adapter.kind!r}"] if self.adapter else []
        return f"{type(self).__name__}({', '.join([*parts, str(self.unet.dtype), str(self.device)])})"

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def native_size(self) -> int:
        """Side of the pictures that the model was trained on."""
        return int(self.unet.config.sample_size) * self.factor

    @property
    def device(self) -> torch.device:
        """Where the models are, or come to when they are at work."""
        return self.unet.device if self.residency is None else self.residency.device

    def present(self, *networks: nn.Module | None) -> AbstractContextManager[None]:
        """Networks are in memory inside the block."""
        return nullcontext() if self.residency is None else self.residency.present(*networks)

    @property
    def networks(self) -> list[Any]:
        """Every network, also the one that reads an adapter's pictures."""
        read = None if self.adapter is None else self.adapter.image_encoder
        probes = [readout.probe for readout in self.readouts.values()]
        several = (self.vae, self.text_encoder, self.text_encoder_2, self.unet, read, *self.controls.values(), *probes)
        return [network for network in several if network is not None]

    def to(self, device: str | torch.device) -> Model:
        """Move every network.

        Raises:
            UserError: they come and go by themselves.
        """
        if self.residency is not None:
            raise UserError("networks with a residency come and go by themselves: name the device when loading")
        for network in self.networks:
            network.to(device)
        return self

    def decode(self, latents: Latents, output_type: str = "pil", generator: Generators = None) -> Any:
        """Latents -> images: a list of PIL images, an array ``(b, h, w, 3)`` in 0..1, or a tensor ``(b, 3, h, w)``."""
        with self.present(self.vae), self._vae_at_its_precision() as vae:
            latents = latents.to(vae.dtype) / vae.config.scaling_factor
            pixels = vae.decode(latents, return_dict=False, generator=generator)[0]
        return self.pixels.pictures.postprocess(pixels.detach(), output_type=output_type)

    def encode(self, pixels: Tensor, generator: Generators = None, copies: int = 1) -> Latents:
        """Pictures ``(b, 3, h, w)`` in -1..1 -> latents, ``copies`` of each, each drawn with its own generator."""
        with self.present(self.vae), self._vae_at_its_precision() as vae:
            encoded = vae.encode(pixels.to(self.device, vae.dtype))
            if isinstance(vae, AutoencoderTiny):
                latents: Tensor = torch.cat([row for row in encoded.latents.split(1) for _ in range(copies)])
            else:
                spread = encoded.latent_dist.parameters.repeat_interleave(copies, 0)
                latents = DiagonalGaussianDistribution(spread).sample(generator)
        return latents.to(self.unet.dtype) * float(vae.config.scaling_factor)

    @contextmanager
    def at_work(self, rule: Fusion) -> Iterator[None]:
        """The denoiser and its controls are in memory inside the block; controls that take turns one at a time, where
        the rule does not walk through all of them at once."""
        residency, going = self.residency, list[nn.Module]()
        with ExitStack() as stack:
            if residency is not None and residency.level == "controls" and not rule.walks:
                labels = self.controls if residency.going is None else residency.going
                going = [self.controls[label] for label in labels]
                stack.enter_context(residency.taking_turns(*going))
            stack.enter_context(self.present(self.unet, *(one for one in self.controls.values() if one not in going)))
            yield

    @contextmanager
    def _vae_at_its_precision(self) -> Iterator[AutoencoderKL | AutoencoderTiny]:
        """SDXL's overflows in half precision and says so."""
        raised = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast", False)
        if raised:
            self.vae.float()
        try:
            yield self.vae
        finally:
            if raised:
                self.vae.half()

    def prompt_encoder(self) -> PromptEncoder:
        """What reads the prompts of one call."""
        if self.text_encoder_2 is None or self.tokenizer_2 is None:
            return PromptEncoder((self.tokenizer,), (self.text_encoder,))
        return PromptEncoder((self.tokenizer, self.tokenizer_2), (self.text_encoder, self.text_encoder_2))

    def denoiser(
        self,
        prompts: list[str],
        negatives: list[str | None],
        copies: int,
        guidance_scale: float,
        branches: list[Branch],
        fusion: Fusion,
        layouts: Sequence[Layout | None],
        size: tuple[int, int],
        encode: PromptEncoder,
    ) -> ControlledDenoiser:
        """The model as a denoiser for a batch.

        Args:
            prompts: one a picture, the same for ``copies`` in a row.
            negatives: likewise.
            copies: pictures a prompt.
            guidance_scale: 1 or less switches guidance off.
            branches: its controls.
            fusion: what joins them.
            layouts: one a picture; ``None`` if it has no adapter.
            size: height and width of the pictures.
            encode: :meth:`prompt_encoder`, or an equal one that has read for another model.

        Raises:
            UserError: a layout is not what the adapter reads.
        """
        with self.present(self.text_encoder, self.text_encoder_2):
            text, negative = encode(prompts[::copies]), encode([one or "" for one in negatives[::copies]])
            length = max(text.embeddings.shape[1], negative.embeddings.shape[1])
            text, negative = encode.match(text, length), encode.match(negative, length)
        if self.zero_empty_prompt:
            negative = encode.blank(negative, [one is None for one in negatives[::copies]])
        text, negative = text.repeated(copies), negative.repeated(copies)
        guided = guidance_scale > 1
        added = None
        if text.pooled is not None and negative.pooled is not None:
            pooled = torch.cat([negative.pooled, text.pooled]) if guided else text.pooled
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=pooled.dtype, device=self.device)
            added = {"text_embeds": pooled, "time_ids": ids.repeat(len(pooled), 1)}
        guide = None
        if self.adapter is not None:
            known = [layout for layout in layouts if layout is not None]
            guide = make_guide(self.adapter, self.unet, encode, known, guided, size)
        return ControlledDenoiser(
            self.unet,
            branches,
            fusion,
            text.embeddings,
            negative.embeddings if guided else None,
            guidance_scale,
            added=added,
            guide=guide,
        )
