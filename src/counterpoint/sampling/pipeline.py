"""Prompt and controls in, images out: one loop over diffusers' own models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from counterpoint.conditions.layout import Layout
from counterpoint.control.attach import hints_encoded_once
from counterpoint.control.reuse import Thrift
from counterpoint.control.weight import Weight
from counterpoint.fusion import get_fusion
from counterpoint.models.adapter import check_told, load_adapter
from counterpoint.models.compiling import closed_by
from counterpoint.models.ip_adapter import check_encoder
from counterpoint.models.load import load_image_encoder
from counterpoint.sampling.aggregated import come_back, leave
from counterpoint.sampling.amdm import Aggregation, sample_aggregated
from counterpoint.sampling.arguments import all_layouts, all_prompts, check_noise, check_numbers, warn_if_broken
from counterpoint.sampling.controls import (
    all_weights,
    check_injection,
    check_reach,
    each,
    find_lending,
    listed,
    make_branches,
    where_heard,
)
from counterpoint.sampling.denoise import ControlledDenoiser
from counterpoint.sampling.economy import Economy, known_quality
from counterpoint.sampling.guides import Adapter, warn_if_unseen
from counterpoint.sampling.loop import Settle, Step, sample
from counterpoint.sampling.model import Generators, Model
from counterpoint.sampling.pixels import copies
from counterpoint.sampling.prompt import PromptEncoder
from counterpoint.sampling.readout import make_readings
from counterpoint.sampling.report import Report
from counterpoint.sampling.schedulers import set_steps
from counterpoint.types import DEFAULT_FUSION, Combine, Fusion, Latents, Moment, UserError

Scale = float | str | Weight
"""A control's weight, or a schedule of it."""
Begin = Callable[[Latents], tuple[Latents, Settle | None]]
"""Noise -> the latents to start from, and what keeps the rest of a picture while a part of it is repainted."""


@dataclass(frozen=True)
class Output:
    """What a call returns: ``images`` in the form that was asked for, the rest as diffusers has it, a report, and for
    each model what was saved where a quality other than ``exact`` was asked for."""

    images: Any
    nsfw_content_detected: list[bool] | None = None
    report: Report | None = None
    thrift: tuple[Mapping[str, Thrift], ...] = ()


@dataclass(eq=False, repr=False)
class Pipeline(Model):
    """A model that makes pictures, with any number of ControlNets.

    Attributes:
        helpers: models that are aggregated with this one, whose picture it becomes (AMDM, arXiv:2410.01262).
        aggregation: how.
        num_timesteps: how often the network is asked in the call at hand; some schedulers ask twice a step.
    """

    helpers: tuple[Model, ...] = ()
    aggregation: Aggregation = field(default_factory=Aggregation)
    num_timesteps: int = field(default=0, init=False)

    @property
    def models(self) -> tuple[Model, ...]:
        """This one, and those that are aggregated with it."""
        return (self, *self.helpers)

    @property
    def labels(self) -> list[str]:
        """Every control that a call wants an image for: this model's, then those of its helpers alone."""
        return list(dict.fromkeys(label for model in self.models for label in model.controls))

    def to(self, device: str | torch.device) -> Pipeline:
        """Move every network, also of the helpers."""
        for helper in self.helpers:
            helper.to(device)
        super().to(device)
        return self

    def adapted(self, source: str) -> Pipeline:
        """The same model with an adapter; all weights that both have are shared.

        Args:
            source: the name of one of its own (tiny has ``"interact"``, ``"migc"`` and ``"style"``), or a safetensors
                file or folder of InteractDiffusion, GLIGEN, MIGC or IP-Adapter.

        Raises:
            UserError: there is no such adapter, or it does not fit.
        """
        if closed := closed_by(self.unet):
            raise UserError(f"adapters reach into the networks, {closed}")
        for wrong, said in (
            (self.text_encoder_2, "adapters are for models of the SD1.5 layout"),
            (self.residency, "a model with a residency cannot be adapted, its networks come and go: load it with all"),
            (self.adapter, "this model has an adapter already: adapt the plain model once more, and let both work "
             "together with counterpoint.aggregate"),
        ):  # fmt: skip
            if wrong is not None:
                raise UserError(said)
        folder = self.origin / "adapters"
        own = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
        path = folder / source if source in own else Path(source)
        if not source or not path.exists():
            more = f", or one of the model's own: {', '.join(own)}" if own else ""
            raise UserError(f"there is no adapter {source!r}: give a safetensors file or folder{more}")
        kind, unet = load_adapter(self.unet, path)
        if kind != "ip-adapter":
            return replace(self, unet=unet, adapter=Adapter(kind))
        encoder, processor = load_image_encoder(path, self.origin, self.unet.dtype)
        check_encoder(unet, encoder.config.projection_dim, path)
        return replace(self, unet=unet, adapter=Adapter(kind, encoder.to(self.device), processor))

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
        negative_prompt: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Latents | None = None,
        fusion: str | Fusion | Combine = DEFAULT_FUSION,
        controlnet_conditioning_scale: Scale | Sequence[Scale | Sequence[Scale]] = 1.0,
        control_guidance_start: float | Sequence[float | Sequence[float]] = 0.0,
        control_guidance_end: float | Sequence[float | Sequence[float]] = 1.0,
        control_mask: Sequence[PipelineImageInput | None] | None = None,
        control_mode: str | Sequence[str] = "balanced",
        readout_guidance_scale: Scale | Sequence[Scale] = 0.0,
        gate_silence: bool | None = None,
        foreground: str | Sequence[str] | None = None,
        subject: str | Sequence[str] | None = None,
        subject_mask: PipelineImageInput | Sequence[PipelineImageInput] | None = None,
        layout: Layout | Sequence[Layout] | None = None,
        quality: str = "exact",
        report: bool = False,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[[Pipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
        | None = None,
    ) -> Output:
        """Generate images. Arguments that diffusers' ControlNet pipelines have too mean what they mean there; what is
        missing here, such as prompt embeddings, is heard where :func:`counterpoint.attach` joins a stock pipeline.

        Args:
            prompt: one, or one an image. ``ball++`` and ``(a red ball)1.3`` weigh words.
            control_image: one condition image for each control, in the order of ``labels``: PIL pictures, arrays
                ``(h, w, c)`` or tensors ``(c, h, w)``, of bytes or floats in 0..1; stretched to the picture's size.
            image: starting picture for image-to-image and inpainting; alone, the condition images, as in diffusers'
                text-to-image pipeline.
            mask_image: what to repaint of ``image``: white.
            strength: how far ``image`` is noised, in (0, 1]; with a mask 1 begins from noise alone.
            height: in pixels, a multiple of ``factor``; default ``native_size``.
            width: likewise.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 switches it off; default the model's own.
            negative_prompt: what to guide away from; SDXL tells ``None`` from an empty one, as in diffusers.
            num_images_per_prompt: images a prompt.
            generator: one for all, or one an image: then an image is the same alone and in any batch.
            latents: starting noise, ``(b, c, h, w)`` at unit scale.
            fusion: how the controls become one, by name or as a rule or function of your own.
            controlnet_conditioning_scale: one weight for all controls or one each; a string such as
                ``"0:1,0.5:0.4"`` is a schedule. A control's may be a list with one for each picture.
            control_guidance_start: share of the steps before which a control is silent, likewise.
            control_guidance_end: share of the steps after which it is silent, likewise.
            control_mask: for each control, grey images that say how strongly it speaks where: white is fully, black not
                at all; ``None`` is everywhere.
            control_mode: ``"balanced"``, ``"prompt"`` or ``"control"``, for all controls or one each.
            readout_guidance_scale: how far the prediction is pushed towards each control as it is read from the UNet's
                features, as a share of the prediction's length; one for all or one each, or a schedule. Any but 0
                wants a readout, and costs the step a backward pass through the UNet.
            gate_silence: let a control whose kind has a silent value speak only where its image shows something else,
                unless it has a mask; default where there are several controls, but not under ``"sum"`` and
                ``"minimal-impact"``.
            foreground: for rules that lend keys (``cross``): the controls that show the subject; default the first.
            subject: words of the prompt, one for each foreground, whose place the host's attention tells.
            subject_mask: white where the subject is, one for each foreground, in place of ``subject``. With neither,
                no keys are lent.
            layout: what stands where, for models with an adapter; one for all pictures, or one each.
            quality: ``"exact"``, or what may be foretold to save time: ``"balanced"`` or ``"fast"``; ``Output.thrift``
                says what was.
            report: note at every step which control was heard where, and how closely those with a readout are
                followed: ``Output.report``.
            output_type: form of the images; ``"latent"`` skips decoding.
            callback_on_step_end: called as in diffusers; may return ``{"latents": ...}`` to replace them.

        Raises:
            UserError: arguments that do not fit each other.
        """
        shown = listed(control_image)
        if self.labels and image is not None and not shown:
            image, shown = None, listed(image)
        if image is None and mask_image is not None:
            raise UserError("mask_image says what to repaint of image, and there is no image")
        height, width = height or self.native_size, width or self.native_size
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        check_numbers(
            factor=self.factor,
            height=height,
            width=width,
            steps=num_inference_steps,
            most=self.scheduler.config.num_train_timesteps,
            strength=strength,
            guidance_scale=guidance_scale,
        )
        set_steps(self.scheduler, num_inference_steps, self.device)
        prompts, negatives = all_prompts(prompt, negative_prompt, num_images_per_prompt)
        count, size, guided = len(prompts), (height, width), guidance_scale > 1
        shape = (count, self.unet.config.in_channels, height // self.factor, width // self.factor)
        check_noise(generator, latents, shape)
        self._check_labels(shown)
        hints = {
            label: self.pixels.hint(label, one, size, count).to(self.device, self.unet.dtype)
            for label, one in zip(self.labels, shown, strict=True)
        }
        given = each("control mask", None if control_mask is None else listed(control_mask), self.labels)
        masks = {
            label: self.pixels.region(label, mask, one, size, count).to(self.device)
            for label, mask, one in zip(self.labels, given, shown, strict=True)
            if mask is not None
        }
        rule, level = get_fusion(fusion), known_quality(quality)
        weights = all_weights(controlnet_conditioning_scale, hints)
        regions = where_heard(hints, masks, weights, gate_silence, rule)
        told = [] if subject_mask is None else listed(subject_mask)
        subjects = [self.pixels.subject(mask, shown, size, count).to(self.device) for mask in told]
        layouts = all_layouts(layout, count)
        self._check_layouts(layouts, size)
        denoisers: list[ControlledDenoiser] = []
        encoders: dict[PromptEncoder, PromptEncoder] = {}
        for model in self.models:
            check_injection(rule, model.controls)
            branches = make_branches(
                model.controls,
                hints,
                regions,
                guided,
                weights,
                modes=control_mode,
                starts=control_guidance_start,
                ends=control_guidance_end,
            )
            mine = model.prompt_encoder()
            encode = encoders.setdefault(mine, mine)
            denoiser = model.denoiser(
                prompts, negatives, num_images_per_prompt, guidance_scale, branches, rule, layouts, size, encode
            )
            if set(model.controls) == set(self.labels):
                lending = find_lending(rule, model.controls, self.tokenizer, prompts, foreground, subject, subjects)
                denoiser = replace(denoiser, lending=lending)
            elif model.controls and (foreground or subject or subjects):
                raise UserError("keys are lent within one model, and here no model has every control")
            check_reach(rule, denoiser.lending, [model.unet, *model.controls.values()])
            economy = None if level.bound is None else Economy(level, count, guided)
            denoisers.append(replace(denoiser, economy=economy))
        noted = Report(tuple(self.controls), prompts, shape[2:]) if report and self.controls else None
        readings = make_readings(self, hints, readout_guidance_scale, report)
        denoisers[0] = replace(denoisers[0], readings=readings, watch=None if noted is None else noted.watch)
        timesteps = self.scheduler.timesteps
        begin: Begin = self._from_noise
        if image is not None:
            timesteps = self._shorten(timesteps, strength)
            begin = self._from_image(image, mask_image, shape, timesteps, generator)
        self.num_timesteps = len(timesteps)
        noise = self._noise(shape, generator) if latents is None else latents.to(self.device, self.unet.dtype)
        others = self.helpers if self.aggregation.noise == "separate" else ()
        starts, settles = zip(*map(begin, [noise, *(self._noise(shape, generator) for _ in others)]), strict=True)
        if noted is not None:
            noted.begin(len(timesteps))
        networks = [network for model in self.models for network in model.controls.values()]
        try:
            with hints_encoded_once(networks), self.at_work(rule):
                for step in self._steps(denoisers, starts, timesteps, generator, settles, callback_on_step_end):
                    final = step.latents
            warn_if_broken(final)
            images = final if output_type == "latent" else self.decode(final, output_type, generator)
        finally:
            come_back(self.helpers, self)
        if noted is not None:
            noted.images = list(images) if output_type == "pil" else []
            noted.hints = hints
            noted.errors = {} if readings is None else readings.errors
            noted.regions = {name: region for name, region in regions.items() if region is not None}
        saved = tuple(one.economy.thrift for one in denoisers if one.economy is not None)
        return Output(images, report=noted, thrift=saved)

    def _check_labels(self, images: list[Any]) -> None:
        if len(images) != len(self.labels):
            raise UserError(
                f"{len(images)} control images for {len(self.labels)} controls "
                f"({', '.join(self.labels) or 'none'}); give one each"
            )

    def _check_layouts(self, layouts: Sequence[Layout | None], size: tuple[int, int]) -> None:
        readers = [model.adapter.kind for model in self.models if model.adapter is not None]
        for layout in dict.fromkeys(layouts):
            said = layout or Layout()
            check_told(readers, layout is not None, bool(said.instances), said.reference is not None)
            warn_if_unseen(readers, said, size)

    def _steps(
        self,
        denoisers: list[ControlledDenoiser],
        starts: Sequence[Latents],
        timesteps: Tensor,
        generator: Generators,
        settles: Sequence[Settle | None],
        callback: Callable[..., dict[str, Tensor] | None] | None,
    ) -> Iterator[Step]:
        first = settles[0] if callback is None else self._then(settles[0], callback)
        if not self.helpers:
            return sample(denoisers[0], self.scheduler, starts[0], timesteps, generator=generator, settle=first)
        return sample_aggregated(
            denoisers,
            self.scheduler,
            starts,
            timesteps,
            self.aggregation,
            settles=[first, *(settles[1:] or [settles[0]] * len(self.helpers))],
            finished=lambda: leave(self.helpers, self),
        )

    def _noise(self, shape: tuple[int, ...], generator: Generators) -> Tensor:
        noise: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        return noise

    def _from_noise(self, noise: Latents) -> tuple[Latents, Settle | None]:
        return noise * self.scheduler.init_noise_sigma, None

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
    ) -> Begin:
        height, width = shape[2] * self.factor, shape[3] * self.factor
        pictures = self.pixels.picture(image, (height, width))
        clean = self.encode(pictures, generator, copies(len(pictures), shape[0], "start pictures"))
        if mask is None:
            return lambda noise: (self.scheduler.add_noise(clean, noise, timesteps[:1]), None)
        clean = clean.contiguous()  # as diffusers has it here, which decides how sums are rounded
        where = self.pixels.mask(mask, (height, width), shape[0]).to(clean)
        repaint = torch.nn.functional.interpolate(where, size=shape[2:])
        anew = len(timesteps) == len(self.scheduler.timesteps)  # as in diffusers, nothing of the old picture is left

        def begin(noise: Latents) -> tuple[Latents, Settle | None]:
            def settle(current: Latents, moment: Moment) -> Latents:
                following = timesteps[moment.index + 1 : moment.index + 2]
                kept = self.scheduler.add_noise(clean, noise, following) if len(following) else clean
                return (1 - repaint) * kept + repaint * current

            noised = self.scheduler.add_noise(clean, noise, timesteps[:1])
            return self._from_noise(noise)[0] if anew else noised, settle

        return begin

    def _then(self, settle: Settle | None, callback: Callable[..., dict[str, Tensor] | None]) -> Settle:
        """Let the user's callback see, and replace, the latents after everything else."""

        def settled(latents: Latents, moment: Moment) -> Latents:
            latents = latents if settle is None else settle(latents, moment)
            return (callback(self, moment.index, moment.timestep, {"latents": latents}) or {}).get("latents", latents)

        return settled
