"""Fusion rules: pure tensor operators, one paper a file, and the one table of them."""

from __future__ import annotations

from counterpoint.fusion.add import add, mean
from counterpoint.types import Fusion, UserError

FUSIONS = {
    fusion.name: fusion
    for fusion in (
        Fusion("sum", "add the branches, as every tool does", add, cite=("controlnet",)),
        Fusion("mean", "average the branches", mean, cite=("controlnet",)),
    )
}
"""Name -> rule. Command line, studio, tests, citations and docs follow from this table."""


def get_fusion(name: str) -> Fusion:
    """The rule of a name.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in FUSIONS:
        raise UserError(f"unknown fusion {name!r}; there are {', '.join(FUSIONS)}")
    return FUSIONS[name]
