"""``counterpoint batch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def batch(
    jobs: Annotated[
        Path, typer.Argument(help='JSON lines: each what generate takes, such as {"id": "a", "prompt": "..."}.')
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and results.jsonl.")] = Path("counterpoint-batch"),
    batch_size: Annotated[int, typer.Option(help="Pictures made at a time.", min=1, max=1024)] = 16,
    ray: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Work on a Ray cluster that sees the same folders; local is one here."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Of lines that name none: cpu, cuda, cuda:1, mps, or openvino: a CPU, faster.")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of lines that name none: fp32, bf16, fp16, or auto: bf16 where the hardware has it.")
    ] = "fp32",
    json: Annotated[bool, typer.Option("--json", help="Print one machine-readable record.")] = False,
) -> None:
    """Make the pictures of many jobs. A killed run continues: pictures that are there are not made again."""
    import time

    from counterpoint.api import find_device
    from counterpoint.apps import record
    from counterpoint.apps.batch import RESULTS, read_jobs, run_jobs
    from counterpoint.apps.cli import output

    find_device(device)
    asked = read_jobs(jobs, device, output.told_dtype(dtype, device))
    for number, reason in asked.bad.items():
        output.say(f"line {number} of {jobs}: {reason}")
    output.quiet_libraries()
    began = time.perf_counter()
    with output.spoken_warnings(), output.progress("making pictures", unit="job") as listen:
        failed = run_jobs(asked.requests, out, batch_size=batch_size, ray=ray, listen=listen)
    for name, reason in failed.items():
        output.say(f"line {asked.lines[name]} of {jobs}, job {name}: {reason}")
    done = len(asked.requests) - len(failed)
    if json:
        output.record(
            {
                "schema": record.SCHEMA,
                "done": done,
                "failed": failed,
                "bad_lines": asked.bad,
                "results": out / RESULTS,
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
    else:
        print(f"{done} of {len(asked.requests) + len(asked.bad)} jobs are done")
        print(out / RESULTS)
    if failed or asked.bad:
        raise typer.Exit(2)
