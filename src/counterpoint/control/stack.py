"""A stack of control branches: which of them run at a step, and how their features become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from diffusers import ControlNetModel
from jaxtyping import Float
from torch import Tensor

from counterpoint.control.keys import KeyValues, Lending, injecting_keys, keeping_keys
from counterpoint.control.lockstep import run_lockstep, walk
from counterpoint.types import Fusion, Latents, Moment, Residuals, UserError


@dataclass(frozen=True)
class Weight:
    """A control's strength over the schedule: linear between ``(progress, weight)`` knots, constant outside them.

    ``parse("0.8")`` is constant; ``parse("0:1,0.5:0.4")`` falls from 1 at the start to 0.4 halfway and stays there.
    """

    knots: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        places = [place for place, _ in self.knots]
        if not all(math.isfinite(value) for knot in self.knots for value in knot):
            raise UserError(f"a weight must be a finite number, got {self}")
        if any(not 0 <= place <= 1 for place in places) or places != sorted(set(places)):
            raise UserError(f"the places of a weight schedule must rise within 0..1, got {self}")

    @classmethod
    def parse(cls, text: str | float) -> Weight:
        """Read ``0.8`` or ``0:1,0.5:0.4``.

        Raises:
            UserError: it is neither.
        """
        try:
            pairs = [part.split(":") for part in str(text).split(",")]
            if len(pairs) == 1 and len(pairs[0]) == 1:
                return cls(((0.0, float(pairs[0][0])),))
            return cls(tuple((float(place), float(weight)) for place, weight in pairs))
        except UserError:
            raise
        except ValueError:
            raise UserError(
                f"a weight is a number such as 0.8 or a schedule such as 0:1,0.5:0.4, got {text!r}"
            ) from None

    def at(self, progress: float) -> float:
        """The weight at a share of the steps, 0..1."""
        (before, value), *rest = self.knots
        for place, weight in rest:
            if progress < place:
                return (
                    value if progress <= before else value + (weight - value) * (progress - before) / (place - before)
                )
            before, value = place, weight
        return value

    def __str__(self) -> str:
        if len(self.knots) == 1 and self.knots[0][0] == 0:
            return f"{self.knots[0][1]:g}"
        return ",".join(f"{place:g}:{weight:g}" for place, weight in self.knots)


@dataclass(frozen=True, eq=False)
class Branch:
    """One control: a network, the hint it reads and when it speaks.

    Attributes:
        name: how messages and reports call it.
        network: a diffusers ControlNet.
        hint: condition images in 0..1, one a row of the latents that the host sees, in the network's dtype.
        weight: conditioning scale over the schedule.
        window: part of the schedule, as ``(start, end)`` in 0..1, outside which the branch is not run.
        region: how strongly it speaks where, in 0..1, one a row of the latents and at any resolution; ``None`` is
            everywhere.
        decay: what a site's residual loses for every site that is deeper.
    """

    name: str
    network: ControlNetModel
    hint: Float[Tensor, "b 3 _ _"]
    weight: Weight = Weight(((0.0, 1.0),))
    window: tuple[float, float] = (0.0, 1.0)
    region: Float[Tensor, "b 1 _ _"] | None = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        start, end = self.window
        if not 0 <= start < end <= 1:
            raise UserError(
                f"the window of {self.name} must be START:END with 0 <= START < END <= 1, got {start:g}:{end:g}"
            )

    def shaped(self, residuals: Residuals) -> Residuals:
        """Residuals as ``region`` and ``decay`` have them."""
        sites = [*residuals.down, residuals.mid]
        if self.decay != 1:
            sites = [site * self.decay ** (len(sites) - 1 - depth) for depth, site in enumerate(sites)]
        if self.region is not None:
            sites = [site * area(self.region, site.shape[2:]).to(site.dtype) for site in sites]
        return Residuals(tuple(sites[:-1]), sites[-1])

    def scale(self, moment: Moment) -> float:
        """The conditioning scale at a step; 0 means the branch is not run."""
        return self.weight.at(moment.progress) if moment.inside(self.window) else 0.0


def area(region: Float[Tensor, "b 1 _ _"], size: Sequence[int]) -> Float[Tensor, "b 1 _ _"]:
    """A region at the size of a site: each place takes the mean of what it covers."""
    return torch.nn.functional.interpolate(region, size=tuple(size), mode="area")


def run_stack(
    branches: Sequence[Branch],
    fusion: Fusion,
    latents: Latents,
    moment: Moment,
    text: Float[Tensor, "b t d"],
    lending: Lending | None = None,
) -> Residuals | None:
    """Run the branches that are active at this step and fuse what they say.

    Args:
        branches: in the user's order.
        fusion: the rule.
        latents: as the host sees them: with classifier-free guidance both halves, unconditional first.
        moment: the step.
        text: prompt embeddings, one a row of ``latents``.
        lending: KV-injection, idle at steps where no foreground or no background is active.

    Returns:
        One residual a site, or ``None`` if no branch is active.
    """
    active = [branch for branch in branches if branch.scale(moment) != 0]
    if not active:
        return None
    subjects = lending.masks if lending is not None and fusion.keys and lending.active(moment) else {}
    front = [branch for branch in active if branch.name in subjects]
    if lending is None or len(front) in {0, len(active)}:
        said = _run(active, fusion, latents, moment, text, lambda _: nullcontext())
    else:  # foregrounds first: the others listen to what they leave
        masks = torch.stack([subjects[branch.name] for branch in front])
        masks = masks.repeat(1, len(latents) // masks.shape[1], 1, 1, 1)
        kept: dict[Branch, KeyValues] = {branch: {} for branch in front}

        def listening(branch: Branch) -> AbstractContextManager[None]:
            if branch in kept:
                return keeping_keys(branch.network, kept[branch], lending.first)
            return injecting_keys(branch.network, list(kept.values()), masks, lending.first)

        order = sorted(active, key=lambda branch: branch not in kept)
        said = _run(order, fusion, latents, moment, text, listening)
    results = [branch.shaped(said[branch]) for branch in active]
    down = tuple(
        fusion.at(f"down.{number}")(torch.stack(site))
        for number, site in enumerate(zip(*[one.down for one in results], strict=True))
    )
    return Residuals(down, fusion.at("mid", last=True)(torch.stack([one.mid for one in results])))


def _run(
    branches: Sequence[Branch],
    fusion: Fusion,
    latents: Latents,
    moment: Moment,
    text: Tensor,
    around: Callable[[Branch], AbstractContextManager[None]],
) -> dict[Branch, Residuals]:
    """What each branch says, run one after the other, or side by side where the rule lets them exchange."""
    said = {}
    if fusion.exchange is None:
        for branch in branches:
            with around(branch):
                down, mid = branch.network(
                    latents,
                    moment.timestep,
                    text,
                    branch.hint,
                    conditioning_scale=branch.scale(moment),
                    return_dict=False,
                )
            said[branch] = Residuals(tuple(down), mid)
        return said
    with ExitStack() as stack:
        for branch in branches:
            stack.enter_context(around(branch))
        walks = [
            walk(branch.network, latents, moment.timestep, text, branch.hint, branch.scale(moment))
            for branch in branches
        ]
        results = run_lockstep(walks, fusion.exchange, skips=fusion.exchange_skips)
    return dict(zip(branches, results, strict=True))
