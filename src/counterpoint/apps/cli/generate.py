"""``counterpoint generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows. ball++ and (a red ball)1.3 weigh words.")],
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=IMAGE",
            help="A condition image; NAME is a kind (pose, depth, seg, canny, hed, ...) or kind:label for a "
            "second one. Repeatable.",
        ),
    ] = None,
    photo: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PHOTO", help="A photo from which the condition image is extracted."),
    ] = None,
    extractor: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="For --photo: the model that does it; see counterpoint extract."),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT", help="Strength of a control, or a schedule such as 0:1,0.5:0.4. Default 1."
        ),
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=START:END", help="Part of the steps, in 0..1, in which a control speaks."),
    ] = None,
    controlnet: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="Another ControlNet for a control: folder, .safetensors or hub id."),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=IMAGE", help="Where a control speaks: white fully, grey partly, black not at all."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODE", help="What comes first: balanced (default), prompt or control."),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PROBE", help="What reads a control from the model's features, for --report and --steer."
        ),
    ] = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE",
            help="Push every step towards a control as its probe reads it, by this share of the prediction, or a "
            "schedule such as 0:0.1,0.5:0. Try 0.05.",
        ),
    ] = None,
    gate_silence: Annotated[
        bool | None,
        typer.Option(
            "--gate-silence/--no-gate-silence",
            help="Let edges and poses speak only near what they show, so that their black wipes nothing out; default "
            "where there are several controls, but not under sum and minimal-impact.",
        ),
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(metavar="FILE.py", help="Rules of your own: every function of a Python file, which is run."),
    ] = None,
    fusion: Annotated[
        str,
        typer.Option(
            help="How controls become one: sum, mean, max, mgda, minimal-impact, maxfusion, pix, channel, "
            "pix+channel, cross-authors or cross; with settings as in cross:delta=0.5, over the steps as in "
            "0:cross,0.5:sum."
        ),
    ] = "pix+channel",
    foreground: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="For cross: the control that shows the subject; default the first.", show_default=False
        ),
    ] = None,
    subject: Annotated[
        list[str] | None,
        typer.Option(metavar="WORDS", help="For cross: the subject's words in the prompt.", show_default=False),
    ] = None,
    subject_mask: Annotated[
        list[Path] | None,
        typer.Option(metavar="IMAGE", help="For cross: white where the subject is.", show_default=False),
    ] = None,
    layout: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSON: what stands where, who does what to whom, whose style; for --aggregate."
        ),
    ] = None,
    aggregate: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Models that work together; the picture is the first one's. Names of the model's own adapters "
            "(its folder adapters), paths to adapters, or base. One alone is fine.",
        ),
    ] = None,
    aggregation: Annotated[
        str,
        typer.Option(
            metavar="SETTINGS",
            help="How they do, such as steps=3,weights=0.5,eta=0.3x,mix=slerp; or paper, paper-style, paper-three, "
            "authors.",
        ),
    ] = "",
    model: Annotated[str, typer.Option(help="tiny, a diffusers folder, a .safetensors file or a hub id.")] = "tiny",
    config: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="For a single-file model: the diffusers folder with its configurations."),
    ] = None,
    lora: Annotated[list[str] | None, typer.Option(metavar="PATH[:SCALE]", help="A LoRA. Repeatable.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to guide away from.")] = "",
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="unipc, ddim, euler, euler-a, dpm++, ... or a diffusers class name, with settings of its own such as "
            "use_karras_sigmas=true; default unipc, or ddim with --aggregate.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 is off; default what the model's folder says, or 7.5."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the others count up from it.")] = 0,
    n: Annotated[int, typer.Option("--n", "-n", help="Images to make.")] = 1,
    width: Annotated[int | None, typer.Option(help="In pixels; default the model's own size.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    resize: Annotated[
        str, typer.Option(help="How images are brought to size: fill (crop), fit (pad) or stretch.")
    ] = "fill",
    init_image: Annotated[Path | None, typer.Option(metavar="IMAGE", help="Start from this picture.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far the start picture is noised, in (0, 1]; default 0.8.")
    ] = None,
    inpaint_mask: Annotated[Path | None, typer.Option(metavar="IMAGE", help="Repaint only what is white here.")] = None,
    quality: Annotated[
        str,
        typer.Option(
            help="exact; balanced or fast foretell a part of what controls and UNet say within a bound of its "
            "estimated error, hold guidance at fixed steps without one, and say what."
        ),
    ] = "exact",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or openvino: a CPU, faster.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: bf16 where the hardware has it.")] = "fp32",
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="What weights and intermediate results may take; networks come and go so that it suffices.",
            min=0.01,
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what this needs, and stop.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the images, or one file name ending in .png.")] = Path(
        "counterpoint-out"
    ),
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Beside each image, a page that shows which control was heard where, and the layout drawn over it.",
        ),
    ] = False,
    tune: Annotated[
        int,
        typer.Option(
            metavar="K", help="Then try up to K changes at few steps, and say which help the controls.", min=0, max=20
        ),
    ] = 0,
    reader: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=FOLDER", help="For --report and --tune: what reads depth or seg back from a picture."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one machine-readable record.")] = False,
) -> None:
    """Turn a prompt and any number of controls into images."""
    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.apps.cli.values import pairs, window_of
    from counterpoint.apps.request import ControlRequest, GenerateRequest, build
    from counterpoint.fusion.own import read_rules
    from counterpoint.types import Notice, UserError, kind_of

    images = pairs("--control", control)
    photos = pairs("--photo", photo)
    both = sorted(set(images) & set(photos))
    if both:
        raise UserError(
            f"{both[0]!r} is given as --control and as --photo; name the second one {kind_of(both[0])}:SOMETHING"
        )
    details = {
        option: pairs(f"--{option}", given)
        for option, given in (
            ("weight", weight),
            ("window", window),
            ("controlnet", controlnet),
            ("extractor", extractor),
            ("mask", mask),
            ("mode", mode),
            ("probe", probe),
            ("steer", steer),
        )
    }
    for option, values in details.items():
        for name in values:
            if name not in images and name not in photos:
                raise UserError(
                    f"--{option} {name}=...: there is no control {name!r}; there are "
                    f"{', '.join([*images, *photos]) or 'none'}"
                )
    if unused := sorted(set(details["extractor"]) - set(photos)):
        raise UserError(f"--extractor {unused[0]}=... needs --photo {unused[0]}=PHOTO")
    if rules is not None:
        read_rules(rules)
    request = build(
        GenerateRequest,
        prompt=prompt,
        controls=tuple(
            build(
                ControlRequest,
                label=name,
                image=Path(path),
                photo=name in photos,
                extractor=details["extractor"].get(name),
                weight=details["weight"].get(name, "1"),
                window=window_of(name, details["window"].get(name)),
                controlnet=details["controlnet"].get(name),
                mask=details["mask"].get(name),
                mode=details["mode"].get(name, "balanced"),
                probe=details["probe"].get(name),
                steer=details["steer"].get(name, "0"),
            )
            for name, path in {**images, **photos}.items()
        ),
        gate_silence=gate_silence,
        foreground=tuple(foreground or ()),
        subject=tuple(subject or ()),
        subject_mask=tuple(subject_mask or ()),
        negative_prompt=negative_prompt,
        model=model,
        config=config,
        lora=tuple(lora or ()),
        layout=layout,
        aggregate=tuple(one.strip() for one in aggregate.split(",")) if aggregate else (),
        aggregation=aggregation,
        fusion=fusion,
        scheduler=scheduler or ("ddim" if aggregate else "unipc"),
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        n=n,
        width=width,
        height=height,
        resize=resize,
        init_image=init_image,
        **({} if strength is None else {"strength": strength}),
        inpaint_mask=inpaint_mask,
        quality=quality,
        device=device,
        dtype=dtype,
    )
    if reader and not (report or tune):
        raise UserError("--reader belongs to --report and --tune: nothing else reads pictures")
    if tune and not request.controls:
        raise UserError("--tune: there are no controls to follow")
    single = record.names_picture(out)
    if single and n > 1:
        raise UserError(f"--out {out} is one file for {n} images; give a folder")
    record.check_spared([out], request.inputs)

    from dataclasses import asdict

    from counterpoint.apps import planning
    from counterpoint.apps.replay import recipe_of
    from counterpoint.apps.run import run

    if plan:
        output.quiet_libraries()
        planned, _ = planning.prepare(request, memory)
        output.record({"schema": record.SCHEMA, "plan": planned.record}) if json else print(planned.table)
        return
    record.check_writable(out.parent if single else out)
    output.quiet_libraries()
    readers = _readers(request, tune, pairs("--reader", reader)) if report or tune else {}
    output.told_dtype(dtype, device)

    with output.spoken_warnings(Notice), output.progress("sampling") as listen:
        if memory is None:
            planned, result = None, run(request, listen=listen, report=report)
        else:
            planned, result = planning.run_within(request, memory, output.say, listen=listen, report=report)
    paths = [out] if single else [_free(out, image_seed) for image_seed in result.seeds]
    recipe = recipe_of(result)
    for path, image_seed, image in zip(paths, result.seeds, result.images, strict=True):
        record.save_png(image, path, {**recipe, "seed": image_seed})
    for each in result.thrift:
        for name, one in each.items():
            output.say(f"{name}: {one.share:.0%} computed, the rest foretold, wrong by an estimated {one.error:.0%}")
    saved = [{name: asdict(one) for name, one in each.items()} for each in result.thrift]
    pages, trials = [], []
    if report or tune:
        pages, trials = _looked(request, result, paths, tune, readers)
    if json:
        output.record(
            {
                "schema": record.SCHEMA,
                "images": paths,
                "seeds": result.seeds,
                "seconds": round(result.seconds, 3),
                "steps": steps,
                "fusion": fusion,
                "model": model,
                "quality": quality,
                **({"plan": planned.record} if planned else {}),
                **({"thrift": saved} if saved else {}),
                **({"tuned": [{"options": one.options, "followed": one.followed} for one in trials]} if trials else {}),
            }
        )
    else:
        for path in (*paths, *pages):
            print(path)


def _readers(request: Any, tune: int, named: dict[str, str]) -> dict[str, Any]:
    """What reads the request's controls back; before anything is made, so that a wrong path costs no minute."""
    from counterpoint.apps.readers import control_readers
    from counterpoint.models.load import locate
    from counterpoint.types import UserError

    maps = control_readers(locate(request.model), {kind: Path(path) for kind, path in named.items()})
    unread = [control.label for control in request.controls if control.kind not in maps]
    if tune and unread:
        raise UserError(f"--tune: nothing here reads {unread[0]} from a picture; name what does with --reader")
    return maps


def _looked(
    request: Any, result: Any, paths: list[Path], tune: int, maps: dict[str, Any]
) -> tuple[list[Path], list[Any]]:
    """Pages that show who was heard, and trials of what might help."""
    import numpy as np
    import PIL.Image

    from counterpoint.apps import record
    from counterpoint.apps import tune as tuning
    from counterpoint.apps.cli import output

    trials = []
    if tune:
        with output.progress("tuning", unit="trial") as listen:
            trials = tuning.tune(request, result.pipe, maps, tune, listen)
        for trial in trials:
            followed = ", ".join(f"{label} {value:.2f}" for label, value in trial.followed.items())
            output.say(f"{trial.options or 'as asked'}: {followed}")
        output.say(tuning.verdict(trials))
    pages = [path.with_suffix(".html") for path in paths] if result.report else []
    for number, page in enumerate(pages):
        read = tuning.read_back(result, maps, number)
        advice = [tuning.verdict(trials)] if trials else tuning.advice(request, result.report.shares(number), read)
        readings = {label: (one.image, one.agreement) for label, one in read.items()}
        thrift = result.thrift[0] if result.thrift else {}
        record.write_text(page, result.report.html(number, readings, advice, thrift))
    if result.layout is not None:
        from counterpoint.conditions.layout import draw_layout

        for path, image in zip(paths, result.images, strict=True):
            pages.append(path.with_suffix(".layout.png"))
            large = image.resize([side * max(1, 512 // min(image.size)) for side in image.size])  # words want room
            drawn = PIL.Image.fromarray(draw_layout(np.asarray(large), result.layout))
            record.save_png(drawn, pages[-1], {"layout_of": path.name})
    return pages, trials


def _free(folder: Path, seed: int) -> Path:
    """A name that no file has yet: nothing is overwritten."""
    path, count = folder / f"seed-{seed}.png", 1
    while path.exists():
        count += 1
        path = folder / f"seed-{seed}-{count}.png"
    return path
