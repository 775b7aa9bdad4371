"""A request's needs, foretold before the work and checked after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from counterpoint.api import OPENVINO, find_device
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.apps.run import Listener, Result, load_for, open_request, run
from counterpoint.control.weight import Weight
from counterpoint.metrics.cost import Cost, measuring
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.plan import Plan, plan
from counterpoint.sampling.residency import RESIDENCIES
from counterpoint.types import Moment, UserError


@dataclass(frozen=True)
class Planned:
    """A plan, the residency that was chosen and the controls that come and go within every step, the request's quality,
    and the bytes that were needed in the end, where that is known."""

    plan: Plan
    residency: str
    going: tuple[str, ...] = ()
    quality: str = "exact"
    taken: int | None = None

    @property
    def most(self) -> int:
        """Bytes that are needed at once."""
        return self.plan.turns[self.going] if self.going else self.plan.memory[self.residency]

    @property
    def line(self) -> str:
        """One sentence."""
        about = "about" if self.quality == "exact" else "at most about"  # controls that are foretold cost less
        how = RESIDENCIES["stages" if self.going else self.residency]
        if self.going:
            how += f"; in turns within every step: {', '.join(self.going)}"
        return f"this needs {self.most / 2**30:.2f} GiB and {about} {self.plan.seconds:.0f} s: {how}"

    @property
    def table(self) -> str:
        """The sentence, and what every residency would need."""
        sizes = self.plan.memory.items()
        return "\n".join(
            [self.line, *(f"{level:10} {size / 2**30:6.2f} GiB  {RESIDENCIES[level]}" for level, size in sizes)]
        )

    @property
    def record(self) -> dict[str, object]:
        """Bytes and seconds."""
        plan = self.plan
        told = {"memory": dict(plan.memory), "weights": dict(plan.weights), "seconds": round(plan.seconds, 2)}
        peaks = {"planned": self.most, "taken": self.taken}
        return {"residency": self.residency, "going": list(self.going), **told, **peaks}


def prepare(request: GenerateRequest, limit: float | None) -> tuple[Planned, Pipeline]:
    """Plan a request. The pipeline has its networks away, whatever residency was chosen.

    Args:
        request: what is to be done.
        limit: GiB that weights and intermediate results may take; without, every network stays.

    Raises:
        UserError: it cannot fit, cannot be planned, or what the request names is wrong.
    """
    for wrong, said in (
        (request.aggregate, "one model, and --aggregate names several"),
        (request.device == OPENVINO, "networks in torch: leave --device openvino away"),
        (any(one.steered for one in request.controls), "forward passes alone: leave --steer away"),
    ):
        if wrong:
            raise UserError(f"--plan and --memory know {said}")
    if limit is not None and not math.isfinite(limit):
        raise UserError(f"--memory wants a number of GiB, got {limit}")
    open_request(request)
    pipe = load_for(request, "controls")
    found = foretell(request, pipe)
    residency, going = ("all", ()) if limit is None else found.fitting(int(limit * 2**30))
    return Planned(found, residency, going, request.quality), pipe


def run_within(
    request: GenerateRequest,
    limit: float,
    say: Callable[[str], None],
    *,
    listen: Listener | None = None,
    report: bool = False,
) -> tuple[Planned, Result]:
    """Carry a request out with as many networks in memory as fit, and say what was planned, what it took, and whether
    that was more than allowed.

    What it took is counted from the end of planning on, when the libraries are there and the networks away.

    Raises:
        UserError: as :func:`prepare` and :func:`counterpoint.apps.run.run` say.
    """
    device = find_device(request.device)
    planned, pipe = prepare(request, limit)
    say(planned.line)
    with measuring(device) as before:
        torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    with measuring(device) as cost:
        if pipe.residency is not None and planned.residency != "all":
            pipe.residency.level, pipe.residency.going = planned.residency, planned.going
        else:
            del pipe
            pipe = load_for(request)
        result = run(request, pipe, listen=listen, report=report)
    taken = _taken(cost, before)
    say(f"it took {'' if taken is None else f'{taken / 2**30:.2f} GiB and '}{result.seconds:.1f} s")
    if taken is not None and taken > limit * 2**30:
        say(f"warning: more than the {limit:g} GiB allowed: a smaller --memory leaves room for what is not planned")
    return replace(planned, taken=taken), result


def _taken(cost: Cost, before: Cost) -> int | None:
    """Bytes besides what was there before; nothing where the system does not tell."""
    if cost.peak_mb is None or before.peak_mb is None:
        return None
    return round((cost.peak_mb - before.peak_mb) * 2**20)


def foretell(request: GenerateRequest, pipe: Pipeline) -> Plan:
    """What a request needs of its pipeline."""
    return plan(
        pipe,
        request.n,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        fusion=request.fusion,
        quality=request.quality,
        active=[_active(control, request.steps) for control in request.controls],
        strength=None if request.init_image is None else request.strength,
    )


def _active(control: ControlRequest, steps: int) -> float:
    """The share of the steps in which a control is run."""
    weight, no_time = Weight.parse(control.weight), torch.tensor(0)
    moments = (Moment(index, steps, no_time) for index in range(steps))
    return sum(bool(weight.at(one.progress)) and one.inside(control.window) for one in moments) / steps
