"""What is timed of batches: the same jobs one by one and together."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import PIL.Image
import torch

from counterpoint.api import DTYPES
from counterpoint.apps.benchmark_cases import Comparison
from counterpoint.apps.benchmark_models import SHIPPED, make_model
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.apps.run import Opened, load_for, open_request, run_together
from counterpoint.data.pairs import conflicting
from counterpoint.types import UserError

JOBS, STEPS = {"tiny": 16, "sd15": 4}, {"tiny": 20, "sd15": 2}
"""Of a size: jobs, each with a prompt, a seed, condition images, weights and windows of its own, and their steps."""
WEIGHTS = ("1", "0.8", "0:1,0.5:0.4")
WINDOWS = ((0.0, 1.0), (0.0, 0.6))


def batch_cases(size: str, device: torch.device, dtype: torch.dtype) -> Comparison:
    """Jobs with two controls as single runs and as real batches, in one process.

    Raises:
        UserError: SDXL, whose pictures take too long, or there is no room.
    """
    if size not in JOBS:
        raise UserError(f"benchmark batch makes many whole pictures: --size {' or '.join(JOBS)}")
    name = next(name for name, kind in DTYPES.items() if kind == dtype)
    jobs, number = _jobs(str(device), name, size), JOBS[size]
    if size == SHIPPED:
        pipe = load_for(jobs[0].request)
    else:
        made = make_model(size, device, dtype)
        labels = [control.label for control in jobs[0].request.controls]
        pipe = replace(made, controls=dict(zip(labels, made.controls.values(), strict=True)))

    def together(count: int) -> None:
        for start in range(0, number, count):
            run_together(jobs[start : start + count], pipe)

    counts = [count for count in (2, 4, 8, 16) if number // 4 <= count <= number]
    cases = {f"batches of {count}": lambda count=count: together(count) for count in counts}
    return Comparison({"one by one": lambda: together(1), **cases}, "one by one")


def _jobs(device: str, dtype: str, size: str) -> list[Opened]:
    with tempfile.TemporaryDirectory() as folder:
        opened = []
        for number in range(JOBS[size]):
            case, how = conflicting(number), {"weight": WEIGHTS[number % 3], "window": WINDOWS[number % 2]}
            controls = []
            for kind, image in case.images.items():
                path = Path(folder) / f"{kind}-{number}.png"
                PIL.Image.fromarray(image).save(path)
                controls.append(ControlRequest(label=kind, image=path, **how))
            settings = {"steps": STEPS[size], "device": device, "dtype": dtype}
            request = GenerateRequest(prompt=case.prompt, controls=tuple(controls), seed=number, **settings)
            opened.append(open_request(request))
    return opened
