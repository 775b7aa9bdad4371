"""What a job will cost, by what jobs of the same model and quality cost before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from counterpoint.apps.service.store import Job
from counterpoint.sampling.amdm import Aggregation

_GUESS = 20.0
"""Seconds a unit of work where nothing was learnt yet: a small CPU."""
_EXACT = "exact"
_KEPT = 0.9
"""Of what was learnt, when the next job is done."""


class Pace:
    """How long jobs of each model take: seconds for a million pixels, steps and networks.

    Args:
        sides: where a model is -> side of its pictures.
        done: jobs to learn from, the oldest first.
    """

    def __init__(self, sides: Mapping[str, int], done: Iterable[Job] = ()) -> None:
        self.sides = sides
        self.learnt: dict[tuple[str, str], tuple[float, float]] = {}
        for job in done:
            self.learn(job)

    def work(self, request: Mapping[str, Any]) -> float:
        """A request's work; a ControlNet costs half of a UNet, and models that are aggregated one each, at most in all
        steps: a window in noise is not counted here.

        Raises:
            UserError: the aggregation makes no sense.
        """
        side = self.sides[request["model"]]
        pixels = (request.get("width") or side) * (request.get("height") or side)
        steps, helpers = request["steps"], max(len(request.get("aggregate") or ()) - 1, 0)
        window = Aggregation.parse(request.get("aggregation") or "").steps
        shared = steps if window is None else min(window, steps)
        networks = 2 * (steps * (1 + 0.5 * len(request.get("controls") or ())) + shared * helpers)
        return pixels / 1e6 * request["n"] * networks

    def learn(self, job: Job) -> None:
        """From a job that is done: the seconds of its pictures, without those that its model took to load."""
        model, seconds = job.request["model"], sum(one.get("seconds", 0.0) for one in job.images or ())
        if model not in self.sides or not seconds:
            return
        key = model, job.request.get("quality", _EXACT)
        before = self.learnt.get(key, (0.0, 0.0))
        self.learnt[key] = before[0] * _KEPT + seconds, before[1] * _KEPT + self.work(job.request)

    def estimate(self, request: Mapping[str, Any], most: float) -> float:
        """Seconds that a request will take: as long as an exact one where its quality made nothing yet; a guess of a
        model that made nothing yet is ``most`` at most."""
        keys = [(request["model"], quality) for quality in (request.get("quality", _EXACT), _EXACT)]
        known = next((self.learnt[key] for key in keys if key in self.learnt), None)
        if known is None:
            return min(self.work(request) * _GUESS, most)
        seconds, work = known
        return self.work(request) * seconds / work
