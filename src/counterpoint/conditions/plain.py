"""The extractors that need no model, by kind."""

from __future__ import annotations

from collections.abc import Callable

from counterpoint.conditions.canny import canny
from counterpoint.conditions.lines import lines
from counterpoint.conditions.scribble import scribble
from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.conditions.straight_lines import straight_lines
from counterpoint.conditions.tile import tile
from counterpoint.types import Image

Extract = Callable[[Image], Image]
"""Photo -> condition image of the same size."""
PLAIN: dict[str, Extract] = {
    "canny": canny,
    "hed": soft_edge,
    "lineart": lines,
    "mlsd": straight_lines,
    "scribble": scribble,
    "tile": tile,
}
"""Kind of control -> what makes its image from a photo."""
