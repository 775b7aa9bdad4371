"""The documentation's pictures are made of the demo's."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from counterpoint.apps.pictures import CASES, draw
from counterpoint.fusion import FUSIONS
from counterpoint.types import UserError


def test_every_rule_has_a_column(tmp_path: Path) -> None:
    for case, kinds in CASES.items():
        for label in (*kinds, "prompt-only", *FUSIONS):
            colour = "red" if label == "mgda" else "blue"
            PIL.Image.new("RGB", (128, 128), colour).save(tmp_path / f"{case}-{label}.png")
    draw(tmp_path, tmp_path)
    with PIL.Image.open(tmp_path / "demo.jpg") as few, PIL.Image.open(tmp_path / "rules.jpg") as every:
        assert few.size == (8 + 6 * 168, 8 + 3 * 186)
        assert every.size == (8 + (3 + len(FUSIONS)) * 104, 8 + 3 * 122)
        red = [few.getpixel((8 + 168 * column + 80, 8 + 18 + 80))[0] > 200 for column in range(6)]
        assert red == [False] * 4 + [True, False]


def test_without_a_demo(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"conflict-pose\.png is missing: run counterpoint demo"):
        draw(tmp_path, tmp_path)
