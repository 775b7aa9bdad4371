"""``counterpoint extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extract(
    kind: Annotated[
        str,
        typer.Argument(
            help="canny, hed, lineart, mlsd, scribble, tile; depth, normal, seg, pose and sam with a model; --model "
            "tiny reads all of these but sam from the tiny family's own scenes."
        ),
    ],
    photo: Annotated[Path, typer.Argument(help="The photo; with --batch a folder of them, or of tar shards.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="hed, scribble, lineart: a safetensors file; depth, normal, seg, pose, sam: a folder or hub id of "
            "transformers; pose also ESTIMATOR,DETECTOR."
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Bring the photo's shorter side to so many pixels first, both sides to multiples of 64, as ControlNet "
            "1.1 does; default 512 for the networks of hed, scribble and lineart, else the photo's own size.",
            min=1,
            max=8192,
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The condition image; default PHOTO-KIND.png here.")] = None,
    batch: Annotated[
        bool,
        typer.Option(
            "--batch",
            help="Fill a folder: KIND/NAME.png for each picture, and KIND_file_name in metadata.jsonl if it has one; "
            "tar shards: KEY.KIND.png in them.",
        ),
    ] = False,
    balance: Annotated[
        bool, typer.Option("--balance", help="With --batch: silence the control in random segments of each picture.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="With --batch: processes; default one a core.", min=1, show_default=False)
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="With --batch: on a Ray cluster; local is one on this machine."),
    ] = None,
) -> None:
    """Make a condition image from a photo, or from each photo of a folder.

    A killed --batch continues: images that are there are not made again.
    """
    import PIL.Image

    from counterpoint.apps.cli import output
    from counterpoint.apps.extractors import extractor
    from counterpoint.apps.record import write_whole
    from counterpoint.conditions.image import read_image, resize_shorter
    from counterpoint.conditions.recognise import WrongPicture, check_picture
    from counterpoint.types import CONTROL_KINDS, UserError

    output.quiet_libraries()
    if batch:
        if out is not None:
            raise UserError("--batch writes into the folder itself; leave out --out")
        if resolution is not None:
            raise UserError("with --batch, images are as large as their photos; leave out --resolution")
        print(_fill(photo, kind, model, balance, workers, ray))
        return
    if balance or workers or ray:
        raise UserError("--balance, --workers and --ray belong to --batch")
    if photo.is_dir():
        raise UserError(f"{photo} is a folder: fill it with --batch")
    path = out or Path(f"{photo.stem}-{kind}.png")
    if path.suffix.lower() != ".png" or path.resolve() == photo.resolve():
        raise UserError(f"--out {path}: a condition image is a png file, and not the photo itself")
    given, make = read_image(photo), extractor(kind, model)
    with output.spoken_warnings(WrongPicture):
        check_picture(str(photo), given, kind, photo=True)
    if resolution is None and model is not None and kind in {"hed", "scribble", "lineart"}:
        resolution = CONTROL_KINDS[kind].resolution
    if resolution is not None:
        given = resize_shorter(given, resolution)
    picture = PIL.Image.fromarray(make(given))
    write_whole(path, lambda file: picture.save(file, "PNG"))
    print(path)


def _fill(place: Path, kind: str, model: str | None, balance: bool, workers: int | None, ray: str | None) -> Path:
    from counterpoint.apps.cli import output
    from counterpoint.apps.extract_batch import extract_batch, on_cluster, on_cores
    from counterpoint.apps.extract_shards import extract_shards
    from counterpoint.conditions.recognise import WrongPicture
    from counterpoint.data.tars import tar_shards
    from counterpoint.types import UserError

    shards = tar_shards(place)
    if not (shards or place.is_dir()):
        raise UserError(f"--batch wants a folder of pictures, or tar shards; {place} is none")
    listening = output.progress(f"making {kind} images", unit="shard" if shards else "picture")
    with output.spoken_warnings(WrongPicture), listening as listen:
        run = on_cluster(ray) if ray else on_cores(workers)
        settings = {"source": model, "balanced": balance, "listen": listen}
        filled = (
            extract_shards(shards, kind, run, **settings) if shards else extract_batch(place, kind, run, **settings)
        )
    for reason in filled.damaged.values():
        output.say(f"warning: skipped: {reason}")
    if filled.unnamed:
        output.say(
            f"warning: metadata.jsonl does not name {len(filled.unnamed)} pictures, such as {filled.unnamed[0]}: they "
            "stay out"
        )
    output.say(f"{filled.there} {kind} images, {len(filled.damaged)} pictures skipped")
    return place
