"""Every method on Stable Diffusion 1.5, with the papers' hyper-parameters and a user's photos.

Nobody has run these to their end here: they are built, stepped and checked on a small model of the same layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import AutoModelForDepthEstimation, AutoModelForSemanticSegmentation

from counterpoint.conditions.plain import PLAIN
from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.control.features import Layers, widths
from counterpoint.data.balance import Balanced
from counterpoint.metrics.maps import nearest_colour
from counterpoint.models.drawn import DrawnEdges
from counterpoint.models.edge_networks import load_edge_network
from counterpoint.models.probe import Probe, load_probe
from counterpoint.recipes import aligned, minimal_impact, parts, photos
from counterpoint.recipes.methods import recipes
from counterpoint.recipes.recipe import Recipe
from counterpoint.recipes.worlds import readable, shown, tuned
from counterpoint.training.config import filled
from counterpoint.training.stage import Job
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.types import Batch, Samples, UserError

_STRICT = ConfigDict(extra="forbid")
_DPT, _IMAGENET = ([0.5] * 3, [0.5] * 3, 384), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 512)
"""How readers see pictures whose folder does not say it: mean and deviation of the channels, and the side."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Sd15Config(photos.PhotoConfig):
    """``pretrained_model_name_or_path`` is a diffusers folder or hub id of the SD1.5 layout."""

    pretrained_model_name_or_path: Path = Path("stable-diffusion-v1-5/stable-diffusion-v1-5")
    resolution: int = Field(512, gt=0, multiple_of=32)
    proportion_empty_prompts: float = Field(0.0, ge=0, le=1)
    snr_gamma: float | None = Field(None, gt=0, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ControlConfig(Sd15Config):
    """A ControlNet from the UNet's encoder."""

    control_type: parts.AnyKind = "canny"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ProbeConfig(aligned.ProbeFields, Sd15Config):
    """A probe."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TunedConfig(Sd15Config):
    """Steps that are left open are the paper's: 5000 for seg, else 10000 (section 5.1)."""

    max_train_steps: int | None = Field(None, gt=0)

    def resolved(self) -> Any:
        """With the paper's steps for the kind of control."""
        return filled(super().resolved(), max_train_steps=5000 if self.control_type == "seg" else 10000)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PlainConfig(aligned.PlainFields, TunedConfig):
    """A ControlNet that goes on without rewards."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AlignedConfig(aligned.AlignedFields, TunedConfig):
    """``reader_model_name_or_path`` reads the control from pictures: a folder of transformers or a hub id for depth
    (DPT, Depth Anything) and seg (ADE20K's classes), a safetensors file for hed and lineart."""

    reader_model_name_or_path: Path | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MinimalImpactConfig(minimal_impact.MinimalImpactFields, Sd15Config):
    """A ControlNet that makes way."""


_AS_PUBLISHED = {kind: PLAIN[kind] for kind in ("canny", "tile")}
"""What makes the condition images that published ControlNets were trained on, without a network; the classical soft
edges and lines are others, and would be rewarded for what they are not."""


class StableDiffusion15:
    """SD1.5 on photos."""

    name = "sd15"
    classes = len(ADE20K_PALETTE)

    def unet(self, config: Sd15Config) -> UNet2DConditionModel:
        """The model's."""
        return parts.network(UNet2DConditionModel, _part(config, "unet"))

    def denoising(self, config: Sd15Config) -> dict[str, object]:
        """The model's text encoder and tokenizer, and the noise schedule of its training."""
        _part(config, "text_encoder")
        return parts.denoising(config)

    def vae(self, config: Sd15Config) -> AutoencoderKL:
        """The model's."""
        return parts.network(AutoencoderKL, _part(config, "vae"))

    def controlnet(self, config: Any, kind: str) -> ControlNetModel:
        """The one that the configuration names: the papers start from ControlNet 1.1's."""
        if config.controlnet_model_name_or_path is None:
            raise UserError(
                f"name the {kind} ControlNet to go on with: --set controlnet_model_name_or_path=FOLDER or hub id"
            )
        return tuned(config.controlnet_model_name_or_path, kind, config.rank)

    def samples(self, config: Sd15Config, kind: str, *, balanced: bool = False) -> Samples:
        """Photos with their latents."""
        fields = (f"control:{kind}", *["segments"] * balanced)
        encoded = photos.encoded(config, self.vae(config), *fields, extract=_AS_PUBLISHED)
        return Balanced(encoded, kind, config.seed) if balanced else encoded

    def wanted(self, kind: str) -> Callable[[Batch], Tensor]:
        """Depth as a share of the largest, classes at a quarter of the size, lines as they are."""
        if kind == "seg":
            return _classes
        return _stretched if kind == "depth" else lambda batch: shown(batch, kind)

    def seen(self, kind: str) -> Callable[[Batch], Tensor]:
        """The same."""
        return self.wanted(kind)

    def reader(self, config: AlignedConfig, kind: str) -> nn.Module:
        """The user's; edges need none.

        Raises:
            UserError: it is none, or nothing reads poses.
        """
        if kind == "pose":
            raise UserError(
                "nothing reads poses from photos with gradients; sd15-innercontrol goes without: --set grad_scale=0"
            )
        if kind == "canny":
            return DrawnEdges()
        if config.reader_model_name_or_path is None:
            raise UserError(f"what reads {kind} from pictures? --set reader_model_name_or_path=FOLDER or hub id")
        place = parts.located(config.reader_model_name_or_path, "reader_model_name_or_path")
        if kind in {"hed", "lineart"}:
            return Lines(load_edge_network(kind, place))
        auto = AutoModelForDepthEstimation if kind == "depth" else AutoModelForSemanticSegmentation
        try:
            network = auto.from_pretrained(place, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError):
            raise UserError(
                f"{place} does not read {kind} from pictures: --set reader_model_name_or_path=FOLDER of transformers"
            ) from None
        if kind == "depth":
            if getattr(network.config, "depth_estimation_type", "relative") == "metric":
                raise UserError(f"{place} reads distances, and depth images show nearness: take a relative model")
            return _Depth(network.eval(), *_seen_as(place, *_DPT))
        if (classes := network.config.num_labels) != self.classes:
            raise UserError(f"{place} knows {classes} classes, and seg images show ADE20K's {self.classes}")
        return _Segmenter(network.eval(), *_seen_as(place, *_IMAGENET)[:2])

    def probe(self, config: AlignedConfig, kind: str) -> Probe:
        """One that ``sd15-probe`` trained, or a published head."""
        place = config.probe_model_name_or_path
        if place is None or not place.exists():
            raise UserError(f"what probes for {kind}? --set probe_model_name_or_path=FOLDER (sd15-probe trains one)")
        return load_probe(place)

    def new_probe(self, unet: UNet2DConditionModel, layers: Layers, kind: str) -> Probe:
        """As the paper has them (appendix A.1)."""
        return Probe(
            widths(unet, layers),
            time_width=unet.time_embedding.linear_2.out_features,
            **readable(kind, self.classes),
            size=128 if kind in aligned.EDGES else 64,
            upsample=kind in aligned.EDGES,
        )


def controlnet(config: ControlConfig) -> Job:
    """A new ControlNet (Zhang et al. 2023, arXiv:2302.05543)."""
    kind = config.control_type
    torch.manual_seed(config.seed)
    unet = SD15_WORLD.unet(config)
    network = ControlNetModel.from_unet(unet)
    stage = ControlNetStage(network, kind, unet, **SD15_WORLD.denoising(config))
    return Job(stage, SD15_WORLD.samples(config, kind))


class _Reader(nn.Module):
    """A network that sees pictures of -1..1 as it was trained to: less a mean, by a deviation."""

    def __init__(self, network: nn.Module, mean: list[float], deviation: list[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None], persistent=False)

    def seen(self, pictures: Tensor) -> Tensor:
        return ((pictures + 1) / 2 - self.mean) / self.deviation


class _Depth(_Reader):
    """At the network's own size; a share of the nearest place's, as ControlNet++ has it."""

    def __init__(self, network: nn.Module, mean: list[float], deviation: list[float], side: int) -> None:
        super().__init__(network, mean, deviation)
        self.side = side

    def forward(self, pictures: Tensor) -> Tensor:
        small = F.interpolate(self.seen(pictures), (self.side, self.side), mode="bicubic", antialias=True)
        near = self.network(pixel_values=small).predicted_depth[:, None]
        near = F.interpolate(near, pictures.shape[2:], mode="bilinear")
        return near / near.amax((2, 3), keepdim=True).clamp(min=1e-6)


class _Segmenter(_Reader):
    """Logits of ADE20K's classes at a quarter of the size."""

    def forward(self, pictures: Tensor) -> Tensor:
        logits = self.network(pixel_values=self.seen(pictures)).logits
        return F.interpolate(logits, _quarter(pictures), mode="bilinear")


def _seen_as(place: Path, mean: list[float], deviation: list[float], side: int) -> tuple[list[float], list[float], int]:
    """The same as its folder's ``preprocessor_config.json`` has them.

    Raises:
        UserError: that file is damaged.
    """
    file = place / "preprocessor_config.json"
    if not file.is_file():
        return mean, deviation, side
    try:
        said = json.loads(file.read_text())
        size = said.get("size", side)
        size = size.get("height") or size["shortest_edge"] if isinstance(size, dict) else size
        return list(said.get("image_mean", mean)), list(said.get("image_std", deviation)), int(size)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{file} does not say how pictures are shown to the network") from None


class Lines(nn.Module):
    """An edge network on pictures in -1..1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        """Lines, ``(b, 1, h, w)`` in 0..1."""
        lines: Tensor = self.network((pictures + 1) / 2)
        return lines


def _classes(batch: Batch) -> Tensor:
    images = batch["control:seg"].permute(0, 3, 1, 2)
    small = F.interpolate(images.float(), _quarter(images), mode="nearest-exact").byte()
    palette = torch.from_numpy(ADE20K_PALETTE.copy())
    found = nearest_colour(small.permute(0, 2, 3, 1), palette)
    return torch.where(small.amax(1) > 0, found, -1)  # what is in no class is black


def _stretched(batch: Batch) -> Tensor:
    near = shown(batch, "depth")
    return near / near.amax((2, 3), keepdim=True).clamp(min=1e-6)


def _quarter(pictures: Tensor) -> tuple[int, int]:
    return pictures.shape[2] // 4, pictures.shape[3] // 4


def _part(config: Sd15Config, name: str) -> Path:
    folder = parts.part(config, name)
    if not folder.is_dir():
        raise UserError(f"there is no {folder}: --set pretrained_model_name_or_path=FOLDER of the SD1.5 layout")
    return folder


SD15_WORLD = StableDiffusion15()
_TUNED = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-5,
    "adam_beta2": 0.999,
    "lr_warmup_steps": 10,
    "gradient_checkpointing": True,
    "ema_decay": 0.9999,
}
CONTROLNET = Recipe(
    "sd15-controlnet",
    "a ControlNet for Stable Diffusion 1.5 (--set control_type=canny)",
    ControlConfig(**{**_TUNED, "max_train_steps": 50000, "proportion_empty_prompts": 0.5}),
    controlnet,
)
SD15 = [
    CONTROLNET,
    *recipes(
        SD15_WORLD,
        ProbeConfig(
            train_batch_size=8,
            learning_rate=1e-3,
            adam_beta2=0.999,
            adam_weight_decay=0,
            lr_scheduler="constant",
            lr_warmup_steps=0,
        ),
        PlainConfig(**_TUNED),
        AlignedConfig(**_TUNED),
        MinimalImpactConfig(
            **{**_TUNED, "train_batch_size": 16, "gradient_accumulation_steps": 8, "max_train_steps": 10000}
        ),
        {"max_train_steps": 2000},
    ),
]
"""On Stable Diffusion 1.5. Rewards: 32 samples a process and step, 256 on the eight of the paper; making way: 128, for
10,000 steps where the paper has 2 epochs of MultiGen-20M (9 of its poses), which depend on how many photos you have."""
