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
    FluxControlNetModel,
    FluxMultiControlNetModel,
    MultiAdapter,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.control.attach import injecting
from counterpoint.control.coverage import covered
from counterpoint.control.keys import Lending
from counterpoint.control.lockstep import Walk, walk
from counterpoint.control.stack import expand_rows, fuse, shaped, speak, surround
from counterpoint.control.subject import finding_subjects
from counterpoint.sampling.controls import NO_SUBJECT, check_foreground, check_injection
from counterpoint.sampling.prompt import subject_places
from counterpoint.types import Fusion, Moment, Residuals, UserError

Region = Float[Tensor, "b 1 h w"]
Forward = Callable[..., Any]
_PER_CONTROL = ("controlnet_cond", "controlnet_mode", "control_type", "control_type_idx", "conditioning_scale")
_UNETS = (ControlNetModel, MultiControlNetModel, ControlNetUnionModel, MultiControlNetUnionModel)
_FLUX = (FluxControlNetModel, FluxMultiControlNetModel)
_WALKED = (ControlNetModel, MultiControlNetModel)


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
    gate_silence: bool = False,
) -> Iterator[None]:
    """Let a rule join the controls of a diffusers pipeline. See :func:`counterpoint.attach`."""
    inside = _Inside(pipeline, fusion, names, foreground, subject, subject_masks, dict(regions or {}), gate_silence)
    with ExitStack() as stack:
        stack.enter_context(_replaced(inside.container, _slot(inside.container), inside.controls))
        if inside.watches_host:
            stack.enter_context(_replaced(pipeline.unet, _slot(pipeline.unet), inside.host))
        if hasattr(pipeline, "encode_prompt"):
            stack.enter_context(_replaced(pipeline, "encode_prompt", inside.prompt))
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
        gate_silence: bool,
    ) -> None:
        self.pipeline, self.fusion, self.regions, self.gate_silence = pipeline, fusion, regions, gate_silence
        self.container = _container(pipeline)
        self.networks = _networks(self.container)
        self.names, self.foreground = list(names), list(foreground)
        self.subject, self.subject_masks = list(subject), list(subject_masks)
        self.lending: Lending | None = None
        self.count: int | None = None
        self.covered: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._check_family()
        if len(self.networks) > 1:  # of one network, a union, the number of controls is not known before it is called
            self._named(len(self.networks))

    @property
    def watches_host(self) -> bool:
        """Whether the host itself must be reached: a rule of injection, or a subject to be found."""
        return bool(self.subject) or any(rule.inject is not torch.add for rule in self.fusion.rules)

    def prompt(self, original: Forward, call: dict[str, Any]) -> Any:
        """Around ``encode_prompt``: a run begins, and this is what it is about."""
        self.lending, self.covered = None, {}
        given, copies = call.get("prompt"), call.get("num_images_per_prompt") or 1
        prompts = [given] if isinstance(given, str) else list(given or ())
        self.count = copies * (len(prompts) or len(call["prompt_embeds"]))
        front = self.foreground or self.names[:1] or ["0"]
        masks = self.subject_masks
        if isinstance(self.container, _FLUX) and self.fusion.keys and not masks:
            everywhere = torch.ones(1, 1, 1, 1, device=self.pipeline._execution_device)  # as the paper has it (A.5)
            masks = [everywhere] * len(front)
        if masks:
            self.lending = Lending({}, dict(zip(front, masks, strict=True)))
        elif self.subject:
            if not prompts:
                raise UserError("the prompt came as embeddings: show where the subject is with subject_mask")
            tokenizer, prompts = self.pipeline.tokenizer, [one for one in prompts for _ in range(copies)]
            places = [[subject_places(tokenizer, one, words) for one in prompts] for words in self.subject]
            self.lending = Lending(dict(zip(front, places, strict=True)))
        return original(**call)

    def controls(self, original: Forward, call: dict[str, Any]) -> Any:
        """Around the container's ``forward``: every active control alone, then the rule."""
        images = call["xs"] if "xs" in call else call["controlnet_cond"]
        names = self._named(len(images) if isinstance(images, list) else 1)
        count = len(names)
        scales = call.get("adapter_weights" if "xs" in call else "conditioning_scale")
        scales = [1 / count] * count if scales is None else scales
        scales = list(scales) if isinstance(scales, (list, tuple)) else [scales] * count
        active = {name: i for i, name in enumerate(names) if scales[i] != 0}
        if not active:
            return original(**call)
        moment = self._moment(call.get("timestep"))
        rule = self.fusion.during(moment.progress)
        parts = {name: _part(self.container, call, i, scales) for name, i in active.items()}
        layout = _layout(self.container, call)
        shape = (
            call["sample"].shape
            if "sample" in call
            else (len(call.get("hidden_states", [0])), 1, *(layout.grid or (1, 1)))
        )
        networks = {name: self.networks[min(i, len(self.networks) - 1)] for name, i in active.items()}
        order = surround(networks, rule, self.lending, moment, shape)

        def alone(name: str) -> Any:
            with _only(self.container, active[name]):
                return original(**parts[name])

        def walked(name: str) -> Walk:
            return _walk(self.networks[active[name]], parts[name], scales[active[name]])

        said = speak(order, rule, alone, walked)
        flat = []
        for name in active:
            sites, sizes = layout.flatten(said[name])
            region = self._region(name, parts[name])
            if region is not None:
                region = expand_rows(region, len(sites[0]), f"masks for {name}")
            flat.append(shaped(sites, region, 1.0))
        return layout.rebuild(fuse(rule, flat), sizes)

    def host(self, original: Forward, call: dict[str, Any]) -> Any:
        """Around the host's ``forward``: features go in by the rule, and subjects are watched."""
        moment = self._moment(call["timestep"])
        rule = self.fusion.during(moment.progress)
        with ExitStack() as stack:
            if rule.inject is not torch.add and call.get("mid_block_additional_residual") is not None:
                down, mid = call.pop("down_block_additional_residuals"), call.pop("mid_block_additional_residual")
                stack.enter_context(injecting(self.pipeline.unet, Residuals(tuple(down), mid), rule.inject))
            size = (call["sample"].shape[2], call["sample"].shape[3])
            stack.enter_context(finding_subjects(self.pipeline.unet, self.lending, size))
            return original(**call)

    def _moment(self, timestep: Any) -> Moment:
        """Where the pipeline's scheduler stands; adapters run once, before the first step."""
        steps = self.pipeline.scheduler.timesteps
        if timestep is None:
            return Moment(0, len(steps), steps[0])
        now = torch.as_tensor(timestep).flatten()[0].to(steps)
        if isinstance(self.container, _FLUX):
            now = now * 1000
        first = len(steps) - getattr(self.pipeline, "_num_timesteps", len(steps))  # image-to-image starts later
        return Moment(int((steps[first:] - now).abs().argmin()), len(steps) - first, torch.as_tensor(timestep))

    def _region(self, name: str, part: Mapping[str, Any]) -> Tensor | None:
        """Where a control speaks: its mask, or what its image covers."""
        if name in self.regions:
            region = self.regions[name]
            if self.count is not None and len(region) not in {1, self.count}:
                raise UserError(f"{len(region)} masks for {name} and {self.count} images; give one, or one an image")
            return region
        if not self.gate_silence:
            return None
        hint = part["xs"] if "xs" in part else part["controlnet_cond"]
        while isinstance(hint, list):
            hint = hint[0]
        if name not in self.covered or self.covered[name][0] is not hint:
            self.covered[name] = (hint, covered(name, hint))
        return self.covered[name][1]

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
        keys, walks = self.fusion.keys, any(rule.exchange for rule in self.fusion.rules)
        if not keys:
            check_foreground(self.fusion, {}, self.foreground, len(told))
        if self.fusion.stages and isinstance(self.container, MultiAdapter):
            raise UserError(f"{kind} speaks once, before the first step: it can have one rule only")
        if told and isinstance(self.container, MultiAdapter):
            raise UserError(f"{kind} has no keys to lend: leave subject and subject_mask out")
        if self.subject and isinstance(self.container, _FLUX):
            raise UserError(f"{kind}'s model does not tell where a word is painted: show it with subject_mask")
        if self.gate_silence and isinstance(self.container, _FLUX):
            raise UserError(f"{kind} sees encoded images, whose silence cannot be read: give control_mask")
        if walks and not isinstance(self.container, _WALKED):
            raise UserError(f"{self.fusion.name} walks ControlNets side by side and cannot walk {kind}; try cross")
        if any(rule.inject is not torch.add for rule in self.fusion.rules) and not isinstance(self.container, _UNETS):
            raise UserError(f"{self.fusion.name} changes how a U-Net takes features in; {kind} feeds none: try mgda")
        reached = [self.container]
        reached += [module for network in self.networks if told or walks for module in network.modules()]
        reached += list(self.pipeline.unet.modules()) if self.watches_host else []
        for module in reached:
            if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
                raise UserError(
                    f"{self.fusion.name} must reach inside {type(getattr(module, '_orig_mod', module)).__name__}, "
                    "which is compiled: attach to the pipeline as it was loaded"
                )
        if keys and not told and isinstance(self.container, _UNETS):
            warnings.warn(f"{self.fusion.name} {NO_SUBJECT}", stacklevel=6)


def _container(pipeline: DiffusionPipeline) -> nn.Module:
    for name in ("controlnet", "adapter"):
        module: Any = getattr(pipeline, name, None)
        if isinstance(getattr(module, "_orig_mod", module), (*_UNETS, *_FLUX, MultiAdapter)):
            return module  # type: ignore[no-any-return]
    raise UserError(f"{type(pipeline).__name__} holds no ControlNets and no T2I-Adapters that can be joined")


def _networks(container: nn.Module) -> list[nn.Module]:
    return list(getattr(container, "nets", None) or getattr(container, "adapters", None) or [container])


def _part(container: nn.Module, call: Mapping[str, Any], index: int, scales: Sequence[float]) -> dict[str, Any]:
    """A call for one control, from the call for all."""
    if "xs" in call:
        return {"xs": [call["xs"][index]], "adapter_weights": [scales[index]]}
    part: dict[str, Any] = {
        key: [value[index]] if key in _PER_CONTROL and isinstance(value, (list, tuple)) else value
        for key, value in call.items()
    }
    if isinstance(container, ControlNetUnionModel):
        part["control_type"] = torch.zeros_like(call["control_type"])
        part["control_type"][:, part["control_type_idx"][0]] = 1
    return {**part, "return_dict": False}


@contextmanager
def _only(container: nn.Module, index: int) -> Iterator[None]:
    """Let a container hold one network."""
    name = "adapters" if isinstance(container, MultiAdapter) else "nets"
    whole: Any = container._modules.get(name, ())
    if len(whole) < 2:
        yield
        return
    container._modules[name] = nn.ModuleList([whole[index]])
    try:
        yield
    finally:
        container._modules[name] = whole


def _walk(network: nn.Module, part: Mapping[str, Any], scale: float) -> Walk:
    if part["guess_mode"]:
        raise UserError("guess_mode weighs a network's own sites and cannot be walked: leave it out, or fuse by pix")
    timestep = torch.as_tensor(part["timestep"], device=part["sample"].device)
    hint = part["controlnet_cond"]
    return walk(
        network,
        part["sample"],
        timestep,
        part["encoder_hidden_states"],
        hint[0] if isinstance(hint, list) else hint,
        scale,
        part.get("added_cond_kwargs"),
    )


class _Layout:
    """How one family of containers answers, as a list of maps from the first site to the deepest, and back."""

    def __init__(self, flatten: Forward, rebuild: Forward, grid: tuple[int, int] | None = None) -> None:
        self.flatten, self.rebuild, self.grid = flatten, rebuild, grid


def _layout(container: nn.Module, call: Mapping[str, Any]) -> _Layout:
    if isinstance(container, MultiAdapter):
        return _Layout(lambda said: (list(said), None), lambda sites, _: sites)
    if isinstance(container, _UNETS):
        return _Layout(lambda said: ([*said[0], said[1]], None), lambda sites, _: (sites[:-1], sites[-1]))
    height, width = (int(call["img_ids"][:, axis].max()) + 1 for axis in (1, 2))

    def flatten(said: Any) -> tuple[list[Tensor], tuple[int | None, int | None]]:
        tokens = [site for group in said for site in group or ()]
        maps = [site.transpose(1, 2).reshape(len(site), -1, height, width) for site in tokens]
        return maps, (None if said[0] is None else len(said[0]), None if said[1] is None else len(said[1]))

    def rebuild(sites: list[Tensor], sizes: tuple[int | None, int | None]) -> tuple[Any, Any]:
        tokens = [site.flatten(2).transpose(1, 2) for site in sites]
        double = tokens[: sizes[0] or 0]
        return (double if sizes[0] else None), (tokens[len(double) :] if sizes[1] else None)

    return _Layout(flatten, rebuild, (height, width))


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
