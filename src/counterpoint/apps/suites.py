"""Suites with the models that they need, and the folder in which a run's results lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.api import load
from counterpoint.apps.record import write_json
from counterpoint.evaluation.suite import Pictures, Row, Task
from counterpoint.evaluation.suites import tiny_quality
from counterpoint.models.load import TINY, load_diffusers
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import Image, UserError


class PipelineMaker:
    """Makes the pictures of tasks with one model; each picture has its own generator, so batches do not matter."""

    def __init__(self, pipe: Pipeline, steps: int, guidance_scale: float) -> None:
        self.pipe, self.steps, self.guidance_scale = pipe, steps, guidance_scale

    def __call__(self, tasks: Sequence[Task]) -> list[Image]:
        """One picture a task; all have the same controls and fusion."""
        labels = list(tasks[0].images)
        pipe = replace(self.pipe, controls={label: self.pipe.controls[label] for label in labels})
        hints = [_tensor([task.images[label] for task in tasks]) for label in labels]
        output = pipe(
            [task.prompt for task in tasks],
            hints,
            fusion=tasks[0].fusion,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(task.seed) for task in tasks],
            output_type="np",
        )
        return list(np.rint(output.images * 255).astype(np.uint8))


class TinyQuality:
    """:mod:`counterpoint.evaluation.suites.tiny_quality` on a family's folder."""

    def __init__(self, model: str, steps: int, guidance_scale: float) -> None:
        folder = TINY if model == "tiny" else Path(model)
        pipe = load(model, tiny_quality.CONTROLS)
        self.make = PipelineMaker(pipe, steps, guidance_scale)
        self.judge = load_diffusers(folder / "judges" / "a").eval()
        self.vae, self.factor = pipe.vae, pipe.vae.config.scaling_factor
        self.model_hash = _hash(folder)
        self.tasks = tiny_quality.tasks

    def score(self, pictures: Pictures, n: int) -> list[Row]:
        """The table."""
        return tiny_quality.score(pictures, n, self._round_trip, self.judge)

    def _round_trip(self, pictures: Tensor) -> Tensor:
        decoded: Tensor = self.vae.decode(self.vae.encode(pictures * 2 - 1).latents).sample
        return (decoded / 2 + 0.5).clamp(0, 1)


SUITES = {"tiny-quality": TinyQuality}
"""Name -> what runs it."""


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


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text: one line a measure, ``mean [low, high]``."""
    lines = [
        (row.name, row.case, name, f"{value.mean:.3f}", f"[{value.low:.3f}, {value.high:.3f}]")
        for row in rows
        for name, value in row.metrics.items()
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _tensor(images: Sequence[Image]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)


def _hash(folder: Path) -> str:
    """One hash of a model's weights."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]
