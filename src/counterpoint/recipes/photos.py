"""Recipes that bring the tiny family to a user's photos: the same members and stages on another world."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from counterpoint.conditions.plain import PLAIN, Extract
from counterpoint.data.balance import Balanced, check_can_be_silent
from counterpoint.data.samples import PhotoSamples, open_photos
from counterpoint.data.shards import save_whole
from counterpoint.models.perception import PerceptionModel
from counterpoint.recipes import parts
from counterpoint.recipes.recipe import Recipe
from counterpoint.training.stage import Job
from counterpoint.training.stages.codec import CodecStage
from counterpoint.training.stages.diffusion import ControlNetStage, DiffusionStage
from counterpoint.training.stages.judge import JudgeStage
from counterpoint.types import UserError

SHARD = 2048
"""Photos whose latents share a file."""
_ENCODED = 16
_LOOKED_AT = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PhotoConfig(parts.FamilyConfig):
    """``train_data_dir`` is whatever :func:`counterpoint.data.samples.open_photos` reads; photos are cut to squares of
    ``resolution``, a multiple of 32. ``max_train_samples`` takes the first ones only; of a data set in
    columns, ``image_column``, ``caption_column`` and ``conditioning_image_column`` are those of the photo, its caption
    and the control."""

    train_data_dir: Path = Path("photos")
    image_column: str = "image"
    caption_column: str = "text"
    conditioning_image_column: str | None = None
    max_train_samples: int | None = Field(None, gt=0)
    resolution: int = Field(128, gt=0, multiple_of=32)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PhotoControlConfig(PhotoConfig):
    """A ControlNet for a kind of control whose images came with the photos or can be made without a model;
    ``balanced`` silences it in random segments."""

    control_type: parts.AnyKind = "canny"
    balanced: bool = False


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SegmenterConfig(PhotoConfig):
    """``num_labels`` classes, numbered from 0 by the pictures of ``segments_file_name``."""

    num_labels: int = Field(2, gt=1)


class EncodedPhotos:
    """Photos with their latents, which are computed once and kept: killed and begun again, it goes on.

    Args:
        samples: the photos.
        vae: what encodes them.
        folder: where latents go.
    """

    def __init__(self, samples: PhotoSamples, vae: AutoencoderTiny | AutoencoderKL, folder: Path) -> None:
        self.samples, self.vae, self.folder = samples, vae, folder
        self.images = copy(samples)  # a photo that is damaged is counted once
        self.images.fields = ("image",)
        starts = [start for start in range(0, len(samples), SHARD) if not self._path(start).exists()]
        folder.mkdir(parents=True, exist_ok=True)
        random.shuffle(starts)  # processes that begin together share the work
        for start in tqdm(starts, desc="computing latents", unit="shard", disable=not starts):
            if self._path(start).exists():
                continue
            save_whole(self._path(start), self._encode(range(start, min(start + SHARD, len(samples)))))
        self.latents = [np.load(self._path(start), mmap_mode="r") for start in range(0, len(samples), SHARD)]

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The samples' fields and ``latents``, scaled as the UNet sees them."""
        rows = np.stack([self.latents[index // SHARD][index % SHARD] for index in indices])
        return {**self.samples.batch(indices), "latents": torch.from_numpy(rows)}

    def _encode(self, numbers: range) -> np.ndarray:
        batches = (numbers[start : start + _ENCODED] for start in range(0, len(numbers), _ENCODED))
        return parts.encode(self.vae, (self.images.batch(batch)["image"] for batch in batches))

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:08d}.npy"


def codec(config: PhotoConfig) -> Job:
    """Goes on with the family's autoencoder."""
    model = parts.network(AutoencoderTiny, parts.part(config, "vae"))
    return Job(CodecStage(parts.fast(model)), _photos(config, "image"))


def base(config: PhotoConfig) -> Job:
    """Goes on with the family's UNet."""
    torch.manual_seed(config.seed)
    return Job(DiffusionStage(parts.unet(config), **parts.denoising(config)), _latents(config))


def controlnet(config: PhotoControlConfig) -> Job:
    """As in the tiny family."""
    kind = config.control_type
    torch.manual_seed(config.seed)
    unet = parts.unet(config)
    network: ControlNetModel = parts.new_controlnet(unet)
    stage = ControlNetStage(parts.fast(network), kind, unet, **parts.denoising(config))
    if config.balanced:
        check_can_be_silent(kind, "balanced=true")
    if not config.balanced:
        return Job(stage, _latents(config, f"control:{kind}"))
    return Job(stage, Balanced(_latents(config, f"control:{kind}", "segments"), kind, config.seed))


def segmenter(config: SegmenterConfig) -> Job:
    """Reads the segments that photos came with, to see whether a control was followed."""
    torch.manual_seed(config.seed)
    model = PerceptionModel(config.num_labels, widths=(24, 48, 96, 128), depth=2)
    return Job(JudgeStage(parts.fast(model)), _photos(config, "image", "segments"))


def _photos(
    config: PhotoConfig, *fields: str, find_segments: bool = False, extract: Mapping[str, Extract] = PLAIN
) -> PhotoSamples:
    kinds = [field.removeprefix("control:") for field in fields if field.startswith("control:")]
    if (column := config.conditioning_image_column) is not None and not kinds:
        raise UserError(f"conditioning_image_column={column}: this recipe learns no control")
    photos = open_photos(
        config.train_data_dir,
        config.resolution,
        image=config.image_column,
        text=config.caption_column,
        maps=None if column is None else dict.fromkeys(kinds, column),
        kinds=kinds,
    )
    samples = PhotoSamples(photos, fields, extract, find_segments=find_segments, most=config.max_train_samples)
    first = samples.batch(range(min(_LOOKED_AT, len(samples))))  # what they lack is said now
    if not any(first.get("caption", ["none is wanted"])):
        _log.warning("%s has no captions: every prompt is empty", config.train_data_dir)
    return samples


def encoded(
    config: PhotoConfig, vae: AutoencoderTiny | AutoencoderKL, *fields: str, extract: Mapping[str, Extract] = PLAIN
) -> EncodedPhotos:
    """The photos of a configuration with their latents; ``extract`` makes the condition images that they lack."""
    samples = _photos(config, "caption", *fields, find_segments=True, extract=extract)
    place = config.train_data_dir.resolve()
    weights = parts.mark(parts.part(config, "vae"))
    mark = hashlib.sha256(f"{weights}-{config.resolution}-{config.image_column}".encode())
    mark.update(np.asarray(samples.numbers).tobytes())
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        status = file.lstat()  # a link may lead nowhere
        mark.update(f"{file}-{status.st_size}-{status.st_mtime_ns}".encode())
    name = mark.hexdigest()[:16]
    return EncodedPhotos(samples, vae, config.cache_dir / f"photos-{name}")


def _latents(config: PhotoConfig, *fields: str) -> EncodedPhotos:
    return encoded(config, parts.fast(parts.network(AutoencoderTiny, parts.part(config, "vae"))), *fields)


_SETTINGS = {
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "checkpointing_steps": 500,
    "logging_steps": 100,
}
CODEC = Recipe(
    "photo-codec",
    "the tiny autoencoder on your photos (--set train_data_dir=FOLDER)",
    PhotoConfig(max_train_steps=6000, train_batch_size=8, learning_rate=5e-4, adam_weight_decay=0, **_SETTINGS),
    codec,
)
BASE = Recipe(
    "photo-base",
    "its UNet on them",
    PhotoConfig(max_train_steps=10000, train_batch_size=16, learning_rate=1e-3, ema_decay=0.9995, **_SETTINGS),
    base,
)
CONTROLNET = Recipe(
    "photo-controlnet",
    "a ControlNet on them (--set control_type=canny)",
    PhotoControlConfig(max_train_steps=6000, train_batch_size=16, learning_rate=2e-3, **_SETTINGS),
    controlnet,
)
SEGMENTER = Recipe(
    "photo-segmenter",
    "a network that reads the segments that came with them",
    SegmenterConfig(max_train_steps=3000, train_batch_size=16, learning_rate=2e-3, **_SETTINGS),
    segmenter,
)
