"""``counterpoint evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    suite: Annotated[str, typer.Argument(help="tiny-quality.")],
    n: Annotated[int, typer.Option(help="Test scenes a row.", min=2, max=100_000)] = 256,
    model: Annotated[str, typer.Option(help="tiny, or another folder of the same layout with judges.")] = "tiny",
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1, max=1000)] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.", min=0, max=100)] = 7.5,
    batch_size: Annotated[int, typer.Option(help="Pictures made at a time.", min=1, max=1024)] = 16,
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures and results; default counterpoint-evaluation/SUITE.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one machine-readable record.")] = False,
) -> None:
    """Run a benchmark suite. A killed run continues: pictures that are there are not made again."""
    import time

    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.apps.suites import SUITES, settle, table
    from counterpoint.evaluation.make import make, reader
    from counterpoint.types import UserError

    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")
    folder = out or Path("counterpoint-evaluation") / suite
    record.check_writable(folder)
    output.quiet_libraries()
    began = time.perf_counter()
    chosen = SUITES[suite](model, steps, guidance_scale)
    settle(folder, {"suite": suite, "model": chosen.model_hash, "steps": steps, "guidance_scale": guidance_scale})
    with output.progress("making pictures", unit="picture") as listen:
        make(chosen.tasks(n), chosen.make, folder / "pictures", batch_size, listen)
    output.say("scoring")
    rows = chosen.score(reader(folder / "pictures"), n)
    results = {
        "schema": record.SCHEMA,
        "suite": suite,
        "n": n,
        "rows": [row.record() for row in rows],
        "seconds": round(time.perf_counter() - began, 1),
        "settings": {"steps": steps, "guidance_scale": guidance_scale, "model": chosen.model_hash},
        "versions": record.versions(),
    }
    record.write_json(folder / "results.json", results)
    if json:
        output.record(results)
    else:
        print(table(rows))
        print(folder / "results.json")
