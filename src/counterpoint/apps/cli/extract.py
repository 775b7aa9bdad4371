"""``counterpoint extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extract(
    kind: Annotated[str, typer.Argument(help="canny or hed.")],
    photo: Annotated[Path, typer.Argument(help="The photo.")],
    out: Annotated[Path | None, typer.Option(help="The condition image; default PHOTO-KIND.png here.")] = None,
) -> None:
    """Make a condition image from a photo."""
    import PIL.Image

    from counterpoint.apps.record import write_whole
    from counterpoint.apps.run import EXTRACTORS
    from counterpoint.conditions.image import read_image
    from counterpoint.types import UserError

    if kind not in EXTRACTORS:
        raise UserError(f"there is no extractor for {kind!r}; there are {', '.join(EXTRACTORS)}")
    picture = PIL.Image.fromarray(EXTRACTORS[kind](read_image(photo)))
    path = out or Path(f"{photo.stem}-{kind}.png")
    write_whole(path, lambda file: picture.save(file, "PNG"))
    print(path)
