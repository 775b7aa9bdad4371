"""``counterpoint benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def benchmark(
    what: Annotated[
        str,
        typer.Argument(
            help="fusion: every rule's operator, and whole steps; generate: pictures with two controls, beside stock "
            "diffusers; memory: a picture with four controls, each way in a process of its own; train: a step of every "
            "training method; batch: jobs together and one by one; aggregate: pictures by models that work together; "
            "serve: the service's answers to 16 clients at once."
        ),
    ] = "fusion",
    size: Annotated[
        str,
        typer.Option(
            help="tiny, or random weights of the shapes of Stable Diffusion 1.5 at 512 x 512 (sd15) or of SDXL at "
            "1024 x 1024 (sdxl: fusion and generate); train and batch at tiny and sd15."
        ),
    ] = "tiny",
    rounds: Annotated[
        int | None,
        typer.Option(help="How often everything is timed, in turns; default 5, of serve 40.", min=3, max=1000),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    steps: Annotated[
        int | None,
        typer.Option(
            help="For generate: of a picture; default 20, at sd15 and sdxl 2; balanced and fast want 4.",
            min=1,
            max=1000,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CASE",
            help="This case beside the one that it is compared with. Repeatable. What takes minutes to compile, such "
            'as "exact, compiled, fp32" of generate, is timed only if named.',
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for benchmark.json and a page.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one machine-readable record.")] = False,
) -> None:
    """Measure speed and memory, everything in one process and in turns."""
    import shlex
    import sys

    import torch

    from counterpoint.api import DTYPES, find_device
    from counterpoint.apps import benchmark as bench
    from counterpoint.apps import record
    from counterpoint.apps.benchmark_batch import batch_cases
    from counterpoint.apps.benchmark_cases import aggregate_cases, chosen, fusion_cases
    from counterpoint.apps.benchmark_generate import STOCK, generate_cases, notes
    from counterpoint.apps.benchmark_memory import apart, memory_rows
    from counterpoint.apps.benchmark_models import SIZES
    from counterpoint.apps.benchmark_serve import ROUNDS, serve_rows
    from counterpoint.apps.benchmark_train import step_peak, train_cases
    from counterpoint.apps.cli import output
    from counterpoint.types import Notice, UserError

    kinds: dict[str, Any] = {
        "fusion": fusion_cases,
        "generate": generate_cases,
        "train": train_cases,
        "batch": batch_cases,
        "aggregate": aggregate_cases,
        "memory": memory_rows,
        "serve": serve_rows,
    }
    for name, value, known in (
        ("benchmark", what, kinds),
        ("--size", size, SIZES),
        ("--dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise UserError(f"{name} {value}: there are {', '.join(known)}")
    if steps is not None and what != "generate":
        raise UserError(f"--steps is for benchmark generate; {what} does not heed it")
    if (rounds is not None or only) and what == "memory":
        raise UserError("--rounds and --only are for what is timed; benchmark memory does not heed them")
    if only and what == "serve":
        raise UserError("--only is for cases that are compared; benchmark serve does not heed it")
    times, threads = rounds or 5, torch.get_num_threads()
    if out is not None:
        record.check_writable(out)
    output.quiet_libraries()
    output.say("preparing")
    where, kind = find_device(device), DTYPES[dtype]
    rates: dict[str, Any] = {}
    jobs: dict[str, int] = {}
    baseline = ""
    with output.spoken_warnings(Notice), output.progress("measuring", unit="case") as listen:
        if what == "memory":
            rows, baseline = memory_rows(size, where, kind, listen), STOCK
        elif what == "serve":
            rows, jobs = serve_rows(size, where, kind, rounds or ROUNDS, listen)
        else:
            more = {"steps": steps, "only": only or ()} if what == "generate" else {}
            compared = kinds[what](size, where, kind, **more)
            cases = chosen(compared.cases, only or (), compared.baseline)
            timings, baseline = bench.alternate(cases, times, where, listen, compared.unseen), compared.baseline
            beside = notes(timings) if what == "generate" else {}
            rates = bench.best_rates(timings, where)
            rows = [{**row, **beside.get(row["name"], {})} for row in bench.compare(timings, baseline, where)]
            if what == "train":
                for row in rows:
                    row["peak_mb"] = apart(step_peak, row["name"], size, str(where), threads)
    found = {
        "schema": record.SCHEMA,
        "what": what,
        "size": size,
        "dtype": dtype,
        "rows": rows,
        "baseline": baseline,
        "machine": bench.machine(where),
        **({"rates": rates} if rates else {}),
        **({"jobs": jobs} if jobs else {}),
        "command": shlex.join(["counterpoint", *sys.argv[1:]]),
        "versions": record.versions(),
    }
    if out is not None:
        record.write_json(out / "benchmark.json", found)
        record.write_text(out / "index.html", bench.page(found, None if what in ("memory", "serve") else times))
    if json:
        output.record(found)
        return
    print(bench.answered(rows, jobs) if jobs else bench.plain(rows, baseline))
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
