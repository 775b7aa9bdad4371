"""What a training method stands on: a model, where its controls start, pictures, and what reads controls back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from counterpoint.control.features import Layers, widths
from counterpoint.data.balance import Balanced
from counterpoint.data.scenes.vocabulary import SEG_CLASSES
from counterpoint.models.drawn import DRAWN
from counterpoint.models.perception import PerceptionModel, heat_of
from counterpoint.models.probe import Probe, load_probe
from counterpoint.models.trained_for import check_kind
from counterpoint.recipes import parts
from counterpoint.training.stages.diffusion import add_lora
from counterpoint.types import Batch, Samples, UserError


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TunedFields:
    """A ControlNet that goes on learning: the model's own, or ``controlnet_model_name_or_path``; with a ``rank``, as a
    LoRA."""

    controlnet_model_name_or_path: Path | None = None
    rank: int = Field(0, ge=0)


class World(Protocol):
    """A model that methods train on. Every ``config`` is one of its own."""

    name: str
    classes: int

    def unet(self, config: Any) -> UNet2DConditionModel:
        """The frozen denoiser."""
        ...

    def denoising(self, config: Any) -> dict[str, object]:
        """What every stage that denoises takes besides."""
        ...

    def vae(self, config: Any) -> AutoencoderKL | AutoencoderTiny:
        """What decodes, with gradients."""
        ...

    def controlnet(self, config: Any, kind: str) -> ControlNetModel:
        """Where a control starts."""
        ...

    def samples(self, config: Any, kind: str, *, balanced: bool = False) -> Samples:
        """Latents, captions, the control, and what :meth:`wanted` looks at; ``balanced`` silences random segments."""
        ...

    def wanted(self, kind: str) -> Callable[[Batch], Tensor]:
        """What a control's probe should read: maps ``(b, 1, h, w)`` in 0..1, of poses in colour, or classes
        ``(b, h, w)``."""
        ...

    def seen(self, kind: str) -> Callable[[Batch], Tensor]:
        """What a control's :meth:`reader` should read from pictures."""
        ...

    def reader(self, config: Any, kind: str) -> nn.Module:
        """Pictures in -1..1 -> such readings, with gradients; logits of classes."""
        ...

    def probe(self, config: Any, kind: str) -> Probe:
        """A trained probe."""
        ...

    def new_probe(self, unet: UNet2DConditionModel, layers: Layers, kind: str) -> Probe:
        """One to train."""
        ...


class Scenes:
    """The tiny family on procedural scenes; judge B rewards."""

    name = "tiny"
    classes = len(SEG_CLASSES)

    def unet(self, config: parts.FamilyConfig) -> UNet2DConditionModel:
        """The family's."""
        return parts.unet(config)

    def denoising(self, config: parts.FamilyConfig) -> dict[str, object]:
        """The family's."""
        return parts.denoising(config)

    def vae(self, config: parts.FamilyConfig) -> AutoencoderTiny:
        """The family's."""
        return parts.fast(parts.network(AutoencoderTiny, parts.part(config, "vae")))

    def controlnet(self, config: Any, kind: str) -> ControlNetModel:
        """The family's own, unless the configuration names one."""
        place = config.controlnet_model_name_or_path or parts.part(config, f"controls/{kind}")
        return parts.fast(tuned(place, kind, config.rank))

    def samples(self, config: parts.FamilyConfig, kind: str, *, balanced: bool = False) -> Samples:
        """Scenes, whose segments are their classes."""
        if balanced:
            scenes = parts.latents(config, f"control:{kind}", "seg").rename("seg", "segments")
            return Balanced(scenes, kind, config.seed)
        also = {"seg": ["seg"], "pose": ["keypoints"]}.get(kind, [])
        return parts.latents(config, f"control:{kind}", *also)

    def wanted(self, kind: str) -> Callable[[Batch], Tensor]:
        """The scene's classes, or the condition image."""
        return (lambda batch: batch["seg"].long()) if kind == "seg" else lambda batch: shown(batch, kind)

    def seen(self, kind: str) -> Callable[[Batch], Tensor]:
        """The same, but of poses where each joint is."""
        return _joints if kind == "pose" else self.wanted(kind)

    def reader(self, config: parts.FamilyConfig, kind: str) -> nn.Module:
        """Judge B; lines and edges are drawn from the picture as they were from the scene.

        Raises:
            UserError: it is not trained.
        """
        if kind in DRAWN:
            return DRAWN[kind]()
        judge = parts.network(PerceptionModel, _there(config, "judges/b"))
        return _Head(parts.fast(judge), kind)

    def probe(self, config: Any, kind: str) -> Probe:
        """The family's own, unless the configuration names one.

        Raises:
            UserError: it has none for this kind.
        """
        place = config.probe_model_name_or_path
        return parts.fast(load_probe(place or _there(config, f"probes/{kind}", "name one as probe_model_name_or_path")))

    def new_probe(self, unet: UNet2DConditionModel, layers: Layers, kind: str) -> Probe:
        """A small one: thin lines want more than other maps (InnerControl, appendix A.1)."""
        network = Probe(
            widths(unet, layers),
            time_width=unet.time_embedding.linear_2.out_features,
            width=64,
            head=(48, 24),
            **readable(kind, self.classes),
            size=64 if kind in {"hed", "lineart", "canny"} else 32,
            upsample=kind in {"hed", "lineart", "canny"},
        )
        return parts.fast(network)


def tuned(place: Path, kind: str, rank: int = 0) -> ControlNetModel:
    """A ControlNet to go on with, with a LoRA if it has a rank.

    Raises:
        UserError: there is none, or it was trained for another kind of control.
    """
    network: ControlNetModel = parts.network(ControlNetModel, parts.located(place, "controlnet_model_name_or_path"))
    check_kind(network, kind, place)
    if rank:
        add_lora(network, rank)
    return network


def shown(batch: Batch, kind: str) -> Tensor:
    """Condition images in 0..1: of poses, whose colours tell limbs apart, ``(b, 3, h, w)``, else ``(b, 1, h, w)``."""
    maps: Tensor = batch[f"control:{kind}"].permute(0, 3, 1, 2).float() / 255
    return maps if kind == "pose" else maps[:, :1]


def _joints(batch: Batch) -> Tensor:
    return heat_of(batch["keypoints"], batch["control:pose"].shape[1])


def readable(kind: str, classes: int) -> dict[str, Any]:
    """What a probe's head makes of a kind of control: logits of classes, colours, or grey."""
    return {"out": {"seg": classes, "pose": 3}.get(kind, 1), "bounded": kind != "seg"}


def _there(config: parts.FamilyConfig, place: str, otherwise: str = "") -> Path:
    folder = parts.part(config, place)
    if not folder.is_dir():
        hint = f", or {otherwise}" if otherwise else ""
        raise UserError(
            f"{config.pretrained_model_name_or_path} has no {place}: train it first (counterpoint train){hint}"
        )
    return folder


class _Head(nn.Module):
    """One of the things that a judge reads."""

    def __init__(self, judge: PerceptionModel, kind: str) -> None:
        super().__init__()
        self.judge, self.kind = judge, kind

    def forward(self, pictures: Tensor) -> Tensor:
        reading = self.judge(pictures)
        heads = {"depth": reading.depth, "hed": reading.edge, "seg": reading.seg, "pose": reading.joints.sigmoid()}
        return heads[self.kind]


SCENES = Scenes()
"""The tiny family's world."""
