"""A request's needs, foretold before the work and checked after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from counterpoint.api import find_device
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.apps.run import load_for
from counterpoint.control.stack import Weight
from counterpoint.metrics.cost import measuring
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.plan import Plan, plan
from counterpoint.sampling.residency import RESIDENCIES
from counterpoint.types import Moment


@dataclass(frozen=True)
class Planned:
    """A plan, the residency that was chosen, and the pipeline that has it."""

    plan: Plan
    residency: str
    pipe: Pipeline

    @property
    def line(self) -> str:
        """One sentence."""
        most = self.plan.memory[self.residency] / 2**30
        return f"this needs {most:.2f} GiB and about {self.plan.seconds:.0f} s; {RESIDENCIES[self.residency]}"

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


def prepare(request: GenerateRequest, limit: float | None) -> Planned:
    """Plan a request and load what it asks for, so that it fits.

    Args:
        request: what is to be done.
        limit: GiB that weights and intermediate results may take; without, every network stays.

    Raises:
        UserError: it cannot fit, or what the request names is wrong.
    """
    pipe = load_for(request, "controls")
    found = foretell(request, pipe)
    level = "all" if limit is None else found.fitting(int(limit * 2**30))
    if pipe.residency is not None and level != "all":
        pipe.residency.level = level
        return Planned(found, level, pipe)
    del pipe
    return Planned(found, level, load_for(request))


def foretell(request: GenerateRequest, pipe: Pipeline) -> Plan:
    """What a request needs of its pipeline."""
    return plan(
        pipe,
        request.n,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        active=[_active(control, request.steps) for control in request.controls],
        from_image=request.init_image is not None,
    )


def _active(control: ControlRequest, steps: int) -> float:
    """The share of the steps in which a control is run."""
    weight, no_time = Weight.parse(control.weight), torch.tensor(0)
    moments = (Moment(index, steps, no_time) for index in range(steps))
    return sum(bool(weight.at(one.progress)) and one.inside(control.window) for one in moments) / steps


@contextmanager
def checking(name: str) -> Iterator[list[str]]:
    """A sentence on what the block took on a device besides what was there before it; none where the system does not
    tell."""
    device = find_device(name)
    with measuring(device) as before:
        pass
    said: list[str] = []
    with measuring(device) as cost:
        yield said
    if cost.peak_mb and before.peak_mb:
        said.append(f"it took {(cost.peak_mb - before.peak_mb) / 1024:.2f} GiB")
