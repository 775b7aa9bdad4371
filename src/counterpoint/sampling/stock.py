"""Fusion rules inside stock diffusers pipelines, for as long as a ``with`` block lasts.

Nothing of a pipeline is copied or rewritten: what holds its control networks is asked for one network at a time, with
the arguments that the pipeline gave, and the rule makes one answer of them. So every pipeline with such a container is
served, whatever its model.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
)
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.control.attach import forget_hints, hints_encoded_once, injecting, injecting_blocks
from counterpoint.control.coverage import covered, gates, is_silenced
from counterpoint.control.keys import Lending
from counterpoint.control.lockstep import Walk
from counterpoint.control.sites import fuse, shaped
from counterpoint.control.stack import expand_rows, speak, surround
from counterpoint.control.subject import finding_subjects
from counterpoint.models.compiling import is_compiled
from counterpoint.sampling.containers import (
    ADAPTERS,
    FLUX,
    UNETS,
    WALKED,
    Forward,
    find_container,
    layout_of,
    networks_of,
    only,
    part_of,
    shown,
    walk_of,
)
from counterpoint.sampling.controls import NO_SUBJECT, NoSubject, check_foreground, check_injection
from counterpoint.sampling.pixels import alike
from counterpoint.sampling.prompt import subject_places
from counterpoint.sampling.schedulers import noise_level
from counterpoint.types import Fusion, Moment, Residuals, UserError

Region = Float[Tensor, "b 1 h w"]


@contextmanager
def attached(
    pipeline: DiffusionPipeline,
    fusion: Fusion,
    names: Sequence[str] = (),
    *,
    foreground: Sequence[str] = (),
    subject: Sequence[str] = (),
    subject_masks: Sequence[Region] = (),
    regions: Mapping[str, Region] | None = None,
    gate_silence: bool | None = None,
) -> Iterator[None]:
    """Let a rule join the controls of a diffusers pipeline. See :func:`counterpoint.attach`."""
    inside = _Inside(pipeline, fusion, names, foreground, subject, subject_masks, dict(regions or {}), gate_silence)
    with ExitStack() as stack:
        stack.enter_context(hints_encoded_once([one for one in inside.networks if _is_plain(one)]))
        stack.enter_context(_replaced(inside.container, _slot(inside.container), inside.controls))
        if inside.watches_host:
            stack.enter_context(_replaced(inside.model, _slot(inside.model), inside.host))
        if hasattr(pipeline, "encode_prompt") and hasattr(pipeline, "maybe_free_model_hooks"):
            inside.running = False
            stack.enter_context(_replaced(pipeline, "encode_prompt", inside.prompt))
            stack.enter_context(_replaced(pipeline, "maybe_free_model_hooks", inside.end))
        yield


class _Inside:
    """What the rule needs to remember between the calls of one pipeline run."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        fusion: Fusion,
        names: Sequence[str],
        foreground: Sequence[str],
        subject: Sequence[str],
        subject_masks: Sequence[Region],
        regions: dict[str, Region],
        gate_silence: bool | None,
    ) -> None:
        self.pipeline, self.fusion, self.regions = pipeline, fusion, regions
        self.container = find_container(pipeline)
        readable = gate_silence is not None or not isinstance(self.container, FLUX)
        readable &= gate_silence is not None or not _has_more_rows(pipeline)
        self.gate_silence = readable and gates(gate_silence, fusion, names)
        self.networks = networks_of(self.container)
        self.model: Any = pipeline.transformer if isinstance(self.container, FLUX) else pipeline.unet
        self.names, self.foreground = list(names), list(foreground)
        self.subject, self.subject_masks = list(subject), list(subject_masks)
        self.lending: Lending | None = None
        self.count: int | None = None
        self.running = True
        self.covered: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._check_family()
        if len(self.networks) > 1:  # of one network, a union, the number of controls is not known before it is called
            self._named(len(self.networks))

    @property
    def watches_host(self) -> bool:
        """Whether the host itself must be reached: a rule of injection, or a subject to be found."""
        return bool(self.subject) or self.fusion.injects

    def prompt(self, original: Forward, call: dict[str, Any]) -> Any:
        """Around ``encode_prompt``: a run begins, and this is what it is about. Until it ends the networks are this
        pipeline's; at other times another one may use them, for whom they are what they were."""
        self.lending, self.covered, self.running = None, {}, True
        given, copies = call.get("prompt"), call.get("num_images_per_prompt") or 1
        prompts = [given] if isinstance(given, str) else list(given or ())
        self.count = copies * (len(prompts) or len(call["prompt_embeds"]))
        front = self.foreground or self.names[:1] or ["0"]
        masks = self.subject_masks
        for mask in masks:
            self._check_count(mask, "subject masks")
        if isinstance(self.container, FLUX) and self.fusion.keys and not masks:
            everywhere = torch.ones(1, 1, 1, 1, device=self.pipeline._execution_device)  # as the paper has it (A.5)
            masks = [everywhere] * len(front)
        if masks:
            self.lending = Lending({}, dict(zip(front, masks, strict=True)))
        elif self.subject:
            if not prompts:
                raise UserError("the prompt came as embeddings: show where the subject is with subject_mask")
            tokenizer, prompts = self.pipeline.tokenizer, [one for one in prompts for _ in range(copies)]
            if hasattr(self.pipeline, "maybe_convert_prompt"):  # an embedding that was learnt may be several tokens
                prompts = self.pipeline.maybe_convert_prompt(prompts, tokenizer)
            places = [[subject_places(tokenizer, one, words) for one in prompts] for words in self.subject]
            self.lending = Lending(dict(zip(front, places, strict=True)))
        return original(**call)

    def end(self, original: Forward, call: dict[str, Any]) -> Any:
        """Around what diffusers calls last in a run."""
        self.running = False
        forget_hints(self.networks)
        return original(**call)

    def controls(self, original: Forward, call: dict[str, Any]) -> Any:
        """Around the container's ``forward``: every active control alone, then the rule."""
        if not self.running:
            return original(**call)
        images = shown(call)
        names = self._named(len(images) if isinstance(images, list) else 1)
        count = len(names)
        scales = call.get("adapter_weights" if "xs" in call else "conditioning_scale")
        scales = [1 / count] * count if scales is None else scales
        scales = list(scales) if isinstance(scales, (list, tuple)) else [scales] * count
        if len(scales) < count:  # diffusers takes as many windows as networks, and a union has one for all
            raise UserError(
                f"the pipeline hears {len(scales)} of {count} controls ({', '.join(names)}): give it a list of {count} "
                "for control_guidance_start, control_guidance_end and controlnet_conditioning_scale each"
            )
        active = {name: i for i, name in enumerate(names) if scales[i] != 0}
        if not active:
            return original(**call)
        moment = self._moment(call.get("timestep"))
        rule = self.fusion.during(moment.progress)
        parts = {name: part_of(self.container, call, i, scales) for name, i in active.items()}
        layout = layout_of(self.container, call)
        shape = (
            call["sample"].shape
            if "sample" in call
            else (len(call.get("hidden_states", [0])), 1, *(layout.grid or (1, 1)))
        )
        for name, mask in ({} if self.lending is None else self.lending.masks).items():
            if self.subject_masks and mask[0].numel() > 1 and not alike(mask.shape[2:], shape[2:]):
                raise UserError(
                    f"the subject mask for {name} is {mask.shape[3]} x {mask.shape[2]} and the latents "
                    f"{shape[3]} x {shape[2]}: give it the picture's shape, at any resolution"
                )
        networks = {name: self.networks[min(i, len(self.networks) - 1)] for name, i in active.items()}
        order = surround(networks, rule, self.lending, moment, shape)

        def alone(name: str) -> Any:
            with only(self.container, active[name]):
                return original(**parts[name])

        def walked(name: str) -> Walk:
            return walk_of(self.networks[active[name]], parts[name], scales[active[name]])

        said = speak(order, rule, alone, walked)
        flat, sizes = {}, {}
        for name in active:
            sites, sizes[name] = layout.flatten(said[name])
            region = self._region(name, parts[name])
            if region is not None:
                region = expand_rows(region, len(sites[0]), f"masks for {name}")
            flat[name] = shaped(sites, region, 1.0)
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise UserError(f"the controls speak to different numbers of double and single blocks ({listed})")
        return layout.rebuild(fuse(rule, flat, layout.names(sizes[name])), sizes[name])

    def host(self, original: Forward, call: dict[str, Any]) -> Any:
        """Around the host's ``forward``: features go in by the rule, and subjects are watched."""
        if not self.running:
            return original(**call)
        moment = self._moment(call["timestep"])
        rule = self.fusion.during(moment.progress)
        with ExitStack() as stack:
            if rule.inject is not torch.add:
                self._inject(call, rule, stack)
            if "sample" in call:
                size = (call["sample"].shape[2], call["sample"].shape[3])
                stack.enter_context(finding_subjects(self.model, self.lending, size))
            return original(**call)

    def _inject(self, call: dict[str, Any], rule: Fusion, stack: ExitStack) -> None:
        """Take the control features out of a host's call, and let them in by the rule."""
        if isinstance(self.container, FLUX):
            repeated = call.get("controlnet_blocks_repeat", False)
            for kind, blocks in (
                ("controlnet_block_samples", self.model.transformer_blocks),
                ("controlnet_single_block_samples", self.model.single_transformer_blocks),
            ):
                samples = call.pop(kind, None)
                if samples is not None:
                    turns = repeated and blocks is self.model.transformer_blocks
                    stack.enter_context(injecting_blocks(blocks, samples, rule.inject, turns))
        elif call.get("mid_block_additional_residual") is not None:
            down, mid = call.pop("down_block_additional_residuals"), call.pop("mid_block_additional_residual")
            stack.enter_context(injecting(self.model, Residuals(tuple(down), mid), rule.inject))

    def _moment(self, timestep: Any) -> Moment:
        """Where the pipeline's scheduler stands; adapters run once, before the first step."""
        steps = self.pipeline.scheduler.timesteps
        if timestep is None:
            return Moment(0, len(steps), steps[0])
        now = torch.as_tensor(timestep).flatten()[0].to(steps)
        if isinstance(self.container, FLUX):
            now = now * 1000
        first = len(steps) - getattr(self.pipeline, "_num_timesteps", len(steps))  # image-to-image starts later
        index = int((steps[first:] - now).abs().argmin())
        sigma = noise_level(self.pipeline.scheduler, float(now))
        return Moment(index, len(steps) - first, torch.as_tensor(timestep), sigma)

    def _region(self, name: str, part: Mapping[str, Any]) -> Tensor | None:
        """Where a control speaks: its mask, or what its image covers."""
        hint = shown(part)
        while isinstance(hint, list):
            hint = hint[0]
        if name in self.regions:
            region = self.regions[name]
            self._check_count(region, f"masks for {name}")
            if hint.ndim == 4 and region[0].numel() > 1 and not alike(region.shape[2:], hint.shape[2:]):
                raise UserError(
                    f"the mask for {name} is {region.shape[3]} x {region.shape[2]} and its picture "
                    f"{hint.shape[3]} x {hint.shape[2]}: give it the picture's shape, at any resolution"
                )
            return region
        if not self.gate_silence:
            return None
        if name not in self.covered or self.covered[name][0] is not hint:
            self.covered[name] = (hint, covered(name, hint))
        return self.covered[name][1]

    def _check_count(self, masks: Tensor, what: str) -> None:
        if self.count is not None and len(masks) not in {1, self.count}:
            raise UserError(f"{len(masks)} {what} and {self.count} images; give one, or one an image")

    def _named(self, count: int) -> list[str]:
        """The controls' names; holds the settings against them."""
        names = self.names or [str(i) for i in range(count)]
        if len(names) != count:
            raise UserError(f"{len(names)} names ({', '.join(names)}) for {count} controls; give one each")
        if len(set(names)) < count:
            raise UserError(f"two controls have one name: {', '.join(names)}; call the second one KIND:SOMETHING")
        if unknown := [name for name in self.regions if name not in names]:
            raise UserError(f"there is no control {unknown[0]!r}; there are {', '.join(names)}")
        networks = {name: self.networks[min(i, len(self.networks) - 1)] for i, name in enumerate(names)}
        check_foreground(self.fusion, networks, self.foreground, len(self.subject_masks or self.subject))
        return names

    def _check_family(self) -> None:
        """Refuse what the model's family or its compilation cannot give."""
        kind, told = type(self.container).__name__, self.subject_masks or self.subject
        numbered = {str(i): network for i, network in enumerate(self.networks)}
        check_injection(self.fusion, dict(zip(self.names, self.networks, strict=False)) or numbered)
        keys, walks = self.fusion.keys, self.fusion.walks
        if not keys:
            check_foreground(self.fusion, {}, self.foreground, len(told))
        if _has_more_rows(self.pipeline) and (told or self.regions or self.gate_silence):
            raise UserError(
                f"a {type(self.pipeline).__name__} has more rows than pictures (frames, or perturbed ones), and masks "
                "are told for pictures: leave subject, masks and gate_silence out"
            )
        if self.subject and self.subject_masks:
            raise UserError("subject and subject_mask both say where the subject is: give one of them")
        if self.fusion.stages and isinstance(self.container, ADAPTERS):
            raise UserError(f"{kind} speaks once, before the first step: it can have one rule only")
        if told and isinstance(self.container, ADAPTERS):
            raise UserError(f"{kind} has no keys to lend: leave subject and subject_mask out")
        if self.subject and isinstance(self.container, FLUX):
            raise UserError(f"{kind}'s model does not tell where a word is painted: show it with subject_mask")
        if self.gate_silence and isinstance(self.container, FLUX):
            raise UserError(f"{kind} sees encoded images, whose silence cannot be read: give control_mask")
        if self.gate_silence and not any(is_silenced(name) for name in self.names):
            raise UserError(
                "gate_silence wants to know what the controls show: name them, controls=['pose', ...]; only edges, "
                "lines and poses have a silent value, others take a control_mask"
            )
        if walks and not isinstance(self.container, WALKED):
            raise UserError(f"{self.fusion.name} walks ControlNets side by side and cannot walk {kind}; try cross")
        if self.fusion.injects and isinstance(self.container, ADAPTERS):
            raise UserError(f"{self.fusion.name} changes how ControlNets are taken in, and {kind} is none: try mgda")
        reached = [self.container]
        reached += [module for network in self.networks if told or walks for module in network.modules()]
        reached += list(self.model.modules()) if self.watches_host else []
        for module in reached:
            if is_compiled(module):
                raise UserError(
                    f"{self.fusion.name} must reach inside {type(getattr(module, '_orig_mod', module)).__name__}, "
                    "which is compiled: attach to the pipeline as it was loaded"
                )
        if keys and not told and isinstance(self.container, UNETS):
            warnings.warn(f"{self.fusion.name} {NO_SUBJECT}", NoSubject, stacklevel=6)


def _has_more_rows(pipeline: DiffusionPipeline) -> bool:
    """Whether a batch is more than pictures and their unconditional halves: perturbed-attention guidance, films."""
    return hasattr(pipeline, "do_perturbed_attention_guidance") or hasattr(pipeline, "motion_adapter")


def _is_plain(network: nn.Module) -> bool:
    """A U-Net's ControlNet that nobody has compiled."""
    return isinstance(network, (ControlNetModel, ControlNetUnionModel)) and network._compiled_call_impl is None


def _slot(module: nn.Module) -> str:
    """Where a module's own forward is: accelerate keeps it aside when it offloads."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


@contextmanager
def _replaced(owner: Any, name: str, around: Callable[[Forward, dict[str, Any]], Any]) -> Iterator[None]:
    """Let ``around(original, arguments by name)`` stand in for a method of one object."""
    original = getattr(owner, name)
    if getattr(original, "attached", False):
        raise UserError("a rule is attached to this pipeline already: leave its with block first")
    before = owner.__dict__.get(name)
    signature = inspect.signature(original)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return around(original, dict(signature.bind(*args, **kwargs).arguments))

    stand_in.attached = True  # type: ignore[attr-defined]
    owner.__dict__[name] = stand_in
    try:
        yield
    finally:
        for slot in {name, "forward", "_old_forward"}:  # offloading that was switched on or off meanwhile has moved it
            if owner.__dict__.get(slot) is stand_in:
                if slot == name and before is not None:
                    owner.__dict__[slot] = before
                elif slot == "_old_forward":
                    owner.__dict__[slot] = original
                else:
                    del owner.__dict__[slot]
