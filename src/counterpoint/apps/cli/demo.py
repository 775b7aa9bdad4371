"""``counterpoint demo``: the main job, offline, with nothing to prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("counterpoint-demo"),
    seed: Annotated[int, typer.Option(help="Seed of every picture.")] = 7,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1, max=1000)] = 20,
) -> None:
    """Let two controls conflict, agree and fall silent; show every fusion rule side by side on one page."""
    import time

    import PIL.Image
    import torch

    from counterpoint.api import load
    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.apps.record import save_png, write_whole
    from counterpoint.data.pairs import complementary, conflicting, silent
    from counterpoint.fusion import FUSIONS
    from counterpoint.pages import render
    from counterpoint.types import CONTROL_KINDS

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
    rows: list[dict[str, Any]] = []
    for title, about, case in cases:
        kinds = list(case.images)
        pipe = load("tiny", kinds)
        prefix = title.lower()
        shown = []
        for kind, picture in case.images.items():
            name = f"{prefix}-{kind}.png"
            write_whole(out / name, lambda file, picture=picture: PIL.Image.fromarray(picture).save(file, "PNG"))
            shown.append({"file": name, "label": kind, "note": CONTROL_KINDS[kind].summary})
        for rule in [None, *FUSIONS.values()]:
            name = f"{prefix}-{rule.name if rule else 'prompt-only'}.png"
            start = time.perf_counter()
            image = pipe(
                case.prompt,
                [PIL.Image.fromarray(picture) for picture in case.images.values()],
                fusion=rule or "sum",
                subject=case.subject if rule and rule.keys else None,
                controlnet_conditioning_scale=1.0 if rule else 0.0,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            seconds = time.perf_counter() - start
            recipe = {
                "demo": prefix,
                "prompt": case.prompt,
                "controls": kinds,
                "fusion": rule and rule.name,
                "seed": seed,
                "steps": steps,
                "versions": record.versions(),
            }
            save_png(image, out / name, recipe)
            shown.append(
                {
                    "file": name,
                    "label": rule.name if rule else "prompt only",
                    "note": rule.summary if rule else "no control",
                    "seconds": seconds,
                }
            )
            output.say(f"{title}: {rule.name if rule else 'prompt only'} in {seconds:.1f} s")
        rows.append({"title": title, "about": about, "prompt": case.prompt, "pictures": shown, "kinds": kinds})
    page = render(
        "demo.html", rows=rows, seed=seed, steps=steps, seconds=time.perf_counter() - began, versions=record.versions()
    )
    write_whole(out / "index.html", lambda file: file.write(page.encode()))
    print(out / "index.html")
