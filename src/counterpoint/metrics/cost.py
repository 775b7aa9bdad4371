"""What something costs: seconds, and the largest memory while it ran."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR, _STATUS, _MACHINE = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/meminfo")


@dataclass
class Cost:
    """Seconds, and the largest memory in MiB: allocated on CUDA, resident on a CPU where the kernel tells."""

    seconds: float = float("nan")
    peak_mb: float | None = None


@contextmanager
def measuring(device: torch.device) -> Iterator[Cost]:
    """A cost that is known when the block has ended, work that still runs on ``device`` included."""
    cost = Cost()
    _forget_peak(device)
    began = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()
    cost.seconds, cost.peak_mb = time.perf_counter() - began, _peak(device)


def _forget_peak(device: torch.device) -> None:
    """Let CUDA, or the kernel, begin a new maximum."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(_CLEAR, os.W_OK):
        _CLEAR.write_text("5")


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type != "cpu" or not os.access(_CLEAR, os.W_OK):
        return None
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")), None)
    return None if line is None else int(line.split()[1]) / 1024


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had there; nothing where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not _MACHINE.exists():
        return None
    line = next(line for line in _MACHINE.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
