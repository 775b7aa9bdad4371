"""Speed and memory, measured side by side: everything that is compared runs in one process, in turns."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from counterpoint.api import DTYPES
from counterpoint.evaluation.statistics import bootstrap
from counterpoint.metrics.cost import measuring
from counterpoint.pages import render
from counterpoint.sampling.floor import Ledger, Operations, rates, work

Case = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of a case in every round, and what it made and its operations in the round that is not timed. Memory is
    not among them: this process holds what all cases need."""

    seconds: list[float]
    made: Any = None
    operations: Operations = field(default_factory=dict)


def alternate(
    cases: Mapping[str, Case],
    rounds: int,
    device: torch.device,
    listen: Callable[[int, int], None] | None = None,
    unseen: Mapping[str, Callable[[Any], Operations]] = MappingProxyType({}),
) -> dict[str, Timing]:
    """Run every case on a device once a round, after one round that is not timed, in which operations are counted.

    Args:
        cases: name -> what is run.
        rounds: that are timed.
        device: where.
        listen: hears how many runs are over, and of how many.
        unseen: cases whose operations are not torch's -> what these are, by what the case made.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    first: dict[str, tuple[object, Operations]] = {}
    for number in range(rounds + 1):
        for place, (name, case) in enumerate(cases.items()):
            ledger = None if number or name in unseen else Ledger()
            with measuring(device) as cost, ledger or nullcontext():
                result = case()
            if number:
                taken[name].append(cost.seconds)
            else:
                first[name] = result, unseen[name](result) if ledger is None else ledger.operations
            if listen is not None:
                listen(number * len(cases) + place + 1, (rounds + 1) * len(cases))
    return {name: Timing(taken[name], *first[name]) for name in cases}


def compare(timings: Mapping[str, Timing], baseline: str, device: torch.device) -> list[dict[str, Any]]:
    """A row a case: median seconds, and the ratio to the baseline of the same round, with 95 % intervals; its
    arithmetic operations and bytes, and the floor, seconds below which these cannot fall. What a case alone takes of
    memory is known only to a process of its own."""
    rows = []
    for name, timing in timings.items():
        least = work(timing.operations, device)
        rows.append(
            {
                "name": name,
                "seconds": spread(torch.tensor(timing.seconds, dtype=torch.float64)),
                "ratio": spread(ratios(timing, timings[baseline])),
                "peak_mb": None,
                "flops": least.flops,
                "bytes": least.moved,
                "floor": least.seconds,
            }
        )
    return rows


def best_rates(timings: Mapping[str, Timing], device: torch.device) -> dict[str, dict[str, float]]:
    """Number format -> this machine's rates, of which floors were made."""
    counted = {one.dtype for timing in timings.values() for one in timing.operations if one.flops} | {torch.float32}
    return {name: asdict(rates(device, dtype)) for name, dtype in DTYPES.items() if dtype in counted}


def ratios(timing: Timing, other: Timing) -> torch.Tensor:
    """Of every round, how long one case took by another's measure."""
    seconds, wanted = (torch.tensor(one.seconds, dtype=torch.float64) for one in (timing, other))
    return seconds / wanted


def spread(rows: torch.Tensor) -> dict[str, float]:
    """The median of rounds, of an even number between both in the middle, with a 95 % interval."""
    found = bootstrap(rows, lambda some: float(some.quantile(0.5)))
    return {"median": found.mean, "low": found.low, "high": found.high}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def plain(rows: list[dict[str, Any]], baseline: str) -> str:
    """Aligned text for people; rows without seconds compare memory."""
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        said = [f"{row['name']:<{width}}"]
        if "seconds" in row:
            ratio = row["ratio"]
            said.append(f"{row['seconds']['median']:10.4f} s")
            said.append(f"{ratio['median']:8.2%} of {baseline} [{ratio['low']:.2%}, {ratio['high']:.2%}]")
        elif row["ratio"]:
            said.append(f"{row['ratio']:8.2%} of {baseline}")
        if row["peak_mb"]:
            said.append(f"{row['peak_mb']:.0f} MiB")
        if row.get("floor"):
            said.append(f"floor {row['floor']:.4f} s ({row['flops'] / 1e9:.4g} GFLOP, {row['bytes'] / 1e9:.4g} GB)")
        if row.get("of_one"):
            one = row["of_one"]
            said.append(f"{one['median']:.2%} of one control [{one['low']:.2%}, {one['high']:.2%}]")
        if row.get("apart") is not None:
            said.append(f"{row['apart']:.1e} apart")
        if row.get("computed"):
            said.append("computed " + ", ".join(f"{name} {share:.0%}" for name, share in row["computed"].items()))
        lines.append("  ".join(said))
    return "\n".join(lines)


def answered(rows: list[dict[str, Any]], jobs: Mapping[str, int]) -> str:
    """Aligned text for people, of a service's answers."""
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{row['name']:<{width}}  {row['requests']:6} requests  median {1e3 * row['p50']:7.1f} ms"
        f"  99 % within {1e3 * row['p99']:7.1f} ms"
        for row in rows
    ]
    return "\n".join([*lines, f"jobs at the end: {', '.join(f'{count} {state}' for state, count in jobs.items())}"])


def page(found: Mapping[str, Any], rounds: int | None) -> str:
    """A record as a page; without rounds it compares memory, or shows a service's answers."""
    if "jobs" in found:
        return render("benchmark.html", **found, rounds=None, most=max(row["p99"] for row in found["rows"]))
    shares = [row["ratio"]["median"] if "seconds" in row else row["ratio"] or 0.0 for row in found["rows"]]
    remembered = any(row["peak_mb"] for row in found["rows"])
    return render(
        "benchmark.html", **found, jobs={}, rounds=rounds, ratios=shares, most=max(shares) or 1.0, remembered=remembered
    )
