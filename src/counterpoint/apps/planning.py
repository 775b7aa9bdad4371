"""A request's needs, foretold before the work and checked after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from counterpoint.api import OPENVINO, find_device
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.apps.run import Listener, Result, load_for, open_request, run
from counterpoint.control.stack import Weight
from counterpoint.metrics.cost import Cost, measuring
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.plan import Plan, plan
from counterpoint.sampling.residency import RESIDENCIES
from counterpoint.types import Moment, UserError


@dataclass(frozen=True)
class Planned:
    """A plan, and the residency that was chosen."""

    plan: Plan
    residency: str

    @property
    def line(self) -> str:
        """One sentence."""
        most = self.plan.memory[self.residency] / 2**30
        return f"this needs {most:.2f} GiB and about {self.plan.seconds:.0f} s: {RESIDENCIES[self.residency]}"

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
        return {"residency": self.residency, **told}


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
    return Planned(found, "all" if limit is None else found.fitting(int(limit * 2**30))), pipe


def run_within(
    request: GenerateRequest,
    limit: float,
    say: Callable[[str], None],
    *,
    listen: Listener | None = None,
    report: bool = False,
) -> tuple[Planned, Result]:
    """Carry a request out with as many networks in memory as fit, and say what was planned and what it took.

    Raises:
        UserError: as :func:`prepare` and :func:`counterpoint.apps.run.run` say.
    """
    device = find_device(request.device)
    with measuring(device) as before:
        pass
    with measuring(device) as cost:
        planned, pipe = prepare(request, limit)
        say(planned.line)
        if pipe.residency is not None and planned.residency != "all":
            pipe.residency.level = planned.residency
        else:
            del pipe
            pipe = load_for(request)
        result = run(request, pipe, listen=listen, report=report)
    say(f"it took {_memory(cost, before)}{result.seconds:.1f} s")
    return planned, result


def _memory(cost: Cost, before: Cost) -> str:
    """What was taken besides what was there before; nothing where the system does not tell."""
    if cost.peak_mb is None or before.peak_mb is None:
        return ""
    return f"{(cost.peak_mb - before.peak_mb) / 1024:.2f} GiB and "


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
        active=[_active(control, request.steps) for control in request.controls],
        from_image=request.init_image is not None,
    )


def _active(control: ControlRequest, steps: int) -> float:
    """The share of the steps in which a control is run."""
    weight, no_time = Weight.parse(control.weight), torch.tensor(0)
    moments = (Moment(index, steps, no_time) for index in range(steps))
    return sum(bool(weight.at(one.progress)) and one.inside(control.window) for one in moments) / steps
