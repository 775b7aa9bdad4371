"""The vocabulary every room shares: errors, tensor shapes, kinds of control, and the interfaces between rooms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Image = UInt8[np.ndarray, "_ _ 3"]
"""RGB, 0..255, height by width by 3."""
Box = tuple[float, float, float, float]
"""``x0, y0, x1, y1`` as shares of the picture, in 0..1."""
Latents = Float[Tensor, "b c h w"]
Features = Float[Tensor, "n b ..."]
"""The features of n branches at one site."""

DEFAULT_FUSION = "pix+channel"
"""What joins controls where nothing else is asked for: what ``cross`` is without a subject."""


class Notice(UserWarning):
    """What users should know of their pictures; the edges show it as a line."""


class UserError(ValueError):
    """A mistake that the user can mend. The message says in one line what is wrong and what to do."""


@dataclass(frozen=True)
class ControlKind:
    """What an image of this kind of control means.

    Attributes:
        name: the name users type.
        summary: one line for help and menus.
        silent: the grey value that means "no control here", or ``None`` if every value means something.
        resample: how its images are resized: ``"smooth"``, or ``"nearest"`` where colours are labels.
        colour_order: ``"grey"`` where the three channels are equal, or ``"rgb"``.
        value_range: of a channel.
        resolution: shorter side in pixels for which the published ControlNets were trained.
        differentiable: where the module is that reads it from pictures with gradients, if training needs one.
    """

    name: str
    summary: str
    silent: int | None
    resample: Literal["smooth", "nearest"] = "smooth"
    colour_order: Literal["grey", "rgb"] = "grey"
    value_range: tuple[int, int] = (0, 255)
    resolution: int = 512
    differentiable: str | None = None


_EDGES, _JUDGE = "counterpoint.models.edge_networks", "counterpoint.models.perception.PerceptionModel"
CONTROL_KINDS = {
    kind.name: kind
    for kind in (
        ControlKind(
            "canny",
            "binary edges, white on black",
            0,
            differentiable="counterpoint.models.drawn.DrawnEdges",
        ),
        ControlKind("hed", "soft edges, white on black", 0, differentiable=f"{_EDGES}.HedNetwork"),
        ControlKind("lineart", "drawn lines, white on black", 0, differentiable=f"{_EDGES}.LineNetwork"),
        ControlKind("pose", "OpenPose body in its eighteen colours, on black", 0, colour_order="rgb"),
        ControlKind("depth", "relative inverse depth, near is bright", None, differentiable=_JUDGE),
        ControlKind("seg", "segmentation in the ADE20K palette", None, "nearest", "rgb", differentiable=_JUDGE),
        ControlKind(
            "normal",
            "surface normals: left is red, up is green, towards the viewer blue",
            None,
            colour_order="rgb",
        ),
        ControlKind("mlsd", "straight lines, white on black", 0),
        ControlKind("scribble", "thick strokes, white on black", 0),
        ControlKind("tile", "the picture without its detail", None, colour_order="rgb"),
        ControlKind("sam", "segments, each in a colour of its own", None, "nearest", "rgb"),
    )
}
"""Every kind of control. Its images are RGB, 0..255, and networks read them as 0..1."""
_OWN = ControlKind("own", "what only its network knows", None, colour_order="rgb")


def known_kind(name: str) -> str:
    """The name, if it is a kind of control.

    Raises:
        UserError: it is none.
    """
    if name not in CONTROL_KINDS:
        raise UserError(f"unknown control {name!r}; there are {', '.join(CONTROL_KINDS)}")
    return name


def kind_of(label: str) -> str:
    """The kind of a control, of its label: ``kind``, or ``kind:name`` for a second of the kind."""
    return label.partition(":")[0]


def meaning(label: str) -> ControlKind:
    """What the images of a control mean, of its label; of a kind that is no known one, nothing is known."""
    return CONTROL_KINDS.get(kind_of(label), _OWN)


def check_label(label: str) -> None:
    """Hold a control's label against ``kind`` or ``kind:name``: folders are named by it.

    Raises:
        UserError: it is neither.
    """
    if not re.fullmatch(r"[\w-]+(:[\w .-]+)?", label):
        raise UserError(f"a control is called kind or kind:name, in letters, digits, dots and dashes, got {label!r}")


class Residuals(NamedTuple):
    """What one branch, or several fused, hands to the host: one feature per site."""

    down: tuple[Float[Tensor, "b _ _ _"], ...]
    mid: Float[Tensor, "b _ _ _"]


Combine = Callable[[Features], Tensor]
"""``(n b ...) -> (b ...)``: several branches' features become one."""
Inject = Callable[[Tensor, Tensor], Tensor]
"""``(host feature, control) -> (b ...)``: how the host takes the control in."""
Exchange = Callable[[Features], Features]
"""``(n b ...) -> (n b ...)``: what branches tell each other while they run."""


@dataclass(frozen=True)
class Keys:
    """From when and where on a foreground branch lends its keys and values to the others (KV-injection).

    Attributes:
        start: share of the steps, in 0..1, after which they are lent (5 of 50 in the paper).
        layer: first self-attention layer that takes part.
        sigma: noise above which they are not lent yet, so that samplers of few steps behave alike (ours).
    """

    start: float = 0.1
    layer: int = 0
    sigma: float = math.inf

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise UserError(f"keys are lent below a positive sigma, got {self.sigma:g}")
        if not (0 <= self.start < 1 and self.layer >= 0):
            raise UserError(
                f"keys are lent from a share of the steps in 0..1 and a layer from 0 on, got {self.start:g} and "
                f"{self.layer}"
            )


@dataclass(frozen=True)
class Fusion:
    """A rule for several controls: up to three call shapes, every one a pure function of tensors.

    Attributes:
        name: the name users type.
        summary: one line for help and menus.
        combine: at every site. With one branch it is the identity.
        sites: exceptions by site: ``"mid"``, ``"down.3"``, or ``"last"`` for the last one whatever its name.
        inject: into the host; the default adds.
        exchange: between the branches; ``None`` leaves them alone.
        exchange_skips: whether the residuals of each block are exchanged too, or its running feature only.
        keys: KV-injection, if it is part of the rule.
        cite: keys of the papers to cite.
        stages: other rules for parts of the schedule: ``(share of the steps from which on, rule)``, rising.
    """

    name: str
    summary: str
    combine: Combine
    sites: Mapping[str, Combine] = field(default_factory=dict)
    inject: Inject = torch.add
    exchange: Exchange | None = None
    exchange_skips: bool = True
    keys: Keys | None = None
    cite: tuple[str, ...] = ()
    stages: tuple[tuple[float, Fusion], ...] = ()

    @property
    def rules(self) -> tuple[Fusion, ...]:
        """The rules of its stages, or itself alone."""
        return tuple(rule for _, rule in self.stages) or (self,)

    @property
    def injects(self) -> bool:
        """Whether any of the rules takes controls in by more than a sum."""
        return any(rule.inject is not torch.add for rule in self.rules)

    @property
    def walks(self) -> bool:
        """Whether any of its rules runs all branches side by side, for them to exchange."""
        return any(rule.exchange is not None for rule in self.rules)

    def during(self, progress: float) -> Fusion:
        """The rule that holds after a share of the steps."""
        return next((rule for start, rule in reversed(self.stages) if progress >= start), self)

    def at(self, site: str, last: bool = False) -> Combine:
        """What combines the branches at a site."""
        return self.sites.get(site) or (self.sites.get("last") if last else None) or self.combine


@dataclass(frozen=True)
class Moment:
    """Where sampling stands: 0-based step ``index`` of ``total``, the scheduler's ``timestep``, ``sigma``, how much
    noise there is for each part of signal, and ``number``, the timestep as a plain one, where these are known."""

    index: int
    total: int
    timestep: Tensor
    sigma: float = 0.0
    number: float | None = None

    @property
    def time(self) -> float:
        """The timestep as a plain number; where that is not known, an accelerator is waited for."""
        return float(self.timestep) if self.number is None else self.number

    @property
    def progress(self) -> float:
        """Share of the steps that lie behind, in [0, 1)."""
        return self.index / self.total

    def inside(self, window: tuple[float, float]) -> bool:
        """Whether this step lies wholly inside a window of the schedule (diffusers' ``control_guidance_start/end``)."""
        return not (self.index / self.total < window[0] or (self.index + 1) / self.total > window[1])


Batch = Mapping[str, Any]
"""Stacked fields of a data set's samples."""


@runtime_checkable
class Samples(Protocol):
    """A data set with random access by lists of positions."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at ``indices``, stacked."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """Anything that predicts the noise in latents, guidance included."""

    def __call__(self, latents: Latents, moment: Moment) -> Latents:
        """``latents`` as the scheduler scaled them for this step."""
        ...
