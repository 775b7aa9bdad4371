"""``counterpoint benchmark``."""

from __future__ import annotations

from typing import Annotated

import typer


def benchmark(
    what: Annotated[
        str,
        typer.Argument(
            help="fusion: every rule's operator, and whole steps; generate: pictures with two controls, beside stock "
            "diffusers; train: a step of every training method; batch: jobs together and one by one; aggregate: "
            "pictures by models that work together."
        ),
    ] = "fusion",
    size: Annotated[
        str, typer.Option(help="tiny, or sd15: Stable Diffusion 1.5's shapes at 512 x 512, random weights.")
    ] = "tiny",
    rounds: Annotated[int, typer.Option(help="How often everything is timed, in turns.", min=3, max=1000)] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    json: Annotated[bool, typer.Option("--json", help="Print one machine-readable record.")] = False,
) -> None:
    """Measure speed and memory, everything in one process and in turns."""
    from counterpoint.api import DTYPES, find_device
    from counterpoint.apps import benchmark as bench
    from counterpoint.apps import record
    from counterpoint.apps.benchmark_batch import batch_cases
    from counterpoint.apps.benchmark_cases import SIZES, aggregate_cases, fusion_cases
    from counterpoint.apps.benchmark_generate import generate_cases
    from counterpoint.apps.benchmark_train import train_cases
    from counterpoint.apps.cli import output
    from counterpoint.types import UserError

    kinds = {
        "fusion": fusion_cases,
        "generate": generate_cases,
        "train": train_cases,
        "batch": batch_cases,
        "aggregate": aggregate_cases,
    }
    for name, value, known in (
        ("benchmark", what, kinds),
        ("--size", size, SIZES),
        ("--dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise UserError(f"{name} {value}: there are {', '.join(known)}")
    output.quiet_libraries()
    output.say("preparing")
    where = find_device(device)
    compared = kinds[what](size, where, DTYPES[dtype])
    with output.progress("measuring", unit="case") as listen:
        rows = bench.compare(bench.alternate(compared.cases, rounds, where, listen), compared.baseline)
    for row in rows:
        row["floor"] = compared.floors.get(row["name"])
    if json:
        output.record(
            {
                "schema": record.SCHEMA,
                "what": what,
                "size": size,
                "dtype": dtype,
                "rows": rows,
                "baseline": compared.baseline,
                "machine": bench.machine(where),
            }
        )
        return
    print(bench.plain(rows, compared.baseline))
    print(", ".join(f"{key} {value}" for key, value in bench.machine(where).items()))
