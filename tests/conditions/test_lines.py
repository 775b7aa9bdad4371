"""Classical lines: white where the photo is drawn, black where it is even."""

from __future__ import annotations

import numpy as np
import pytest

from counterpoint.conditions.lines import lines


def test_even_regions_are_silent_and_dark_strokes_are_white() -> None:
    photo = np.full((256, 256, 3), 200, np.uint8)
    photo[:, 100:103] = 20
    photo[60:62] = 20
    drawn = lines(photo)
    assert drawn.shape == photo.shape
    assert (drawn[..., 0] == drawn[..., 2]).all()
    assert drawn[150, 101, 0] > 200
    assert drawn[61, 200, 0] > 200
    assert drawn[100:, 120:].max() == 0


@pytest.mark.parametrize("shade", [0, 90, 255])
def test_nothing_to_draw(shade: int) -> None:
    assert lines(np.full((64, 96, 3), shade, np.uint8)).max() == 0


def test_a_smooth_gradient_has_no_lines() -> None:
    ramp = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], 3, -1).repeat(128, 0)
    assert lines(ramp).max() < 40
