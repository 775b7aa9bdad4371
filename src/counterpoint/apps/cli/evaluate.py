"""``counterpoint evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    suite: Annotated[str, typer.Argument(help="conflicting, complementary, silent, single or tiny-quality.")],
    fusion: Annotated[
        list[str] | None, typer.Option(help="A rule to compare. Repeatable; default all.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Cases of each sort.", min=2, max=100_000)] = 64,
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
    from counterpoint.fusion import FUSIONS, get_fusion
    from counterpoint.types import UserError

    methods = [get_fusion(name).name for name in fusion or FUSIONS]
    folder = out or Path("counterpoint-evaluation") / suite
    record.check_writable(folder)
    output.quiet_libraries()

    import torch

    from counterpoint.apps.suites import SUITES, PipelineMaker, load_family, settle
    from counterpoint.evaluation.make import make, reader
    from counterpoint.evaluation.report import plain, records, sentences
    from counterpoint.evaluation.suite import Method

    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")
    began = time.perf_counter()
    pipe, readers, weights = load_family(model)
    settings = {"suite": suite, "weights": weights, "steps": steps, "guidance_scale": guidance_scale}
    settle(folder, settings)
    chosen, ways = SUITES[suite](pipe), [Method(name) for name in methods]
    with output.progress("making pictures", unit="picture") as listen:
        make(chosen.tasks(n, ways), PipelineMaker(pipe, steps, guidance_scale), folder / "pictures", batch_size, listen)
    output.say("scoring")
    with torch.no_grad():
        rows = chosen.score(reader(folder / "pictures"), n, ways, readers)
    results = {
        "schema": record.SCHEMA,
        "suite": suite,
        "n": n,
        "rows": records(rows, model),
        "differences": sentences(rows),
        "seconds": round(time.perf_counter() - began, 1),
        "settings": settings,
        "versions": record.versions(),
    }
    record.write_json(folder / "results.json", results)
    if json:
        output.record(results)
        return
    print(plain(results["rows"]))
    for sentence in results["differences"]:
        print(sentence)
    print(folder / "results.json")
