"""Aggregation of Multi Diffusion Models (AMDM): in the first steps several denoisers share what they have found, then
the first one goes on alone.

"Aggregation of Multi Diffusion Models for Enhancing Learned Representations" (2024), section 3.3. The picture is the
first model's. Every model takes its own step, the steps are mixed (Eq. 9, Algorithm 2), and each model goes on from the
mixture pulled back towards its own mean (Eq. 10). Nothing is asked of a network that its own step did not ask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from counterpoint.sampling.loop import Settle, Step
from counterpoint.sampling.schedulers import moments
from counterpoint.types import Denoiser, Latents, UserError

MIXES = ("paper", "unit", "slerp")
NOISES = ("shared", "separate")
MEANS = ("own", "stale")
STEPS, SIGMA = 3, 10.0
"""The window where nothing is said: the first steps, and further while ``sigma_t`` is at least this for latents 64 a
side, as the paper's window ends at 50 steps. Smaller pictures are decided later: what noise hides of a layout at one
size it hides at half of the noise at half of the size, so for others it is in proportion to the side."""
AUTO = 0.3
"""Eta where nothing is said, as a share of ``|x' - mu|``."""
Eta = float | str
Many = Float[Tensor, "n b c h w"]


def _amount(eta: Eta) -> tuple[float, bool]:
    """An eta's number, and whether it is a share of the way or a length."""
    if eta == "auto":
        return AUTO, True
    if isinstance(eta, str):
        return float(eta.removesuffix("x")), eta.endswith("x")
    return float(eta), False


def _is_eta(eta: Eta) -> bool:
    try:
        amount, of_the_way = _amount(eta)
    except (TypeError, ValueError):
        return False
    return 0 <= amount < math.inf and (amount <= 1 or not of_the_way)


@dataclass(frozen=True)
class Aggregation:
    """How models are aggregated.

    Attributes:
        weights: one fewer than there are models, in 0..1: how much of what came before is kept when the next model is
            mixed in; one number is for all of them.
        steps: the window: how many of the first steps are shared; if neither this nor ``sigma`` is given, at least
            :data:`STEPS`, and as many as :data:`SIGMA` says.
        mix: ``"paper"`` has Algorithm 2's coefficients, whose squares do not sum to 1 for more than two models;
            ``"unit"`` those that do; ``"slerp"`` turns along the arc between latents as they are, where the other two
            take them for orthogonal and make correlated ones longer.
        eta: how far each model is pulled back to its own mean, one for all or one each: ``45`` is a length as in the
            paper, for latents of 4 x 64 x 64 and as the root of their number for others, at most all the way;
            ``"0.4x"`` a share of the way; ``"auto"`` is our share, :data:`AUTO`.
        sigma: the window in noise, in place of ``steps``: steps are shared while ``sigma_t`` is at least this, where
            ``sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)``.
        noise: ``"shared"``, one start for all models, or ``"separate"``, one each.
        mean: ``"own"`` is the mean of the step itself (Eq. 10), for DDIM where it leads; ``"stale"`` that of the step
            before, as in the authors' code. The first step has none before it, so sharing begins with the second.
    """

    weights: tuple[float, ...] = (0.5,)
    steps: float | None = None  # a whole number; what is none is said in our words
    mix: str = "slerp"
    eta: tuple[Eta, ...] = ("auto",)
    sigma: float | None = None
    noise: str = "shared"
    mean: str = "own"

    def __post_init__(self) -> None:
        for name, value, known in (("mix", self.mix, MIXES), ("noise", self.noise, NOISES), ("mean", self.mean, MEANS)):
            if value not in known:
                raise UserError(f"unknown {name} {value!r} of an aggregation; there are {', '.join(known)}")
        if not self.weights or any(isinstance(weight, str) or not 0 <= weight <= 1 for weight in self.weights):
            raise UserError(f"weights of an aggregation lie in 0..1, got {_said(self.weights)}")
        if not self.eta or not all(_is_eta(one) for one in self.eta):
            raise UserError(
                f"eta of an aggregation is a length such as 45, a share such as 0.5x, at most 1x, or auto; got "
                f"{_said(self.eta)}"
            )
        if self.steps is not None and self.sigma is not None:
            raise UserError("an aggregation's window is in steps or in sigma: give one of them")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 0):
            raise UserError(f"an aggregation shares a whole number of steps, at least 0, got {self.steps}")
        if self.sigma is not None and not 0 < self.sigma < math.inf:
            raise UserError(f"sigma of an aggregation is a positive number, got {self.sigma}")

    @classmethod
    def parse(cls, text: str) -> Aggregation:
        """Read ``steps=3,weights=0.47:0.5,mix=paper,eta=45:40:35``, or one of :data:`PRESETS`, alone or with settings
        after it (``authors,steps=5``); what is left out is the default.

        Raises:
            UserError: an unknown setting or a value that makes no sense.
        """
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        base = cls()
        if parts and "=" not in parts[0]:
            if parts[0] not in PRESETS:
                raise UserError(f"unknown aggregation {parts[0]!r}; there are {', '.join(PRESETS)}, and settings such "
                                "as steps=3")  # fmt: skip
            base = PRESETS[parts.pop(0)]
        given: dict[str, Any] = {}
        for part in parts:
            name, _, value = part.partition("=")
            if name not in _READ:
                raise UserError(f"unknown setting {name!r} of an aggregation; there are {', '.join(_READ)}")
            try:
                given[name] = _READ[name](value)
            except ValueError:
                raise UserError(f"{part}: an aggregation's {name} cannot be {value!r}") from None
        if ("steps" in given) != ("sigma" in given):  # one takes the place of the other
            given = {"steps": None, "sigma": None, **given}
        return replace(base, **given)

    def for_models(self, count: int) -> tuple[tuple[float, ...], tuple[Eta, ...]]:
        """Weights and etas for a number of models.

        Raises:
            UserError: there are too few models, or another number of weights or etas.
        """
        if count < 2:
            raise UserError(f"an aggregation wants at least two models, got {count}")
        return _each("weights", self.weights, count - 1), _each("etas", self.eta, count)

    def shares(self, index: int, sigma: float, size: tuple[int, int]) -> bool:
        """Whether a step, counted from 0, with a ``sigma_t`` before it, is shared, for latents of a size."""
        first = 1 if self.mean == "stale" else 0
        if index < first:
            return False
        if self.sigma is not None:
            return sigma >= self.sigma
        if self.steps is not None:
            return index < first + self.steps
        return index < first + STEPS or sigma >= SIGMA * math.sqrt(size[0] * size[1]) / 64


_READ: dict[str, Callable[[str], Any]] = {
    "weights": lambda text: tuple(float(one) for one in text.split(":")),
    "steps": int,
    "sigma": float,
    "mix": str,
    "eta": lambda text: tuple(text.split(":")),
    "noise": str,
    "mean": str,
}
_PAPER = Aggregation((0.5,), 3, mix="paper", eta=(45.0, 55.0))
PRESETS = {
    "paper": _PAPER,
    "paper-style": replace(_PAPER, weights=(0.45,)),
    "paper-three": replace(_PAPER, weights=(0.47, 0.5), eta=(45.0, 40.0, 35.0)),
    "authors": replace(_PAPER, noise="separate", mean="stale"),
}
"""The paper's recipes (section 4) for InteractDiffusion with MIGC, with an IP-Adapter and with both, and the first as
the authors' code has it. The first and the last take 50 steps, the
others 10."""


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


PUBLISHED = 4 * 64 * 64
"""Numbers in the latents that the paper's lengths are for; lengths of noise grow with the root of that."""


def pulled(mixed: Latents, mean: Latents, eta: Eta) -> Latents:
    """Manifold optimisation (Eq. 10): the mixture, moved towards a model's mean and never beyond; each sample by
    itself, where the paper's norm has no batch. A length is that of :data:`PUBLISHED` numbers."""
    amount, of_the_way = _amount(eta)
    away = (mixed - mean).float()
    if of_the_way:
        return (mixed.float() - amount * away).to(mixed.dtype)
    length = away.flatten(1).norm(dim=1)[:, None, None, None]
    amount *= math.sqrt(away[0].numel() / PUBLISHED)
    share = torch.where(length > 0, (amount / length.clamp(min=1e-12)).clamp(max=1), 0.0)
    return (mixed.float() - share * away).to(mixed.dtype)


@torch.no_grad()
def sample_aggregated(
    denoisers: Sequence[Denoiser],
    scheduler: SchedulerMixin,
    latents: Sequence[Latents],
    timesteps: Tensor,
    aggregation: Aggregation,
    *,
    settles: Sequence[Settle | None] = (None,),
    finished: Callable[[], None] | None = None,
) -> Iterator[Step]:
    """Denoise with several models, one event a step; the last event holds the first model's result.

    Args:
        denoisers: the models, the one whose picture it becomes first; guidance included.
        scheduler: DDIM, with its timesteps set. It has no memory of earlier steps, so edited latents are all it sees.
        latents: what to start from: one for all, or with separate noise one each.
        timesteps: all of them.
        aggregation: how.
        settles: what changes a model's latents after every step: one for all, or one each.
        finished: called when the helpers are not needed any more, so that they can leave memory.

    Raises:
        UserError: another scheduler, numbers that do not fit, or a window without a step.
    """
    _check(scheduler, aggregation, latents, len(denoisers))
    weights, etas = aggregation.for_models(len(denoisers))
    models, mine = list(denoisers), _repeated(latents, len(denoisers))
    run, size = moments(scheduler, timesteps), (latents[0].shape[2], latents[0].shape[3])
    shared = [moment.index for moment in run if aggregation.shares(moment.index, moment.sigma, size)]
    if not shared and aggregation.steps != 0:
        raise UserError(
            f"no step is shared: of {len(run)} the noisiest has a sigma of {run[0].sigma:.3g}"
            + ", and with a stale mean the first is never shared" * (aggregation.mean == "stale")
        )
    last = max(shared, default=-1)
    stale: list[Tensor] = []
    for moment in run:
        index, timestep = moment.index, moment.timestep
        if index == last + 1:
            del models[1:], mine[1:]
            if finished is not None:
                finished()
        said = [model(scheduler.scale_model_input(one, timestep), moment)
                for model, one in zip(models, mine, strict=True)]  # fmt: skip
        steps = [scheduler.step(one, timestep, here, return_dict=False)[0]
                 for one, here in zip(said, mine, strict=True)]  # fmt: skip
        if index in shared:
            means = steps
            if aggregation.mean == "stale":
                means = [_stale_mean(scheduler, int(timestep), *pair) for pair in zip(mine, stale, strict=True)]
            mixed = aggregate(torch.stack(steps), weights, aggregation.mix)
            steps = [pulled(mixed, mean, eta) for mean, eta in zip(means, etas, strict=True)]
        mine = [one if settle is None else settle(one, moment)
                for one, settle in zip(steps, _repeated(settles, len(steps)), strict=False)]  # fmt: skip
        stale = said
        yield Step(moment, mine[0])
    if last + 1 >= len(timesteps) and finished is not None:
        finished()


def _check(scheduler: SchedulerMixin, aggregation: Aggregation, latents: Sequence[Latents], count: int) -> None:
    if not isinstance(scheduler, DDIMScheduler):
        raise UserError(
            f"aggregation edits latents between steps, which {type(scheduler).__name__} would undo or misread: use ddim"
        )
    separate = aggregation.noise == "separate"
    if len(latents) != count and (separate or len(latents) != 1):
        raise UserError(
            f"{len(latents)} starts for {count} models; give {'one each' if separate else 'one, or one each'}"
        )
    if len(found := {tuple(one.shape) for one in latents}) > 1:
        raise UserError(f"models that are aggregated share their latents' shape, got {sorted(found)}")
    if aggregation.mean == "stale" and scheduler.config.prediction_type != "epsilon":
        raise UserError("the authors' stale mean is one of predicted noise; these models predict something else")


def _repeated(given: Sequence[Any], count: int) -> list[Any]:
    return list(given) * (count if len(given) == 1 else 1)


def _stale_mean(scheduler: DDIMScheduler, timestep: int, latents: Tensor, prediction: Tensor) -> Tensor:
    """The mean of the authors' code: of DDPM's step at the timestep before, with the prediction made there."""
    before = timestep + scheduler.config.num_train_timesteps // int(scheduler.num_inference_steps)
    alpha, product = scheduler.alphas[before], scheduler.alphas_cumprod[before]
    mean: Tensor = (latents - (1 - alpha) / (1 - product).sqrt() * prediction) / alpha.sqrt()
    return mean


def _each(what: str, given: Sequence[Any], count: int) -> tuple[Any, ...]:
    if len(given) not in {1, count}:
        several, models = f", or {count}" if count > 1 else "", count + (what == "weights")
        named = ", ".join(name for name, one in PRESETS.items() if len(one.eta) == models)
        recipes = f"; recipes for {models} models are called {named}" if named else ""
        raise UserError(f"{len(given)} {what} for {models} models; give one{several}{recipes}")
    return tuple(_repeated(given, count))


def _said(values: Sequence[object]) -> str:
    return ", ".join(f"{one:g}" if isinstance(one, float) else repr(one) for one in values) or "none"
