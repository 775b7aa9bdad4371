"""``counterpoint pairs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pairs(
    annotations: Annotated[
        list[Path],
        typer.Argument(help="COCO-style JSON with people's keypoints, captions or both; several files are one."),
    ],
    photos: Annotated[Path, typer.Option(help="Folder of the annotated photos.")],
    backgrounds: Annotated[
        Path | None, typer.Option(help="Folder of photos without people; without it there are no conflicting cases.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", "-n", help="Cases of each sort; default as many as there are.", min=1, show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which meet, and their order.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The manifest.")] = Path("pairs.jsonl"),
) -> None:
    """Draw benchmark cases from annotated photos and backgrounds, and list them in a manifest.

    Whoever has the same files has the same cases: evaluate SUITE --data pairs=MANIFEST --data photos=FOLDER --data
    backgrounds=FOLDER. No model is needed.
    """
    from counterpoint.apps.cli import output
    from counterpoint.apps.record import write_text
    from counterpoint.data.annotations import read_annotations
    from counterpoint.data.manifest import draw_pairs, dump
    from counterpoint.types import UserError

    if missing := [folder for folder in (photos, backgrounds) if folder is not None and not folder.is_dir()]:
        raise UserError(f"there is no folder {missing[0]}")
    rows = draw_pairs(read_annotations(annotations), photos, backgrounds, n=n, seed=seed)
    write_text(out, dump(rows))
    sorts = [row["sort"] for row in rows]
    output.say(f"{sorts.count('conflicting')} conflicting, {sorts.count('complementary')} complementary cases")
    print(out)
