"""``counterpoint replay``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def replay(
    image: Annotated[Path, typer.Argument(help="A PNG made by generate, batch, the studio or the service.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare pixels; list what differs and exit with 1 if any does.")
    ] = False,
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=IMAGE", help="Where a control's image is now. Repeatable.", show_default=False),
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Where another input is now: mask:NAME, subject-mask:1, init-image, inpaint-mask, layout. Repeatable.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Where its model is here; a picture of the service names it as it is called there.", show_default=False
        ),
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(metavar="FORM", help="Write the recipe for another tool instead: diffusers or comfyui."),
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(metavar="FILE.py", help="The rules of your own that it was made with; they are run.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default beside the picture, unless --verify is all you want.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one machine-readable record.")] = False,
) -> None:
    """Make a picture again from the recipe inside it."""
    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.apps.cli.values import pairs
    from counterpoint.fusion.own import read_rules
    from counterpoint.types import UserError

    if rules is not None:
        read_rules(rules)
    images = {name: Path(path) for name, path in pairs("--control", control).items()}
    inputs = {name: Path(path) for name, path in pairs("--input", input).items()}
    if export is not None:
        if verify:
            raise UserError("--export writes a recipe and makes no picture to --verify")
        _export(image, images, inputs, model, export, out, json)
        return
    target = out or (None if verify else image.with_name(f"{image.stem}.replay.png"))
    if target is not None:
        if not record.names_picture(target):
            raise UserError(f"--out {target}: give a name ending in .png")
        record.check_spared([target], [image, *images.values(), *inputs.values()])
        record.check_writable(target.parent)

    from counterpoint.apps.replay import replay as again

    output.quiet_libraries()
    with output.spoken_warnings(), output.progress("sampling") as listen:
        made = again(image, images, inputs, model, listen=listen)
    if target is not None:
        record.save_png(made.image, target, made.recipe)
    identical = made.distance == 0
    if json:
        output.record(
            {
                "schema": record.SCHEMA,
                "image": target,
                "identical": identical,
                "distance": made.distance,
                "differences": made.differences,
            }
        )
    else:
        for line in made.differences:
            output.say(f"differs: {line}")
        if identical:
            print(f"identical: all {made.image.width} x {made.image.height} pixels")
        else:
            print(f"not identical: pixels differ by up to {made.distance} of 255"
                  + ("" if made.differences else ", and nothing that is recorded says why"))  # fmt: skip
        if target is not None:
            print(target)
    if verify and not identical:
        raise typer.Exit(1)


def _export(
    image: Path,
    images: dict[str, Path],
    inputs: dict[str, Path],
    model: str | None,
    form: str,
    out: Path | None,
    json: bool,
) -> None:
    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.apps.export import FORMS
    from counterpoint.apps.replay import request_of
    from counterpoint.types import UserError

    if form not in FORMS:
        raise UserError(f"--export {form}: there are {', '.join(FORMS)}")
    recipe = record.read_recipe(image)
    suffix, write = FORMS[form]
    exported = write(request_of(recipe, images, image, inputs, model), recipe.get("seed", 0))
    target = out or image.with_suffix(suffix)
    record.write_text(target, exported.text)
    if json:
        output.record({"schema": record.SCHEMA, "file": target, "left_out": exported.left_out})
        return
    for line in exported.left_out:
        output.say(f"left out: {line}")
    print(target)
