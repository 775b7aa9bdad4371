"""What a suite is: pictures to make with several methods, and how they are scored."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.conditions.layout import Layout
from counterpoint.evaluation.statistics import Resampled, resample
from counterpoint.metrics.metric import Metric
from counterpoint.metrics.niqe import Pristine
from counterpoint.types import Box, Image

Pictures = Float[Tensor, "b 3 h w"]
"""Values in 0..1."""
Names = Sequence[Sequence[str]]
"""For each picture the names of things."""
Detect = Callable[[Tensor, Names], list[list[list[Box]]]]
"""Pictures and names of things for each -> for each picture and name the boxes, 0..1, in which one is seen."""
Segment = Callable[[Tensor, Names, Sequence[Sequence[Box]]], list[list[np.ndarray]]]
"""Pictures, names and boxes -> for each picture and box the pixels ``(h, w)`` bool of the
thing in it."""
KINDS = ("canny", "hed", "lineart", "depth", "pose", "seg")
"""Kinds of control that can be read back and measured."""
REFERENCE = "reference"
"""What a layout's reference picture is called among a method's weights."""
CHUNK = 32
"""Pictures scored at a time."""


@dataclass(frozen=True)
class Method:
    """A way to join controls: a rule by name, weights by label where they are not 1, whether silence is gated, what is
    foretold, by label how far every step is pushed towards what a probe reads, and the folders of networks in place of
    the model's; or models by name that read a layout, how they are aggregated, and as the weight of :data:`REFERENCE`
    that of the layout's reference."""

    fusion: str = "sum"
    weights: Mapping[str, float] = field(default_factory=dict)
    gated: bool = False
    quality: str = "exact"
    steer: Mapping[str, float] = field(default_factory=dict)
    networks: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ()
    aggregation: str = ""

    @property
    def name(self) -> str:
        """The rule, then the rest: ``sum gated``, ``sum pose=0.5``, ``sum steered seg=0.05``, ``sum of FOLDER``;
        ``interact+migc steps=3``."""
        weights = [f"{label}={weight:g}" for label, weight in self.weights.items()]
        if self.models:
            return " ".join(["+".join(self.models), *[self.aggregation] * bool(self.aggregation), *weights])
        quality = [self.quality] * (self.quality != "exact")
        pushes = [f"{label}={share:g}" for label, share in self.steer.items()]
        own = "+".join(Path(place).name for _, place in self.networks)
        rest = [*quality, *weights, *["steered"] * bool(pushes), *pushes, *[f"of {own}"] * bool(own)]
        return " ".join([self.fusion, *["gated"] * self.gated, *rest])

    @property
    def concerns(self) -> frozenset[str]:
        """The kinds that have networks of its own, or a push; a case with none of them would not tell it apart."""
        return frozenset([kind for kind, _ in self.networks]).union(self.steer)

    @property
    def slug(self) -> str:
        """The name, for a folder."""
        return self.name.replace(" ", ",").replace(":", "_").replace("/", "_")


def weighed(layout: Layout, method: Method) -> Layout:
    """A layout whose reference has the weight that a method gives it.

    Raises:
        UserError: it is none.
    """
    if layout.reference is None or REFERENCE not in method.weights:
        return layout
    return replace(layout, reference=replace(layout.reference, weight=method.weights[REFERENCE]))


class Packed(Mapping[str, Image]):
    """Condition images in little memory: a suite at the papers' size has tens of thousands at a time."""

    def __init__(self, images: Mapping[str, Image]) -> None:
        self._packed = {label: (image.shape, zlib.compress(image.tobytes(), 1)) for label, image in images.items()}

    def __getitem__(self, label: str) -> Image:
        shape, packed = self._packed[label]
        return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


@dataclass(frozen=True, eq=False)
class Task:
    """One picture to make.

    Attributes:
        key: names it within its suite and becomes its file name.
        prompt: what it shows.
        seed: of its noise.
        images: label -> condition image.
        method: how the controls are joined.
        subject: the word of the prompt for what the first control shows, if there is one.
        layout: what stands where, for models that read it.
    """

    key: str
    prompt: str
    seed: int
    images: Mapping[str, Image] = field(default_factory=dict)
    method: Method = Method()
    subject: str = ""
    layout: Layout | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table: a method, control or part (``name``) on a pair, level or split (``case``).

    ``rival``: whether it competes with the other rows of its case, on the same samples and seeds. ``note``: what
    readers of the row must know.
    """

    name: str
    case: str
    metrics: tuple[Metric, ...]
    rival: bool = False
    note: str = ""

    @cached_property
    def resampled(self) -> tuple[Resampled, ...]:
        """Every metric with its samples drawn again, once for all readers of the table."""
        return tuple(resample(metric) for metric in self.metrics)


@dataclass(frozen=True, eq=False)
class Readers:
    """The networks that look at finished pictures; suites know none of them by name.

    Attributes:
        maps: kind -> what reads a control back: pictures to condition images, both ``(b, 3, h, w)`` in 0..1.
        person: pictures -> where people are, ``(b, h, w)`` bool.
        joints: pictures -> a person's joints ``(b, 18, 2)`` in pixels, x and y in OpenPose's order, ``nan`` where one
            is not known.
        classes: pictures -> class indices ``(b, h, w)``.
        classes_of: segmentation images -> class indices ``(b, h, w)``, -1 where unlabelled.
        embed_pictures: pictures -> CLIP embeddings ``(b, d)``.
        embed_texts: texts -> CLIP embeddings ``(b, d)``.
        pristine: NIQE's model.
        features: pictures -> what distances between sets stand on, ``(b, d)``.
        features_of: whose features they are: ``"inception"``, or what such a distance is called after.
        detect: finds named things.
        segment: cuts them out.
    """

    maps: Mapping[str, Callable[[Tensor], Tensor]]
    person: Callable[[Tensor], Tensor]
    joints: Callable[[Tensor], Tensor]
    classes: Callable[[Tensor], Tensor]
    classes_of: Callable[[Sequence[Image]], Tensor]
    embed_pictures: Callable[[Tensor], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor]
    pristine: Pristine
    features: Callable[[Tensor], Tensor]
    features_of: str
    detect: Detect
    segment: Segment


class Maker(Protocol):
    """Makes the pictures of tasks that have the same controls and method; knows the model."""

    def __call__(self, tasks: Sequence[Task]) -> list[Image]:
        """One picture a task, independent of the tasks beside it."""
        ...


Finished = Callable[[str], Image]
"""``key -> (h, w, 3)`` uint8: the finished picture of a task."""


class Suite(Protocol):
    """A benchmark."""

    def tasks(self, n: int, methods: Sequence[Method]) -> list[Task]:
        """Every picture it wants."""
        ...

    def score(self, finished: Finished, n: int, methods: Sequence[Method], readers: Readers) -> list[Row]:
        """Its table."""
        ...


def stack(images: Sequence[Image]) -> Pictures:
    """Pictures as a batch in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)


def unstack(pictures: Pictures) -> list[Image]:
    """The way back."""
    return list(pictures.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy())
