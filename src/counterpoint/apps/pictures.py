"""Pictures of the documentation, from what ``counterpoint demo`` made: one row a case, one column a control or rule."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw

from counterpoint.apps.record import write_whole
from counterpoint.fusion import FUSIONS
from counterpoint.types import UserError

CASES = {"conflict": ("pose", "seg"), "agreement": ("canny", "depth"), "silence": ("canny", "pose")}
"""Of the demo: case -> its controls."""
FEW = ("sum", "mgda", "cross")
_SIDE, _HEAD, _GAP = 128, 18, 8


def draw(demo: Path, out: Path) -> None:
    """Write ``demo.jpg``, three rules, and ``rules.jpg``, all of them.

    Args:
        demo: the folder of a demo.
        out: where the pictures go.

    Raises:
        UserError: the folder holds no demo.
    """
    for name, rules, scale in (("demo.jpg", FEW, 1.25), ("rules.jpg", tuple(FUSIONS), 0.75)):
        rows = [
            [(label, demo / f"{case}-{label.replace(' ', '-')}.png") for label in (*kinds, "prompt only", *rules)]
            for case, kinds in CASES.items()
        ]
        page = sheet(rows, round(scale * _SIDE))
        write_whole(out / name, lambda file, page=page: page.save(file, "JPEG", quality=88))


def sheet(rows: Sequence[Sequence[tuple[str, Path]]], side: int) -> PIL.Image.Image:
    """Pictures with their names above them.

    Raises:
        UserError: one is not there.
    """
    step, lower = side + _GAP, side + _HEAD + _GAP
    page = PIL.Image.new("RGB", (_GAP + step * max(map(len, rows)), _GAP + lower * len(rows)), "white")
    pen = PIL.ImageDraw.Draw(page)
    for row, named in enumerate(rows):
        for column, (label, path) in enumerate(named):
            place = (_GAP + step * column, _GAP + lower * row)
            try:
                with PIL.Image.open(path) as picture:
                    page.paste(picture.convert("RGB").resize((side, side)), (place[0], place[1] + _HEAD))
            except OSError:
                raise UserError(f"{path} is missing: run counterpoint demo --out {path.parent}") from None
            pen.text(place, label, fill="black")
    return page


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
