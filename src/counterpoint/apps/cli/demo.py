"""``counterpoint demo``: the main job, offline, with nothing to prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("counterpoint-demo"),
    seed: Annotated[int, typer.Option(help="Seed of every picture.", min=0, max=2**63 - 1)] = 7,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1, max=1000)] = 20,
) -> None:
    """Let two controls conflict, agree and fall silent; show every fusion rule side by side on one page."""
    import time

    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.data.pairs import complementary, conflicting, silent
    from counterpoint.pages import render

    record.check_writable(out)
    output.quiet_libraries()
    began = time.perf_counter()
    cases = [
        (
            "Conflict",
            "The pose is from one scene, the segmentation from another in which nobody stands there.",
            conflicting(2),
        ),
        ("Agreement", "Edges and depth of one and the same scene.", complementary(9, ("canny", "depth"))),
        (
            "Silence",
            "Edges speak on the left, a pose on the right. Elsewhere each is black: it has nothing to say.",
            silent(4, "split"),
        ),
    ]
    rows = [_row(title, about, case, out, seed, steps) for title, about, case in cases]
    seconds = time.perf_counter() - began
    told = {"seed": seed, "steps": steps, "seconds": seconds, "versions": record.versions()}
    page = render("demo.html", rows=rows, guidance=rows[0]["guidance"], **told)
    record.write_text(out / "index.html", page)
    print(out / "index.html")


def _row(title: str, about: str, case: Any, out: Path, seed: int, steps: int) -> dict[str, Any]:
    """One case: its controls, the prompt alone, every rule, and where silence matters, silence gated."""
    import time

    import PIL.Image
    import torch

    from counterpoint.api import load
    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.fusion import FUSIONS, get_fusion
    from counterpoint.fusion.minimal_impact import trained_injection
    from counterpoint.types import CONTROL_KINDS

    prefix, pipe = title.lower(), load("tiny", list(case.images))
    hints = [PIL.Image.fromarray(picture) for picture in case.images.values()]
    shown: list[dict[str, Any]] = []
    for kind, hint in zip(case.images, hints, strict=True):
        name = f"{prefix}-{kind}.png"
        record.write_whole(out / name, lambda file, hint=hint: hint.save(file, "PNG"))
        shown.append({"file": name, "label": kind, "note": CONTROL_KINDS[kind].summary})
    tries: list[tuple[str, str, dict[str, Any]]] = [
        ("prompt only", "no control", {"controlnet_conditioning_scale": 0.0})
    ]
    for rule in FUSIONS.values():
        told = {"subject": case.subject} if rule.keys else {}
        report = {"report": title == "Conflict" and rule.name in {"sum", "cross"}}
        tries.append((rule.name, rule.summary, {"fusion": rule, "gate_silence": False, **told, **report}))
    trained: dict[str, Any] = {}
    if title == "Silence":
        note = "each speaks only where it shows something"
        tries.append(("sum, gated", note, {"fusion": "sum", "gate_silence": True}))
        learnt = load("tiny", [f"{kind}:mi" for kind in case.images])
        rule = get_fusion(trained_injection(learnt.controls[learnt.labels[0]]).rule)
        trained["minimal-impact, trained"] = learnt
        tries.append(("minimal-impact, trained", "by networks that learnt to be taken in so", {"fusion": rule}))
    for label, note, how in tries:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        model = trained.get(label, pipe)
        made = model(case.prompt, hints, num_inference_steps=steps, generator=generator, **how)
        picture = {"file": f"{prefix}-{label.replace(', ', '-').replace(' ', '-')}.png", "label": label, "note": note}
        picture |= {"seconds": time.perf_counter() - began, "won": None}
        recipe = {
            "demo": prefix,
            "prompt": case.prompt,
            "controls": model.labels,
            "fusion": None if label == "prompt only" else label.partition(",")[0],
            "seed": seed,
            "steps": steps,
            "guidance_scale": pipe.guidance_scale,
            "versions": record.versions(),
        }
        record.save_png(made.images[0], out / picture["file"], recipe)
        if made.report is not None:
            picture["won"] = Path(picture["file"]).with_suffix(".html").name
            record.write_text(out / picture["won"], made.report.html())
        shown.append(picture)
        output.say(f"{title}: {label} in {picture['seconds']:.1f} s")
    case_of = {"title": title, "about": about, "prompt": case.prompt, "kinds": list(case.images)}
    return {**case_of, "pictures": shown, "guidance": pipe.guidance_scale}
