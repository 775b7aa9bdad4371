"""Suites with the models that they need, and the folder in which a run's results lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from counterpoint import models
from counterpoint.api import load
from counterpoint.apps.record import write_json
from counterpoint.conditions.canny import canny
from counterpoint.conditions.openpose import draw_pose
from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.data.scenes.maps import SEG_PALETTE
from counterpoint.data.scenes.vocabulary import PERSON
from counterpoint.evaluation.suite import Readers, Suite, Task, stack, unstack
from counterpoint.evaluation.suites import fusion
from counterpoint.evaluation.suites.tiny_quality import CONTROLS, TinyQuality
from counterpoint.metrics.maps import nearest_colour
from counterpoint.metrics.niqe import Pristine
from counterpoint.models.load import load_diffusers, locate
from counterpoint.models.perception import PerceptionModel
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import Image, UserError

SUITES: dict[str, Callable[[Pipeline], Suite]] = {
    "conflicting": lambda _: fusion.CONFLICTING,
    "complementary": lambda _: fusion.COMPLEMENTARY,
    "silent": lambda _: fusion.SILENT,
    "single": lambda _: fusion.SINGLE,
    "tiny-quality": lambda pipe: TinyQuality(_round_trip(pipe)),
}
"""Name -> suite, for a loaded model."""


class PipelineMaker:
    """Makes the pictures of tasks with one model; each picture has its own generator, so batches do not matter."""

    def __init__(self, pipe: Pipeline, steps: int, guidance_scale: float) -> None:
        self.pipe, self.steps, self.guidance_scale = pipe, steps, guidance_scale

    def __call__(self, tasks: Sequence[Task]) -> list[Image]:
        """One picture a task; all have the same controls and method."""
        method, labels = tasks[0].method, list(tasks[0].images)
        pipe = replace(self.pipe, controls={label: self.pipe.controls[label] for label in labels})
        output = pipe(
            [task.prompt for task in tasks],
            [stack([task.images[label] for task in tasks]) for label in labels],
            fusion=method.fusion,
            controlnet_conditioning_scale=[method.weights.get(label, 1.0) for label in labels],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(task.seed) for task in tasks],
            output_type="np",
        )
        return list(np.rint(output.images * 255).astype(np.uint8))


def load_family(model: str) -> tuple[Pipeline, Readers, str]:
    """A family with its judge and towers, and one hash of all its weights.

    Raises:
        UserError: the folder lacks a part.
    """
    folder, pipe = locate(model), load(model, CONTROLS)
    judge = load_diffusers(folder / "judges" / "a").eval()
    return pipe, _readers(judge, folder), _hash(folder)


def _readers(judge: PerceptionModel, folder: Path) -> Readers:
    """The family's own networks as readers of its pictures."""
    embed_pictures, embed_texts = load_clip(*(folder / part for part in ("image_encoder", "text_encoder", "tokenizer")))

    def classes(pictures: Tensor) -> Tensor:
        return judge(pictures * 2 - 1).seg.argmax(1)

    return Readers(
        maps={
            "canny": lambda pictures: stack([canny(image) for image in unstack(pictures)]),
            "hed": lambda pictures: stack([soft_edge(image) for image in unstack(pictures)]),
            "depth": lambda pictures: judge(pictures * 2 - 1).depth.expand(-1, 3, -1, -1),
            "seg": lambda pictures: stack(list(SEG_PALETTE[classes(pictures).numpy()])),
            "pose": lambda pictures: stack([_drawn(joints) for joints in judge(pictures * 2 - 1).joints]),
        },
        person=lambda pictures: classes(pictures) == PERSON,
        classes=classes,
        classes_of=lambda images: nearest_colour(torch.from_numpy(np.stack(images)), torch.from_numpy(SEG_PALETTE)),
        embed_pictures=embed_pictures,
        embed_texts=embed_texts,
        pristine=load_pristine(),
    )


def load_clip(
    vision: Path, text: Path, tokenizer: Path
) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
    """A CLIP in the folders of its parts: embeddings of pictures ``(b, 3, h, w)`` in 0..1, and of texts.

    Pictures are stretched to the tower's size.

    Raises:
        UserError: a folder holds no such part.
    """
    try:
        see = CLIPVisionModelWithProjection.from_pretrained(vision, dtype=torch.float32, local_files_only=True).eval()
        read = CLIPTextModelWithProjection.from_pretrained(text, dtype=torch.float32, local_files_only=True).eval()
        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        settings = json.loads((vision / "preprocessor_config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{vision.parent} is not a CLIP model: {str(error).splitlines()[0]}") from None
    size = (see.config.image_size,) * 2
    mean, deviation = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))

    def embed_pictures(pictures: Tensor) -> Tensor:
        small = F.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return see(pixel_values=(small - mean) / deviation).image_embeds

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return read(**words(list(texts), padding="longest", truncation=True, return_tensors="pt")).text_embeds

    return embed_pictures, embed_texts


def load_pristine() -> Pristine:
    """NIQE's published model of pristine pictures, which is shipped."""
    return Pristine(**load_file(Path(models.__file__).parent / "niqe" / "pristine.safetensors"))


def settle(folder: Path, settings: dict[str, Any]) -> None:
    """Let a folder belong to one run's settings.

    Raises:
        UserError: it holds pictures made with others.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    before = json.loads(path.read_text())
    changed = [f"{key}: {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
    if changed:
        raise UserError(
            f"{folder} holds pictures made with other settings ({'; '.join(changed)}); choose another --out"
        )


def _drawn(joints: Tensor) -> Image:
    """One person from joint heat maps ``(18, h, w)``: the likeliest place of each joint that is likely at all."""
    likely, places = joints.flatten(1).sigmoid().max(1)
    height, width = joints.shape[1:]
    points = torch.stack([places % width, places // width], -1).double() + 0.5
    points[likely < 0.3] = torch.nan
    return draw_pose([points.numpy()], height, width)


def _round_trip(pipe: Pipeline) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def after(pictures: Tensor) -> Tensor:
        return pipe.decode(pipe.encode(pictures * 2 - 1), "pt")

    return after


def _hash(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]
