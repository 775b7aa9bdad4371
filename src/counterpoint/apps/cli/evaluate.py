"""``counterpoint evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_FILES = {"suite", "folders", "metrics", "inception", "lpips", "clip", "out", "json"}
"""What scoring files has options for."""
_RULES = ("conflicting", "complementary", "silent", "single")
"""Suites that join controls."""
_OWN = {
    **dict.fromkeys(("metrics", "lpips"), ("folder",)),
    **dict.fromkeys(("fusion", "rules", "sweep", "gate_silence", "quality", "steer", "manifest"), _RULES),
    "weight": (*_RULES, "layout", "style"),
    "versus": (*_RULES, "conservativity"),
    "baseline": (*_RULES, "layout", "style"),
    "layouts": ("layout",),
}
"""Option -> the only suites that do not ignore it."""
_FEW = 40
"""Differences that a terminal has room for."""


def evaluate(
    context: typer.Context,
    suite: Annotated[
        str,
        typer.Argument(
            help="conflicting, complementary, silent, single, layout, style, conservativity or tiny-quality; folder, "
            "to score files; or leaderboard, to gather stored results."
        ),
    ],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="For folder: A, or A and B, whose pictures are paired by file name. For leaderboard: where "
            "results.json files are."
        ),
    ] = None,
    metrics: Annotated[str, typer.Option(help="For folder: measures, separated by commas.", show_default=False)] = "",
    rules: Annotated[
        Path | None,
        typer.Option(metavar="FILE.py", help="Rules of your own: every function of a Python file, which is run."),
    ] = None,
    fusion: Annotated[
        list[str] | None,
        typer.Option(help="A rule to compare. Repeatable; default all, or sum with --sweep.", show_default=False),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="NAME=FROM:TO:STEP", help="Compare weights of a control.")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="How strongly a control speaks; for layout and style reference=0.8. Repeatable.",
            show_default=False,
        ),
    ] = None,
    gate_silence: Annotated[
        bool, typer.Option("--gate-silence", help="Try each rule a second time, gated as in generate --gate-silence.")
    ] = False,
    quality: Annotated[
        list[str] | None,
        typer.Option(help="Compare exact, balanced, fast as in generate. Repeatable.", show_default=False),
    ] = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE[,...]",
            help="Try each rule again, pushed towards controls as in generate --steer. Repeatable.",
        ),
    ] = None,
    versus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=FOLDER[,...]",
            help="Compare other networks of controls, on the same cases and noise. Repeatable.",
            show_default=False,
        ),
    ] = None,
    aggregate: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help="For layout and style: models that work together. Repeatable."),
    ] = None,
    aggregation: Annotated[
        list[str] | None,
        typer.Option(metavar="SETTINGS", help="For --aggregate: how, as in generate. Repeatable.", show_default=False),
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Cases of each sort.", min=1, max=100_000)] = 64,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The row that others are marked against, as tables call it; default the first."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Pictures of each case, from noise of their own.", min=1, max=1000)] = 1,
    model: Annotated[
        str, typer.Option(help="tiny, or another folder of the same layout with judges; with --data any model.")
    ] = "tiny",
    controlnet: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=FOLDER",
            help="The network of a control; on scenes in place of the family's.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET=FOLDER",
            help="Published photos in place of scenes: coco2017, bg20k, laion, multigen, multigen-depth, ade20k; or "
            "pairs of your own: pairs=MANIFEST, photos, backgrounds (see counterpoint pairs).",
            show_default=False,
        ),
    ] = None,
    read: Annotated[
        list[str] | None,
        typer.Option(
            "--reader",
            metavar="KIND=FOLDER",
            help="With --data: what reads depth or seg from pictures; with --layouts: detect and segment.",
            show_default=False,
        ),
    ] = None,
    layouts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For layout: COCO-MIG's mig_bench.json in place of scenes.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="List the pictures that cases are made of; if FILE is there, hold them against it."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1, max=1000)] = 20,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance; 1 is off; default as in generate.", min=0, max=100, show_default=False
        ),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What no picture should show.")] = "",
    batch_size: Annotated[int, typer.Option(help="Pictures made at a time.", min=1, max=1024)] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or openvino: a CPU, faster.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: bf16 where the hardware has it.")] = "fp32",
    ray: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Make the pictures on a Ray cluster; local is one on this machine."),
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Inception's weights: for fid and kid of folders and of --data.")
    ] = None,
    lpips: Annotated[Path | None, typer.Option(metavar="FILE", help="For lpips of folders.")] = None,
    clip: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A CLIP for folders or --data; tiny is the family's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures and results; default counterpoint-evaluation/SUITE.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one machine-readable record.")] = False,
) -> None:
    """Run a benchmark suite, or score pictures on disk.

    A killed run continues: pictures that are there are not made again.
    """
    import shlex
    import sys
    import time

    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.apps.cli.methods import methods_asked, models_asked
    from counterpoint.apps.cli.values import pairs
    from counterpoint.apps.suites import Source
    from counterpoint.fusion.own import read_rules
    from counterpoint.types import UserError

    _refuse_ignored(context, suite)
    if suite == "leaderboard":
        print(_gather(folders or [], out))
        return
    began = time.perf_counter()
    folder = out or Path("counterpoint-evaluation") / suite
    mine = {} if rules is None else {"rules": read_rules(rules)}
    if mine and ray:
        raise UserError("--rules are known to this process alone: leave --ray away")
    record.check_writable(folder)
    output.quiet_libraries()
    if suite == "folder":
        if not folders or len(folders) > 2 or not metrics:
            raise UserError("evaluate folder wants one or two folders and --metrics NAME,NAME,...")
        names = list(dict.fromkeys(name.strip() for name in metrics.split(",")))
        results, strips = _score(folders, names, inception, lpips, clip), {}
    else:
        if folders:
            raise UserError(f"folders belong to evaluate folder, not to the suite {suite!r}")
        source = Source(
            model=model,
            controls=pairs("--controlnet", controlnet),
            data={name: Path(place) for name, place in pairs("--data", data).items()},
            layouts=layouts,
            readers={name: Path(place) for name, place in pairs("--reader", read).items()},
            clip=clip,
            inception=inception,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            scheduler="ddim" if aggregate else "unipc",
            device=device,
            dtype=dtype,
        )
        if aggregate and (fusion or sweep or gate_silence):
            raise UserError("--aggregate compares models; --fusion, --sweep and --gate-silence compare rules")
        if aggregate or suite in {"layout", "style"}:
            methods = models_asked(aggregate or ["base"], aggregation or [""], weight)
        else:
            methods = methods_asked(
                fusion, sweep, weight, gate_silence, quality or ["exact"], steer or [], versus or []
            )
        if baseline is not None:
            methods = _led_by(baseline, methods)
        results, strips = _run(suite, source, methods, n, seeds, batch_size, ray, manifest, folder, mine)
    results = {
        "schema": record.SCHEMA,
        "suite": suite,
        **results,
        "seconds": round(time.perf_counter() - began, 1),
        "command": shlex.join(["counterpoint", *sys.argv[1:]]),
        "versions": record.versions(),
    }
    _write(folder, results, strips)
    if json:
        output.record(results)
        return

    from counterpoint.evaluation.report import plain

    print(plain(results["rows"]))
    told = results["differences"]
    for sentence in told[:_FEW]:
        print(sentence)
    if len(told) > _FEW:
        print(f"and {len(told) - _FEW} more differences that hold: {folder / 'results.md'}")
    print(folder / "index.html")


def _led_by(baseline: str, methods: list[Any]) -> list[Any]:
    from counterpoint.types import UserError

    names = [method.name for method in methods]
    if baseline not in names:
        raise UserError(f"--baseline {baseline!r}: no row is called so; there are {', '.join(map(repr, names))}")
    return sorted(methods, key=lambda method: method.name != baseline)


def _refuse_ignored(context: typer.Context, suite: str) -> None:
    """Hold the options that were given against those that a suite heeds.

    Raises:
        UserError: it would ignore one.
    """
    from counterpoint.types import UserError

    names = {one.name: one.opts[0] for one in context.command.params}
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if name not in {"folder": _FILES, "leaderboard": {"suite", "folders", "out"}}.get(suite, {name}):
            raise UserError(f"{names[name]} is for suites; evaluate {suite} does not heed it")
        if suite not in _OWN.get(name, (suite,)):
            raise UserError(f"{names[name]} belongs to evaluate {', '.join(_OWN[name])}; {suite} would ignore it")


def _gather(folders: list[Path], out: Path | None) -> Path:
    """Every ``results.json`` below some folders, as one Markdown page."""
    from json import JSONDecodeError, loads

    from counterpoint.apps import record
    from counterpoint.evaluation.leaderboard import leaderboard
    from counterpoint.types import UserError

    found = sorted(path for folder in folders for path in folder.rglob("results.json"))
    if not found or out is None or out.suffix != ".md":
        raise UserError("evaluate leaderboard wants folders that hold results, and --out NAME.md")
    results = []
    for path in found:
        try:
            results.append((path.parent.name, {**loads(path.read_text())}))
        except (OSError, UnicodeDecodeError, JSONDecodeError, TypeError):
            raise UserError(f"{path} is no results file") from None
    record.write_text(out, leaderboard(out.stem.capitalize(), results, record.SCHEMA))
    return out


def _score(
    folders: list[Path], metrics: list[str], inception: Path | None, lpips: Path | None, clip: Path | None
) -> dict[str, Any]:
    from counterpoint.apps.cli import output
    from counterpoint.apps.folder import Networks, pictures_in, score_folders
    from counterpoint.evaluation.report import records

    with output.progress("scoring", unit="picture") as listen:
        rows = score_folders(
            metrics, folders[0], folders[1] if len(folders) > 1 else None, Networks(inception, lpips, clip), listen
        )
    return {"n": len(pictures_in(folders[0])), "rows": records(rows, ""), "differences": []}


def _run(
    suite: str,
    source: Any,
    methods: list[Any],
    n: int,
    seeds: int,
    batch_size: int,
    ray: str | None,
    manifest: Path | None,
    folder: Path,
    mine: dict[str, str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    from counterpoint.apps.cli import output
    from counterpoint.apps.evaluation_page import strips
    from counterpoint.apps.record import settle, write_text
    from counterpoint.apps.suites import SUITES, executor, identity, make_bench, make_suite, pin, rehearse
    from counterpoint.evaluation.make import costs, make, reader
    from counterpoint.evaluation.report import records, scores, sentences
    from counterpoint.evaluation.seeds import Seeded
    from counterpoint.types import UserError

    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}, folder and leaderboard")
    bench = make_bench(source)
    chosen = make_suite(suite, bench, methods)
    seeded = Seeded(chosen, seeds)
    tasks = seeded.tasks(n, methods)
    known = sorted({label for task in tasks for label in task.images})
    if unknown := sorted({label for method in methods if not method.models for label in method.weights} - set(known)):
        raise UserError(f"{unknown[0]}: the suite has no such control to weigh; it has {', '.join(known)}")
    if tasks:
        rehearse(chosen, bench, n, methods)
    elif seeds > 1:
        raise UserError(f"{suite} makes no pictures: leave --seeds away")
    if manifest is not None:
        pin(manifest, suite, chosen, n)
    settings = {"suite": suite, **identity(bench, methods), **mine, "batch_size": batch_size}
    settle(folder, settings, "choose another --out")
    with output.progress("making pictures", unit="picture") as listen:
        make(tasks, executor(source, bench.maker, ray), folder / "pictures", batch_size, listen)
    output.say("scoring")
    with torch.no_grad():
        rows = seeded.score(reader(folder / "pictures"), n, methods, bench.readers)
    write_text(folder / "scores.csv", scores(rows))
    return {
        "n": n,
        "seeds": seeds,
        "rows": records(rows, source.model),
        "differences": sentences(rows),
        **costs(folder / "pictures"),
        "settings": settings,
    }, strips(tasks, reader(folder / "pictures"))


def _write(folder: Path, results: dict[str, Any], strips: dict[str, Any]) -> None:
    """Numbers for programs, tables for papers, a page for people."""
    from counterpoint.apps import record
    from counterpoint.apps.evaluation_page import page
    from counterpoint.evaluation.report import latex, markdown

    said = "".join(f"- {sentence}\n" for sentence in results["differences"])
    texts = {
        "results.md": markdown(results["rows"]) + "\n" + said,
        "results.tex": latex(results["rows"]),
        "index.html": page(results, strips),
    }
    record.write_json(folder / "results.json", results)
    for name, text in texts.items():
        record.write_text(folder / name, text)
