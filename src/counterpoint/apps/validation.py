"""What a training run is measured by while it goes on."""

from __future__ import annotations

from pathlib import Path

import torch

from counterpoint.api import load
from counterpoint.apps.readers import family_readers
from counterpoint.apps.suites import PipelineMaker, round_trip
from counterpoint.evaluation.suites.tiny_quality import CONTROLS, TinyQuality
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.trainer import Validate
from counterpoint.types import Image

SCENES = 16
STEPS = 20


def adherence(stage: ControlNetStage, family: Path) -> Validate | None:
    """How closely a ControlNet follows its control on validation scenes, as ``evaluate tiny-quality`` has it.

    Returns:
        ``None`` if the family has no judge, or none that reads this control.
    """
    kind = stage.field.removeprefix("control:")
    if kind not in CONTROLS or not (family / "judges" / "a").is_dir():
        return None
    pipe, readers = load(str(family)), family_readers(family)
    suite = TinyQuality(round_trip(pipe), "validation")
    tasks = suite.controlled(SCENES, kind)
    finished: dict[str, Image] = {}

    def make(name: str) -> None:
        wanted = [task for task in tasks if task.key.startswith(name)]
        pictures = PipelineMaker(pipe, STEPS, None)(wanted)
        finished.update(zip((task.key for task in wanted), pictures, strict=True))

    @torch.no_grad()
    def validate() -> dict[str, float]:
        pipe.controls[kind] = stage.merged().eval()  # never the compiled one
        if not finished:
            make("floor/")
        make(f"{kind}/")
        metrics = suite.adherence(finished.__getitem__, SCENES, kind, readers)
        return {metric.name: metric.compute() for metric in metrics if metric.name in {"value", "adherence"}}

    return validate
