"""How quickly this machine calculates."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

_LONG = 1.0
"""Seconds of calls that are enough."""


def quickest(device: torch.device, run: Callable[[], object], times: int = 5) -> float:
    """Seconds of the quickest of some calls, fewer where they take long; on an accelerator of several in a row, which
    hides their launch."""
    taken, row = [], 1 if device.type == "cpu" else 10
    with torch.no_grad():
        for _ in range(times):
            began = time.perf_counter()
            for _ in range(row):
                run()
            if device.type != "cpu":
                getattr(torch, device.type).synchronize()
            taken.append((time.perf_counter() - began) / row)
            if sum(taken) > _LONG:
                break
    return min(taken)


@cache
def bf16_pays() -> bool:
    """Whether this processor multiplies bf16 matrices quicker than float32: some that have the instructions do not."""
    if not torch.cpu._is_avx512_bf16_supported():
        return False

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(768, 768, dtype=dtype)
        return quickest(torch.device("cpu"), lambda: a @ a, 4)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)
