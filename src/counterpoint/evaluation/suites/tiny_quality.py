"""How good the tiny family is: its codec, its obedience to prompts and to each control, and its judge.

A control's *adherence* is where its reading lies between a floor (the picture made from the prompt alone) and a
ceiling (the real scene after the codec's round trip): 0 is ignored, 1 is as good as the codec allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor

from counterpoint.conditions.canny import canny
from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.data.scenes.caption import caption
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.reading import background, main_thing
from counterpoint.data.scenes.render import SPLITS, Scene, scene
from counterpoint.data.scenes.vocabulary import PERSON, SEG_CLASSES
from counterpoint.evaluation.statistics import Interval, bootstrap
from counterpoint.evaluation.suite import Pictures, Row, Task
from counterpoint.metrics.coco_mig import COLOURS, has_colour
from counterpoint.metrics.maps import depth_rmse, mask_iou, miou, overlap
from counterpoint.metrics.metric import Reduce, mean
from counterpoint.metrics.similarity import psnr, ssim
from counterpoint.models.perception import PerceptionModel, Reading
from counterpoint.types import Image

Codec = Callable[[Tensor], Tensor]
"""``(b, 3, h, w)`` in 0..1 -> the same after encoding and decoding."""
_RANGES = {**COLOURS, "purple": (((129, 50, 70), (158, 255, 255)),)}
"""COCO-MIG's colours, and purple between its blue and its red."""
CONTROLS = ("canny", "hed", "depth", "pose", "seg")


def tasks(n: int) -> list[Task]:
    """For each control, ``n`` test scenes' captions and maps; the captions alone; and ``n`` prompts for one thing."""
    made = [_prompt_task(number) for number in range(n)]
    alone: dict[int, Task] = {}
    for kind in CONTROLS:
        for one in _scenes(kind, n):
            alone.setdefault(one.number, Task(f"floor/{one.number}", one.caption, one.number))
            images = {kind: control_map(one, kind)}
            made.append(Task(f"{kind}/{one.number}", one.caption, one.number, images))
    return [*made, *alone.values()]


def score(pictures: Pictures, n: int, codec: Codec, judge: PerceptionModel) -> list[Row]:
    """The table: rows ``codec``, ``judge``, ``prompt`` and one a control."""
    row = partial(Row, "tiny", case="test scenes")
    real = list(_scenes("seg", n))
    truth = _stack([one.image for one in real])
    after = _batched(codec, truth)
    rows = [row("codec", metrics={"psnr": bootstrap(psnr(after, truth))}), row("judge", metrics=_trust(judge, n))]
    rows.append(row("prompt", metrics=_prompt_metrics(pictures, n, judge)))
    for kind in CONTROLS:
        scenes = list(_scenes(kind, n))
        sets = (
            _stack([pictures(f"{kind}/{one.number}") for one in scenes]),
            _stack([pictures(f"floor/{one.number}") for one in scenes]),
            _batched(codec, _stack([one.image for one in scenes])),
        )
        measure = _MEASURES[kind]
        seen = torch.stack([measure.of(judge, pictures, scenes) for pictures in sets], 1)
        rows.append(row(kind, metrics=_adherence(seen, measure.reduce)))
    return rows


@dataclass(frozen=True)
class _Measure:
    """``of(judge, pictures, scenes) -> (n, ...)`` and how its rows become a number."""

    of: Callable[[PerceptionModel, Tensor, Sequence[Scene]], Tensor]
    reduce: Reduce = mean


def _depth(judge: PerceptionModel, pictures: Tensor, scenes: Sequence[Scene]) -> Tensor:
    wanted = torch.from_numpy(np.stack([one.depth for one in scenes])).float()
    return depth_rmse(_read(judge, pictures).depth[:, 0], wanted)


def _seg(judge: PerceptionModel, pictures: Tensor, scenes: Sequence[Scene]) -> Tensor:
    wanted = torch.from_numpy(np.stack([one.seg for one in scenes]))
    return overlap(_read(judge, pictures).seg.argmax(1), wanted.long(), len(SEG_CLASSES))


def _pose(judge: PerceptionModel, pictures: Tensor, scenes: Sequence[Scene]) -> Tensor:
    wanted = torch.from_numpy(np.stack([one.person_mask for one in scenes]))
    return mask_iou(_read(judge, pictures).seg.argmax(1) == PERSON, wanted)


def _edges(extract: Callable[[Image], Image], _: PerceptionModel, pictures: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Structural similarity of the edges found in a picture and those found in the scene; the judge has no say."""
    found = _stack([extract(image) for image in _images(pictures)])[:, :1]
    return ssim(found, _stack([extract(one.image) for one in scenes])[:, :1])


_MEASURES = {
    "depth": _Measure(_depth),
    "seg": _Measure(_seg, miou),
    "pose": _Measure(_pose),
    "canny": _Measure(partial(_edges, canny)),
    "hed": _Measure(partial(_edges, soft_edge)),
}


def _adherence(rows: Tensor, reduce: Reduce) -> dict[str, Interval]:
    """``(n, 3, ...)`` rows of value, floor and ceiling -> the four numbers; scenes are resampled together."""

    def adherence(drawn: Tensor) -> float:
        value, floor, ceiling = (reduce(part) for part in drawn.unbind(1))
        return (value - floor) / (ceiling - floor)

    parts = zip(("value", "floor", "ceiling"), rows.unbind(1), strict=True)
    return {name: bootstrap(part, reduce) for name, part in parts} | {"adherence": bootstrap(rows, adherence)}


def _trust(judge: PerceptionModel, n: int) -> dict[str, Interval]:
    """The judge's own readings of real scenes against the truth."""
    names = {"seg": "miou", "pose": "person_iou", "depth": "depth_rmse"}
    metrics = {}
    for kind, name in names.items():
        scenes = list(_scenes(kind, n))
        rows = _MEASURES[kind].of(judge, _stack([one.image for one in scenes]), scenes)
        metrics[name] = bootstrap(rows, _MEASURES[kind].reduce)
    return metrics


def _prompt_task(number: int) -> Task:
    return Task(f"prompt/{number}", caption(_one_thing(number).layout, "brief"), number)


def _prompt_metrics(pictures: Pictures, n: int, judge: PerceptionModel) -> dict[str, Interval]:
    """Shares of pictures in which the judge finds what the prompt names; a colour counts on the thing it names."""
    scenes = [_one_thing(number) for number in range(n)]
    images = [pictures(f"prompt/{number}") for number in range(n)]
    classes = _read(judge, _stack(images)).seg.argmax(1).numpy()
    found = {"background": [], "object": [], "colour": []}
    for one, image, seg in zip(scenes, images, classes, strict=True):
        (thing,) = one.instances
        mask = seg == list(SEG_CLASSES).index(thing.name)
        found["background"].append(background(seg) == one.layout.background)
        found["object"].append(main_thing(seg) == thing.name)
        found["colour"].append(has_colour(image, mask, _RANGES[thing.colour]))
    return {name: bootstrap(torch.tensor(hits, dtype=torch.float64)) for name, hits in found.items()}


def _one_thing(number: int) -> Scene:
    return scene(SPLITS["test"].start + number, content="thing", style="photo")


def _scenes(kind: str, n: int) -> Iterator[Scene]:
    """The first ``n`` test scenes; for poses, the first that show a person."""
    every = (scene(SPLITS["test"].start + number) for number in count())
    return islice((one for one in every if kind != "pose" or one.person_mask.any()), n)


def _stack(images: Sequence[Image]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)


def _images(pictures: Tensor) -> np.ndarray:
    return pictures.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def _read(judge: PerceptionModel, pictures: Tensor) -> Reading:
    parts = [judge(part * 2 - 1) for part in pictures.split(32)]
    return Reading(*[torch.cat(field) for field in zip(*parts, strict=True)])


@torch.no_grad()
def _batched(codec: Codec, pictures: Tensor) -> Tensor:
    return torch.cat([codec(part) for part in pictures.split(32)])
