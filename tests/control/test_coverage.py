"""Where a control speaks is read off its silent value."""

from __future__ import annotations

import pytest
import torch

from counterpoint.control.coverage import coverage, gates
from counterpoint.data.pairs import silent
from counterpoint.fusion import get_fusion
from counterpoint.types import CONTROL_KINDS, UserError


def test_near_its_lines_and_nowhere_else() -> None:
    hint = torch.zeros(2, 3, 128, 96)
    hint[0, :, 60:64, 20:30] = 1
    region = coverage(hint, CONTROL_KINDS["canny"])
    assert region.shape == (2, 1, 128, 96)
    assert region[0, 0, 60:64, 20:30].min() > 0.99, "it speaks fully where its lines are"
    assert region[0, 0, :40].max() == 0
    assert region[0, 0, :, 60:].max() == 0, "and not at all far from them"
    assert ((region[0] > 0.05) & (region[0] < 0.95)).any(), "its edge is soft"
    assert region[1].max() == 0, "an empty image says nothing"


def test_half_a_silent_pair() -> None:
    """Of the left-right layouts, each control covers its own half and nearly nothing of the other."""
    case = silent(4, "split")
    for kind, image in case.images.items():
        hint = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        side = coverage(hint, CONTROL_KINDS[kind])[0, 0]
        spoken, quiet = sorted((side[:, : side.shape[1] // 2].mean(), side[:, side.shape[1] // 2 :].mean()))[::-1]
        assert quiet < 0.15 < spoken, "what spills over is the soft edge"


def test_what_is_gated_unasked() -> None:
    """Where controls meet, but not where nobody is silent, nor under the two rules that say otherwise."""
    for rule in map(get_fusion, ("pix", "cross:delta=0.5", "0:pix,0.5:sum", "0:sum,0.5:pix")):
        assert gates(None, rule, ["pose", "seg"])
        assert not gates(None, rule, ["pose"])
        assert not gates(None, rule, ["depth", "seg"])
    ungated = (
        "sum",
        "minimal-impact",
        "minimal-impact:injection=literal,granularity=sample",
        "0:sum,0.5:minimal-impact",
    )
    for rule in map(get_fusion, ungated):
        assert not gates(None, rule, ["pose", "seg"])
        assert gates(True, rule, ["pose", "seg"])


@pytest.mark.parametrize("kind", ["depth", "seg"])
def test_kinds_without_silence_want_a_mask(kind: str) -> None:
    with pytest.raises(UserError, match="no silent value"):
        coverage(torch.zeros(1, 3, 64, 64), CONTROL_KINDS[kind])
