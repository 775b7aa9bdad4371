"""How good the tiny family is: its codec, its judge, its obedience to prompts and to each control.

A control's *adherence* is where its reading lies between a floor (the picture made from the prompt alone) and a
ceiling (the real scene after the codec's round trip): 0 is ignored, 1 is as good as the codec allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.scenes.caption import caption
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.reading import background, main_thing
from counterpoint.data.scenes.render import SPLITS, Scene, scene
from counterpoint.data.scenes.vocabulary import SEG_CLASSES, SEG_INDEX
from counterpoint.evaluation.suite import CHUNK, KINDS, Finished, Method, Readers, Row, Task, stack
from counterpoint.metrics.coco_mig import RANGES, has_colour
from counterpoint.metrics.maps import depth_rmse, mask_iou, miou, overlap
from counterpoint.metrics.metric import Metric, Reduce, mean
from counterpoint.metrics.similarity import psnr, ssim

_CASE = "test scenes"


@dataclass(frozen=True)
class TinyQuality:
    """The suite, on scenes of ``split``; ``round_trip`` encodes and decodes pictures ``(b, 3, h, w)`` in 0..1 with the
    family's codec; ``kinds`` are the family's controls, of :data:`KINDS`."""

    round_trip: Callable[[Tensor], Tensor]
    split: str = "test"
    kinds: Sequence[str] = KINDS

    def tasks(self, n: int, _: Sequence[Method] = ()) -> list[Task]:
        """``n`` prompts for one thing; for each control ``n`` scenes' captions and maps; the captions alone."""
        made = [Task(f"prompt/{number}", prompt, number) for number, prompt in enumerate(one_thing_prompts(n))]
        controlled = {task.key: task for kind in self.kinds for task in self.controlled(n, kind)}
        return [*made, *controlled.values()]

    def controlled(self, n: int, kind: str) -> list[Task]:
        """``n`` scenes from their captions and one control, and from their captions alone."""
        made = []
        for one in self._scenes(kind, n):
            made.append(Task(f"{kind}/{one.number}", one.caption, one.number, {kind: control_map(one, kind)}))
            made.append(Task(f"floor/{one.number}", one.caption, one.number))
        return made

    def score(self, finished: Finished, n: int, _: Sequence[Method], readers: Readers) -> list[Row]:
        """Rows ``codec``, ``judge``, ``prompt`` and one a control."""
        quality = Metric("psnr", lambda after, before: psnr(after, before))
        trust = [Metric(name, rows, reduce, higher=higher) for name, rows, reduce, higher in _TRUST]
        for scenes in _chunks(self._scenes("seg", n)):
            real = stack([one.image for one in scenes])
            quality.update(self.round_trip(real), real)
            for metric in trust[:2]:
                metric.update(real, scenes, readers)
        for scenes in _chunks(self._scenes("pose", n)):
            trust[2].update(stack([one.image for one in scenes]), scenes, readers)
        return [
            Row("codec", _CASE, (quality,)),
            Row("judge", _CASE, tuple(trust)),
            Row("prompt", _CASE, _prompt(finished, n, readers)),
            *(Row(kind, _CASE, self.adherence(finished, n, kind, readers)) for kind in self.kinds),
        ]

    def adherence(self, finished: Finished, n: int, kind: str, readers: Readers) -> tuple[Metric, ...]:
        """``value``, ``floor``, ``ceiling`` and ``adherence`` of the pictures of :meth:`controlled`."""
        measure, reduce = _MEASURES[kind]
        rows = []
        for scenes in _chunks(self._scenes(kind, n)):
            sets = (
                stack([finished(f"{kind}/{one.number}") for one in scenes]),
                stack([finished(f"floor/{one.number}") for one in scenes]),
                self.round_trip(stack([one.image for one in scenes])),
            )
            rows.append(torch.stack([measure(pictures, scenes, readers) for pictures in sets], 1))

        def adherence(drawn: Tensor) -> float:
            """Scenes are drawn with all three of their readings."""
            value, floor, ceiling = (reduce(part) for part in drawn.unbind(1))
            return (value - floor) / (ceiling - floor) if ceiling != floor else float("nan")

        higher = kind != "depth"
        metrics = [
            Metric(name, lambda part, place=place: part[:, place], reduce, higher=higher)
            for place, name in enumerate(("value", "floor", "ceiling"))
        ]
        metrics.append(Metric("adherence", lambda part: part, adherence))
        for metric in metrics:
            metric.update(torch.cat(rows))
        return tuple(metrics)

    def _scenes(self, kind: str, n: int) -> Iterator[Scene]:
        """The first ``n`` scenes of the split; for poses, the first that show a person."""
        every = (scene(SPLITS[self.split].start + number) for number in count())
        return islice((one for one in every if kind != "pose" or one.person_mask.any()), n)


Measure = Callable[[Tensor, Sequence[Scene], Readers], Tensor]
"""``(pictures, scenes, readers) -> (b, ...)``."""


def _depth(pictures: Tensor, scenes: Sequence[Scene], readers: Readers) -> Tensor:
    wanted = torch.from_numpy(np.stack([one.depth for one in scenes])).float()
    return depth_rmse(readers.maps["depth"](pictures)[:, 0], wanted)


def _seg(pictures: Tensor, scenes: Sequence[Scene], readers: Readers) -> Tensor:
    wanted = torch.from_numpy(np.stack([one.seg for one in scenes])).long()
    return overlap(readers.classes(pictures), wanted, len(SEG_CLASSES))


def _pose(pictures: Tensor, scenes: Sequence[Scene], readers: Readers) -> Tensor:
    return mask_iou(readers.person(pictures), torch.from_numpy(np.stack([one.person_mask for one in scenes])))


def _edges(kind: str) -> Measure:
    def measure(pictures: Tensor, scenes: Sequence[Scene], readers: Readers) -> Tensor:
        wanted = stack([control_map(one, kind) for one in scenes])[:, :1]
        return ssim(readers.maps[kind](pictures)[:, :1], wanted)

    return measure


_MEASURES: dict[str, tuple[Measure, Reduce]] = {
    "canny": (_edges("canny"), mean),
    "hed": (_edges("hed"), mean),
    "lineart": (_edges("lineart"), mean),
    "depth": (_depth, mean),
    "pose": (_pose, mean),
    "seg": (_seg, miou),
}
_TRUST = (("miou", _seg, miou, True), ("depth_rmse", _depth, mean, False), ("person_iou", _pose, mean, True))
"""How well the judge reads real scenes; people on scenes that show one."""


def _prompt(finished: Finished, n: int, readers: Readers) -> tuple[Metric, ...]:
    """Shares of pictures in which the judge finds what the prompt names; a colour counts on the thing it names."""
    metrics = [
        Metric(name, lambda hits, place=place: hits[:, place])
        for place, name in enumerate(("background", "object", "colour"))
    ]
    for start in range(0, n, CHUNK):
        numbers = range(start, min(start + CHUNK, n))
        images = [finished(f"prompt/{number}") for number in numbers]
        hits = []
        for number, image, seg in zip(numbers, images, readers.classes(stack(images)).numpy(), strict=True):
            one = _one_thing(number)
            (thing,) = one.instances
            coloured = has_colour(image, seg == SEG_INDEX[thing.name], RANGES[thing.colour])
            hits.append((background(seg) == one.layout.background, main_thing(seg) == thing.name, coloured))
        for metric in metrics:
            metric.update(torch.tensor(hits))
    return tuple(metrics)


def one_thing_prompts(n: int) -> list[str]:
    """The prompts of the row ``prompt``: each names one thing, its colour and where it is."""
    return [caption(_one_thing(number).layout, "brief") for number in range(n)]


def _one_thing(number: int) -> Scene:
    return scene(SPLITS["test"].start + number, content="thing", style="photo")


def _chunks(scenes: Iterator[Scene]) -> Iterator[list[Scene]]:
    while chunk := list(islice(scenes, CHUNK)):
        yield chunk
