"""What is timed of batches: the same jobs one by one and together."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from counterpoint.api import DTYPES
from counterpoint.apps.benchmark_cases import SHIPPED, Comparison
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.apps.run import Opened, load_for, open_request, run_together
from counterpoint.types import UserError

JOBS = 16
"""Of the tiny family, each with a prompt, a seed and condition images of its own."""
KINDS = ("pose", "seg")


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
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        opened = []
        for number in range(JOBS):
            controls = []
            for kind in KINDS:
                path = Path(folder) / f"{kind}-{number}.png"
                PIL.Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)).save(path)
                controls.append(ControlRequest(label=kind, image=path))
            request = GenerateRequest(
                prompt=f"a photo of a person on a {('meadow', 'beach')[number % 2]}",
                controls=tuple(controls),
                seed=number,
                device=device,
                dtype=dtype,
            )
            opened.append(open_request(request))
    return opened
