"""Prompt and controls in, images out: one loop over diffusers' own models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from counterpoint.control.attach import hints_encoded_once
from counterpoint.control.stack import Branch, Weight
from counterpoint.fusion import get_fusion
from counterpoint.sampling.controls import each, find_lending, listed, make_branches, where_heard
from counterpoint.sampling.denoise import ControlledDenoiser
from counterpoint.sampling.loop import Settle, sample
from counterpoint.sampling.prompt import PromptEncoder
from counterpoint.sampling.report import Report
from counterpoint.types import Fusion, Latents, Moment, UserError

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Output:
    """What a call returns: ``images`` in the form that was asked for, the rest as diffusers has it, and a report."""

    images: Any
    nsfw_content_detected: list[bool] | None = None
    report: Report | None = None


@dataclass(eq=False)
class Pipeline:
    """A Stable Diffusion model, 1.5 or SDXL, with any number of ControlNets.

    Attributes:
        controls: label -> ControlNet, in the order in which a call's control images come. A label such as ``"pose"``
            is what messages and reports call a control.
        tokenizer_2: of SDXL.
        text_encoder_2: likewise.
        zero_empty_prompt: whether an empty negative prompt is zeros (``force_zeros_for_empty_prompt``), as SDXL wants.
        guidance_scale: what suits the model where a call names none.
    """

    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    controls: dict[str, ControlNetModel] = field(default_factory=dict)
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    zero_empty_prompt: bool = False
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        self.pixels = VaeImageProcessor(vae_scale_factor=self.factor)
        self.hints = VaeImageProcessor(vae_scale_factor=self.factor, do_convert_rgb=True, do_normalize=False)
        self.masks = VaeImageProcessor(
            vae_scale_factor=self.factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        self.shades = VaeImageProcessor(vae_scale_factor=self.factor, do_normalize=False, do_convert_grayscale=True)

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
        """Where the models are."""
        return self.unet.device  # type: ignore[no-any-return]

    def to(self, device: str | torch.device) -> Pipeline:
        """Move every model."""
        for model in (self.vae, self.text_encoder, self.text_encoder_2, self.unet, *self.controls.values()):
            if model is not None:
                model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        control_image: Sequence[PipelineImageInput] | PipelineImageInput = (),
        *,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Latents | None = None,
        fusion: str | Fusion = "sum",
        controlnet_conditioning_scale: float | str | Weight | Sequence[float | str | Weight] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        control_mask: Sequence[PipelineImageInput | None] | None = None,
        control_mode: str | Sequence[str] = "balanced",
        gate_silence: bool = False,
        foreground: str | Sequence[str] | None = None,
        subject: str | Sequence[str] | None = None,
        subject_mask: PipelineImageInput | Sequence[PipelineImageInput] | None = None,
        report: bool = False,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[[Pipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
        | None = None,
    ) -> Output:
        """Generate images. Arguments mean what they mean in diffusers' ControlNet pipelines.

        Args:
            prompt: one, or one an image. ``ball++`` and ``(a red ball)1.3`` weigh words.
            control_image: one condition image for each control, in the order of :attr:`controls`.
            image: starting picture for image-to-image and inpainting; alone, the condition images, as in diffusers'
                text-to-image pipeline.
            mask_image: what to repaint of ``image``: white.
            strength: how far ``image`` is noised, in (0, 1].
            height: in pixels, a multiple of :attr:`factor`; default :attr:`native_size`.
            width: likewise.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 switches it off; default the model's own.
            negative_prompt: what to guide away from.
            num_images_per_prompt: images a prompt.
            generator: one for all, or one an image: then an image is the same alone and in any batch.
            latents: starting noise, ``(b, c, h, w)`` at unit scale.
            fusion: how the controls become one, by name or as a rule of your own.
            controlnet_conditioning_scale: one weight for all controls or one each; a string such as
                ``"0:1,0.5:0.4"`` is a schedule.
            control_guidance_start: share of the steps before which a control is silent, for all or each.
            control_guidance_end: share of the steps after which it is silent.
            control_mask: for each control, grey images that say how strongly it speaks where: white is fully, black not
                at all; ``None`` is everywhere.
            control_mode: one of :data:`counterpoint.sampling.controls.MODES`, for all controls or one each.
            gate_silence: let a control whose kind has a silent value speak only where its image shows something else,
                unless it has a mask (:func:`counterpoint.control.coverage.coverage`).
            foreground: for rules that lend keys (``cross``): the controls that show the subject; default the first.
            subject: words of the prompt, one for each foreground, whose place the host's attention tells.
            subject_mask: white where the subject is, one for each foreground, in place of ``subject``. With neither,
                no keys are lent.
            report: note at every step which control was heard where; see :class:`Report`.
            output_type: form of the images; ``"latent"`` skips decoding.
            callback_on_step_end: called as in diffusers; may return ``{"latents": ...}`` to replace them.

        Raises:
            UserError: arguments that do not fit each other.
        """
        shown = listed(control_image)
        if self.controls and image is not None and not shown:
            image, shown = None, listed(image)
        if image is None and mask_image is not None:
            raise UserError("mask_image says what to repaint of image, and there is no image")
        height, width = height or self.native_size, width or self.native_size
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        self._check(height, width, num_inference_steps, strength, guidance_scale)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        against = "" if negative_prompt is None else negative_prompt
        negatives = (
            [against] * len(prompts)
            if isinstance(against, str)
            else [text for text in against for _ in range(num_images_per_prompt)]
        )
        if len(negatives) != len(prompts):
            raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} images; give one, or one a prompt")
        if isinstance(generator, list) and len(generator) != len(prompts):
            raise UserError(f"{len(generator)} generators for {len(prompts)} images; give one, or one an image")
        hints = {label: self._hint(label, one, height, width, len(prompts)) for label, one in self._labelled(shown)}
        guided, copies = guidance_scale > 1, num_images_per_prompt
        given = each("control mask", None if control_mask is None else listed(control_mask), list(self.controls))
        masks = [None if mask is None else self._grey(self.shades, mask, height, width, len(prompts)) for mask in given]
        regions = where_heard(hints, dict(zip(self.controls, masks, strict=True)), gate_silence)
        branches = make_branches(
            self.controls,
            hints,
            regions,
            guided,
            modes=control_mode,
            weights=controlnet_conditioning_scale,
            starts=control_guidance_start,
            ends=control_guidance_end,
        )
        rule = get_fusion(fusion) if isinstance(fusion, str) else fusion
        told = prompts[::copies], negatives[::copies], copies
        denoise = self._denoiser(*told, guidance_scale, branches, rule, (height, width))
        subjects = [
            self._grey(self.masks, mask, height, width, len(prompts))
            for mask in ([] if subject_mask is None else listed(subject_mask))
        ]
        lending = find_lending(rule, self.controls, self.tokenizer, prompts, foreground, subject, subjects)
        shape = (len(prompts), self.unet.config.in_channels, height // self.factor, width // self.factor)
        noted = Report(tuple(self.controls), prompts, shape[2:]) if report and self.controls else None
        denoise = replace(denoise, lending=lending, watch=None if noted is None else noted.watch)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        timesteps = self.scheduler.timesteps
        settle = None
        if image is None:
            noise = self._noise(shape, generator) if latents is None else latents.to(self.device)
            start = noise * self.scheduler.init_noise_sigma
        else:
            timesteps = self._shorten(timesteps, strength)
            start, settle = self._from_image(image, mask_image, shape, timesteps, generator, latents)
        if callback_on_step_end is not None:
            settle = self._then(settle, callback_on_step_end)
        if noted is not None:
            noted.begin(len(timesteps))
        with hints_encoded_once(list(self.controls.values())):
            for step in sample(denoise, self.scheduler, start, timesteps, generator=generator, settle=settle):
                final = step.latents
        images = final if output_type == "latent" else self.decode(final, output_type, generator)
        if noted is not None:
            noted.images = list(images) if output_type == "pil" else []
            noted.hints = hints
            noted.regions = {name: region for name, region in regions.items() if region is not None}
        return Output(images, report=noted)

    def decode(self, latents: Latents, output_type: str = "pil", generator: Generators = None) -> Any:
        """Latents -> images: a list of PIL images, an array ``(b, h, w, 3)`` in 0..1, or a tensor ``(b, 3, h, w)``."""
        with self._vae_at_its_precision() as vae:
            latents = latents.to(vae.dtype) / vae.config.scaling_factor
            pixels = vae.decode(latents, return_dict=False, generator=generator)[0]
        return self.pixels.postprocess(pixels.detach(), output_type=output_type)

    def encode(self, pixels: Tensor, generator: Generators = None, copies: int = 1) -> Latents:
        """Pictures ``(b, 3, h, w)`` in -1..1 -> latents, ``copies`` of each, each drawn with its own generator."""
        with self._vae_at_its_precision() as vae:
            encoded = vae.encode(pixels.to(self.device, vae.dtype))
            if isinstance(vae, AutoencoderTiny):
                latents: Tensor = torch.cat([row for row in encoded.latents.split(1) for _ in range(copies)])
            else:
                spread = encoded.latent_dist.parameters.repeat_interleave(copies, 0)
                latents = DiagonalGaussianDistribution(spread).sample(generator)
        return latents.to(self.unet.dtype) * float(vae.config.scaling_factor)

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

    def _check(self, height: int, width: int, steps: int, strength: float, guidance_scale: float) -> None:
        for name, value in (("height", height), ("width", width)):
            if value < self.factor or value % self.factor:
                raise UserError(f"{name} must be a positive multiple of {self.factor}, got {value}")
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}")
        if not 0 < strength <= 1:
            raise UserError(f"strength must be in (0, 1], got {strength:g}")
        if not np.isfinite(guidance_scale):
            raise UserError(f"guidance scale must be a finite number, got {guidance_scale}")

    def _labelled(self, images: list[Any]) -> list[tuple[str, Any]]:
        if len(images) != len(self.controls):
            raise UserError(
                f"{len(images)} control images for {len(self.controls)} controls "
                f"({', '.join(self.controls) or 'none'}); give one each"
            )
        return list(zip(self.controls, images, strict=True))

    def _hint(self, label: str, image: Any, height: int, width: int, count: int) -> Tensor:
        """Condition images in 0..1, one for each of ``count`` pictures, from one for all, one a prompt, or one each."""
        hint: Tensor = self.hints.preprocess(image, height=height, width=width).to(
            self.device, self.controls[label].dtype
        )
        return _one_each(hint, count, f"images for the control {label}")

    def _denoiser(
        self,
        prompts: list[str],
        negatives: list[str],
        copies: int,
        guidance_scale: float,
        branches: list[Branch],
        fusion: Fusion,
        size: tuple[int, int],
    ) -> ControlledDenoiser:
        if self.text_encoder_2 is None or self.tokenizer_2 is None:
            encode = PromptEncoder([self.tokenizer], [self.text_encoder])
        else:
            encode = PromptEncoder([self.tokenizer, self.tokenizer_2], [self.text_encoder, self.text_encoder_2])
        text, negative = encode(prompts), encode(negatives)
        length = max(text.embeddings.shape[1], negative.embeddings.shape[1])
        text, negative = encode.match(text, length), encode.match(negative, length)
        if self.zero_empty_prompt:
            negative = encode.blank(negative, [not one for one in negatives])
        text, negative = text.repeated(copies), negative.repeated(copies)
        guided = guidance_scale > 1
        added = None
        if text.pooled is not None and negative.pooled is not None:
            pooled = torch.cat([negative.pooled, text.pooled]) if guided else text.pooled
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=pooled.dtype, device=self.device)
            added = {"text_embeds": pooled, "time_ids": ids.repeat(len(pooled), 1)}
        return ControlledDenoiser(
            self.unet,
            branches,
            fusion,
            text.embeddings,
            negative.embeddings if guided else None,
            guidance_scale,
            added=added,
        )

    def _grey(self, processor: VaeImageProcessor, mask: Any, height: int, width: int, count: int) -> Tensor:
        """A mask image for every picture, ``(count, 1, height, width)`` in 0..1, from one for all, or one each."""
        grey: Tensor = processor.preprocess(mask, height=height, width=width).to(self.device)
        return _one_each(grey, count, "mask images")

    def _noise(self, shape: tuple[int, ...], generator: Generators) -> Tensor:
        noise: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        return noise

    def _shorten(self, timesteps: Tensor, strength: float) -> Tensor:
        """The last ``strength`` share of the steps, at least one."""
        steps = self.scheduler.num_inference_steps
        first = min(max(steps - int(steps * strength), 0), steps - 1) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return timesteps[first:]

    def _from_image(
        self,
        image: Any,
        mask: Any,
        shape: tuple[int, ...],
        timesteps: Tensor,
        generator: Generators,
        latents: Latents | None,
    ) -> tuple[Latents, Settle | None]:
        height, width = shape[2] * self.factor, shape[3] * self.factor
        pictures = self.pixels.preprocess(image, height=height, width=width)
        clean = self.encode(pictures, generator, _copies(len(pictures), shape[0], "start pictures"))
        noise = self._noise(shape, generator) if latents is None else latents.to(self.device)
        start = self.scheduler.add_noise(clean, noise, timesteps[:1])
        if mask is None:
            return start, None
        repaint = torch.nn.functional.interpolate(self._grey(self.masks, mask, height, width, shape[0]), size=shape[2:])
        repaint = repaint.to(clean)

        def settle(current: Latents, moment: Moment) -> Latents:
            following = timesteps[moment.index + 1 : moment.index + 2]
            kept = self.scheduler.add_noise(clean, noise, following) if len(following) else clean
            return (1 - repaint) * kept + repaint * current

        return start, settle

    def _then(self, settle: Settle | None, callback: Callable[..., dict[str, Tensor] | None]) -> Settle:
        """Let the user's callback see, and replace, the latents after everything else."""

        def settled(latents: Latents, moment: Moment) -> Latents:
            latents = latents if settle is None else settle(latents, moment)
            return (callback(self, moment.index, moment.timestep, {"latents": latents}) or {}).get("latents", latents)

        return settled


def _copies(given: int, wanted: int, what: str) -> int:
    """How often each of several pictures is used."""
    if wanted % given:
        raise UserError(f"{given} {what} and {wanted} pictures to make; give one, or one each")
    return wanted // given


def _one_each(rows: Tensor, count: int, what: str) -> Tensor:
    return rows.repeat_interleave(_copies(len(rows), count, what), 0)
