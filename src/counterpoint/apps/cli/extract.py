"""``counterpoint extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extract(
    kind: Annotated[
        str,
        typer.Argument(
            help="canny, hed, lineart, mlsd, scribble, tile; depth, normal, seg, pose and sam with a model."
        ),
    ],
    photo: Annotated[Path, typer.Argument(help="The photo.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="hed, scribble, lineart: a safetensors file; depth, normal, seg, pose, sam: a folder or hub id of "
            "transformers; pose also ESTIMATOR,DETECTOR."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The condition image; default PHOTO-KIND.png here.")] = None,
) -> None:
    """Make a condition image from a photo."""
    import PIL.Image

    from counterpoint.apps.cli import output
    from counterpoint.apps.extractors import extractor
    from counterpoint.apps.record import write_whole
    from counterpoint.conditions.image import read_image
    from counterpoint.conditions.recognise import WrongPicture, check_picture

    output.quiet_libraries()
    given, make = read_image(photo), extractor(kind, model)
    with output.spoken_warnings(WrongPicture):
        check_picture(str(photo), given, kind, photo=True)
    picture = PIL.Image.fromarray(make(given))
    path = out or Path(f"{photo.stem}-{kind}.png")
    write_whole(path, lambda file: picture.save(file, "PNG"))
    print(path)
