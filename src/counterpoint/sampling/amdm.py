"""Aggregation of Multi Diffusion Models (AMDM): in the first steps several denoisers share what they have found, then
the first one goes on alone.

"Aggregation of Multi Diffusion Models for Enhancing Learned Representations" (2024), section 3.3. The picture is the
first model's. Every model takes its own step, the steps are mixed (Eq. 9, Algorithm 2), and each model goes on from the
mixture pulled back towards its own mean (Eq. 10). Nothing is asked of a network that its own step did not ask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from counterpoint.sampling.loop import Settle, Step
from counterpoint.types import Denoiser, Latents, Moment, UserError

MIXES = ("paper", "unit", "slerp")
Many = Float[Tensor, "n b c h w"]


@dataclass(frozen=True)
class Aggregation:
    """How models are aggregated.

    Attributes:
        weights: one fewer than there are models, in 0..1: how much of what came before is kept when the next model is
            mixed in; one number is for all of them.
        steps: how many of the first steps are shared.
        mix: ``"paper"`` has Algorithm 2's coefficients, whose squares do not sum to 1 for more than two models;
            ``"unit"`` those that do; ``"slerp"`` turns along the arc between latents as they are, where the other two
            take them for orthogonal and make correlated ones longer.
        pull: how far each model is pulled back to its own mean, one for all or one each: a share of the way in 0..1,
            or with ``absolute`` a length in units of the latents, at most all the way.
        absolute: whether ``pull`` is a length, as in the paper.
        authors: their code instead: each model starts from its own noise, sharing begins with the second step, and the
            mean is that of the step before.
    """

    weights: tuple[float, ...] = (0.5,)
    steps: int = 3
    mix: str = "slerp"
    pull: tuple[float, ...] = (0.5,)
    absolute: bool = False
    authors: bool = False

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise UserError(f"unknown mix {self.mix!r}; there are {', '.join(MIXES)}")
        if not self.weights or any(not 0 <= weight <= 1 for weight in self.weights):
            raise UserError(f"weights of an aggregation lie in 0..1, got {_said(self.weights)}")
        if not self.pull or any(not (0 <= pull < math.inf and (self.absolute or pull <= 1)) for pull in self.pull):
            raise UserError(f"pulls are shares in 0..1, or lengths with absolute, got {_said(self.pull)}")
        if self.steps < 0:
            raise UserError(f"an aggregation shares at least 0 steps, got {self.steps}")

    @classmethod
    def parse(cls, text: str) -> Aggregation:
        """Read ``steps=3,weights=0.47:0.5,mix=paper,pull=45:40:35,absolute=true``; what is left out is the default.

        Raises:
            UserError: an unknown setting or a value that makes no sense.
        """
        given: dict[str, Any] = {}
        for part in text.split(",") if text else ():
            name, _, value = part.partition("=")
            if name not in _READ:
                raise UserError(f"unknown setting {name!r} of an aggregation; there are {', '.join(_READ)}")
            try:
                given[name] = _READ[name](value)
            except (ValueError, KeyError):
                raise UserError(f"{part}: an aggregation's {name} cannot be {value!r}") from None
        return cls(**given)

    def for_models(self, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Weights and pulls for a number of models.

        Raises:
            UserError: there are too few models, or another number of weights or pulls.
        """
        if count < 2:
            raise UserError(f"an aggregation wants at least two models, got {count}")
        return _each("weights", self.weights, count - 1), _each("pulls", self.pull, count)

    def shares(self, index: int) -> bool:
        """Whether a step, counted from 0, is shared."""
        return index < self.steps if not self.authors else 1 <= index <= self.steps


_READ: dict[str, Callable[[str], Any]] = {
    "weights": lambda text: tuple(float(one) for one in text.split(":")),
    "steps": int,
    "mix": str,
    "pull": lambda text: tuple(float(one) for one in text.split(":")),
    "absolute": {"true": True, "false": False}.__getitem__,
    "authors": {"true": True, "false": False}.__getitem__,
}
PAPER = {
    "interact+migc": Aggregation((0.5,), 3, "paper", (45.0, 55.0), absolute=True),
    "interact+ip": Aggregation((0.45,), 3, "paper", (45.0, 55.0), absolute=True),
    "interact+migc+ip": Aggregation((0.47, 0.5), 3, "paper", (45.0, 40.0, 35.0), absolute=True),
}
"""The paper's recipes (section 4), for latents of 4 x 64 x 64; the first takes 50 steps, the others 10."""


def coefficients(weights: Sequence[float], mix: str) -> tuple[float, ...]:
    """What each model's latents are multiplied by.

    ``"paper"``: ``c_k = prod_{j<k} sqrt(1 - w_j^2) prod_{j>=k} w_j`` (Algorithm 2). ``"unit"``: without the product
    over earlier models but the last of them, ``c_1 = prod w_j``, ``c_k = sqrt(1 - w_{k-1}^2) prod_{j>=k} w_j``.
    """
    rest = [math.sqrt(1 - weight**2) for weight in weights]
    made = []
    for model in range(len(weights) + 1):
        before = rest[:model] if mix == "paper" else rest[max(model - 1, 0) : model]
        made.append(math.prod(before) * math.prod(weights[model:]))
    return tuple(made)


def aggregate(latents: Many, weights: Sequence[float], mix: str) -> Latents:
    """Spherical aggregation of several models' latents (Eq. 9), each sample by itself.

    For latents of one length at right angles all three ways are the same for two models.
    """
    if mix != "slerp":
        shares = torch.tensor(coefficients(weights, mix), dtype=torch.float32, device=latents.device)
        weighed: Tensor = torch.einsum("n,nbchw->bchw", shares, latents.float())
        return weighed.to(latents.dtype)
    mixed = latents[0].float()
    for weight, other in zip(weights, latents[1:].float(), strict=True):
        mixed = _slerp(other, mixed, 2 / math.pi * math.asin(weight))
    return mixed.to(latents.dtype)


def _slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """A share of the way from one to the other along the arc between them; lengths change evenly."""
    lengths = [one.flatten(1).norm(dim=1)[:, None, None, None].clamp(min=1e-12) for one in (start, end)]
    a, b = start / lengths[0], end / lengths[1]
    angle = (a * b).flatten(1).sum(1).clamp(-1, 1).arccos()[:, None, None, None]
    sine = angle.sin()
    straight = sine < 1e-4  # almost parallel: the arc is a line
    safe = torch.where(straight, 1.0, sine)
    first = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / safe)
    second = torch.where(straight, share, (share * angle).sin() / safe)
    turned: Tensor = (first * a + second * b) * ((1 - share) * lengths[0] + share * lengths[1])
    return turned


def pulled(mixed: Latents, mean: Latents, pull: float, absolute: bool) -> Latents:
    """Manifold optimisation (Eq. 10): the mixture, moved towards a model's mean and never beyond; each sample by
    itself, where the paper's norm has no batch."""
    away = (mixed - mean).float()
    if not absolute:
        return (mixed.float() - pull * away).to(mixed.dtype)
    length = away.flatten(1).norm(dim=1)[:, None, None, None]
    share = torch.where(length > 0, (pull / length.clamp(min=1e-12)).clamp(max=1), 0.0)
    return (mixed.float() - share * away).to(mixed.dtype)


@torch.no_grad()
def sample_aggregated(
    denoisers: Sequence[Denoiser],
    scheduler: SchedulerMixin,
    latents: Sequence[Latents],
    timesteps: Tensor,
    aggregation: Aggregation,
    *,
    settle: Settle | None = None,
    finished: Callable[[], None] | None = None,
) -> Iterator[Step]:
    """Denoise with several models, one event a step; the last event holds the first model's result.

    Args:
        denoisers: the models, the one whose picture it becomes first; guidance included.
        scheduler: DDIM, with its timesteps set. It has no memory of earlier steps, so edited latents are all it sees.
        latents: the noise to start from: one for all, or with ``authors`` one each.
        timesteps: all of them.
        aggregation: how.
        settle: changes the first model's latents after every step.
        finished: called when the helpers are not needed any more, so that they can leave memory.

    Raises:
        UserError: another scheduler, or numbers that do not fit.
    """
    if not isinstance(scheduler, DDIMScheduler):
        raise UserError(
            f"aggregation edits latents between steps, which {type(scheduler).__name__} would undo or misread: use ddim"
        )
    weights, pulls = aggregation.for_models(len(denoisers))
    if len(latents) != len(denoisers) and (aggregation.authors or len(latents) != 1):
        one = "one each" if aggregation.authors else "one, or one each"
        raise UserError(f"{len(latents)} starts for {len(denoisers)} models; give {one}")
    if len(found := {tuple(one.shape) for one in latents}) > 1:
        raise UserError(f"models that are aggregated share their latents' shape, got {sorted(found)}")
    if aggregation.authors and scheduler.config.prediction_type != "epsilon":
        raise UserError("the authors' mean is one of predicted noise; these models predict something else")
    mine = list(latents) * (1 if len(latents) == len(denoisers) else len(denoisers))
    models = list(denoisers)
    last = max((index for index in range(len(timesteps)) if aggregation.shares(index)), default=-1)
    stale: list[Tensor] = []
    for index, timestep in enumerate(timesteps):
        if index == last + 1:
            del models[1:], mine[1:]
            if finished is not None:
                finished()
        moment = Moment(index, len(timesteps), timestep)
        said = [model(scheduler.scale_model_input(one, timestep), moment)
                for model, one in zip(models, mine, strict=True)]  # fmt: skip
        steps = [scheduler.step(one, timestep, here, return_dict=False)[0]
                 for one, here in zip(said, mine, strict=True)]  # fmt: skip
        if aggregation.shares(index):
            means = steps
            if aggregation.authors:
                means = [_stale_mean(scheduler, int(timestep), *pair) for pair in zip(mine, stale, strict=True)]
            mixed = aggregate(torch.stack(steps), weights, aggregation.mix)
            steps = [pulled(mixed, mean, pull, aggregation.absolute) for mean, pull in zip(means, pulls, strict=True)]
        if settle is not None:
            steps = [settle(steps[0], moment), *steps[1:]]
        mine, stale = steps, said
        yield Step(moment, mine[0])
    if last + 1 >= len(timesteps) and finished is not None:
        finished()


def _stale_mean(scheduler: DDIMScheduler, timestep: int, latents: Tensor, prediction: Tensor) -> Tensor:
    """The mean of the authors' code: of DDPM's step at the timestep before, with the prediction made there."""
    before = timestep + scheduler.config.num_train_timesteps // int(scheduler.num_inference_steps)
    alpha, product = scheduler.alphas[before], scheduler.alphas_cumprod[before]
    mean: Tensor = (latents - (1 - alpha) / (1 - product).sqrt() * prediction) / alpha.sqrt()
    return mean


def _each(what: str, given: Sequence[float], count: int) -> tuple[float, ...]:
    if len(given) not in {1, count}:
        raise UserError(f"{len(given)} {what} for {count + (what == 'weights')} models; give one, or {count}")
    return tuple(given) * (count if len(given) == 1 else 1)


def _said(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers) or "none"
