"""What is timed of batches: the same jobs one by one and together."""

from __future__ import annotations

import tempfile
from pathlib import Path

import PIL.Image
import torch

from counterpoint.api import DTYPES
from counterpoint.apps.benchmark_cases import Comparison
from counterpoint.apps.benchmark_models import SHIPPED
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.apps.run import Opened, load_for, open_request, run_together
from counterpoint.data.pairs import conflicting
from counterpoint.types import UserError

JOBS = 16
"""Of the tiny family, each with a prompt, a seed, condition images, weights and windows of its own."""
WEIGHTS = ("1", "0.8", "0:1,0.5:0.4")
WINDOWS = ((0.0, 1.0), (0.0, 0.6))


def batch_cases(size: str, device: torch.device, dtype: torch.dtype) -> Comparison:
    """Jobs with two controls as single runs and as real batches, in one process.

    Raises:
        UserError: another size than tiny, whose pictures take seconds.
    """
    if size != SHIPPED:
        raise UserError("benchmark batch makes whole pictures: --size tiny")
    name = next(name for name, kind in DTYPES.items() if kind == dtype)
    jobs = _jobs(str(device), name)
    pipe = load_for(jobs[0].request)

    def together(count: int) -> None:
        for start in range(0, JOBS, count):
            run_together(jobs[start : start + count], pipe)

    cases = {f"batches of {count}": lambda count=count: together(count) for count in (4, 8, JOBS)}
    return Comparison({"one by one": lambda: together(1), **cases}, "one by one")


def _jobs(device: str, dtype: str) -> list[Opened]:
    with tempfile.TemporaryDirectory() as folder:
        opened = []
        for number in range(JOBS):
            case, how = conflicting(number), {"weight": WEIGHTS[number % 3], "window": WINDOWS[number % 2]}
            controls = []
            for kind, image in case.images.items():
                path = Path(folder) / f"{kind}-{number}.png"
                PIL.Image.fromarray(image).save(path)
                controls.append(ControlRequest(label=kind, image=path, **how))
            request = GenerateRequest(
                prompt=case.prompt, controls=tuple(controls), seed=number, device=device, dtype=dtype
            )
            opened.append(open_request(request))
    return opened
