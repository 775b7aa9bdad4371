"""Suites with the models that they need, and the folder in which a run's results lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.api import load
from counterpoint.apps.readers import family_readers, of_one, user_readers
from counterpoint.apps.record import write_json
from counterpoint.data import pairs
from counterpoint.data.published import SETS, PublishedCases
from counterpoint.evaluation.suite import Readers, Suite, Task, stack
from counterpoint.evaluation.suites import fusion
from counterpoint.evaluation.suites.tiny_quality import CONTROLS, TinyQuality
from counterpoint.fusion import get_fusion
from counterpoint.models.load import locate
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import Image, UserError


@dataclass(frozen=True, eq=False)
class Bench:
    """What a suite runs on.

    Attributes:
        pipe: the model.
        readers: what looks at its pictures.
        cases: what they are of.
        identity: what two runs must have in common to be one: hashes of weights, folders of data.
    """

    pipe: Pipeline
    readers: Readers
    cases: fusion.Cases
    identity: dict[str, str]


SUITES: dict[str, Callable[[Bench], Suite]] = {
    "conflicting": lambda bench: fusion.conflicting(bench.cases).only(bench.pipe.controls),
    "complementary": lambda bench: fusion.complementary(bench.cases).only(bench.pipe.controls),
    "silent": lambda bench: fusion.silent(bench.cases).only(bench.pipe.controls),
    "single": lambda bench: fusion.single(bench.cases).only(bench.pipe.controls),
    "tiny-quality": lambda bench: _tiny_quality(bench),
}
"""Name -> suite on a bench; sorts of cases whose controls the model lacks are left out."""


class PipelineMaker:
    """Makes the pictures of tasks with one model; each picture has its own generator, so batches do not matter."""

    def __init__(self, pipe: Pipeline, steps: int, guidance_scale: float) -> None:
        self.pipe, self.steps, self.guidance_scale = pipe, steps, guidance_scale

    def __call__(self, tasks: Sequence[Task]) -> list[Image]:
        """One picture a task; all have the same controls, method and subject."""
        method, labels, subject = tasks[0].method, list(tasks[0].images), tasks[0].subject
        rule = get_fusion(method.fusion)
        lends = rule.keys and subject != ""
        pipe = replace(self.pipe, controls={label: self.pipe.controls[label] for label in labels})
        output = pipe(
            [task.prompt for task in tasks],
            [stack([task.images[label] for task in tasks]) for label in labels],
            fusion=replace(rule, keys=lends),
            subject=subject if lends else None,
            gate_silence=method.gated,
            controlnet_conditioning_scale=[method.weights.get(label, 1.0) for label in labels],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(task.seed) for task in tasks],
            output_type="np",
        )
        return list(np.rint(output.images * 255).astype(np.uint8))


def family_bench(model: str) -> Bench:
    """A family with its own ControlNets, judge and towers, on procedural scenes.

    Raises:
        UserError: the folder lacks a part.
    """
    folder = locate(model)
    return Bench(load(model, CONTROLS), family_readers(folder), pairs, {"weights": _hash([folder])})


def published_bench(
    model: str, controls: Mapping[str, str], data: Mapping[str, Path], readers: Mapping[str, Path], clip: Path | None
) -> Bench:
    """Any model with ControlNets, on published photos.

    Args:
        model: as :func:`counterpoint.load` takes it.
        controls: kind -> ControlNet.
        data: published set -> its folder.
        readers: kind -> network that reads it from pictures, and from photos where no map was published.
        clip: a CLIP model.

    Raises:
        UserError: something is missing; the message names it.
    """
    if unknown := sorted(set(data) - set(SETS)):
        raise UserError(f"unknown data set {unknown[0]!r}; there are {', '.join(SETS)}")
    if clip is None or not controls:
        raise UserError("published photos need --controlnet KIND=FOLDER, once a control, and --clip FOLDER")
    pipe, looks = load(model, controls), user_readers(readers, clip)
    size = pipe.native_size

    extract = {kind: of_one(looks.maps[kind]) for kind in ("canny", "hed", "depth", "seg")}
    cases = PublishedCases({name: SETS[name](folder, size) for name, folder in data.items()}, extract)
    weights = _hash([locate(source) for source in (model, *controls.values())])
    return Bench(pipe, looks, cases, {"weights": weights, **{name: str(folder) for name, folder in data.items()}})


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


def _tiny_quality(bench: Bench) -> Suite:
    if bench.cases is not pairs:
        raise UserError("tiny-quality measures the tiny family on its own scenes; it takes no --data")
    return TinyQuality(_round_trip(bench.pipe))


def _round_trip(pipe: Pipeline) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def after(pictures: Tensor) -> Tensor:
        return pipe.decode(pipe.encode(pictures * 2 - 1), "pt")

    return after


def _hash(places: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
