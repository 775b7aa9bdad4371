"""Agreement is 1 with itself and falls as controls drift apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from counterpoint.conditions.openpose import draw_pose
from counterpoint.data.pairs import complementary
from counterpoint.metrics.agreement import agreement
from counterpoint.types import CONTROL_KINDS


@pytest.mark.parametrize("kind", CONTROL_KINDS)
def test_every_kind_is_one_with_itself(kind: str) -> None:
    maps = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    assert agreement(kind, maps, maps).tolist() == pytest.approx([1, 1])
    if kind != "pose":  # noise has no joints
        assert float(agreement(kind, maps[:1], 1 - maps[:1])) < 1


@pytest.mark.parametrize("kind", ["canny", "hed", "depth", "pose", "seg"])
def test_one_with_itself_less_with_another(kind: str) -> None:
    other = "pose" if kind != "pose" else "seg"
    maps = [
        torch.from_numpy(complementary(number, (kind, other)).images[kind]).permute(2, 0, 1)[None] / 255
        for number in (1, 2)
    ]
    assert float(agreement(kind, maps[0], maps[0])) == pytest.approx(1)
    assert 0 <= float(agreement(kind, *maps)) < 0.9


def test_a_pose_that_drifts() -> None:
    joints = np.random.default_rng(0).uniform(30, 90, (18, 2))
    drawn = [
        torch.from_numpy(draw_pose([joints + [shift, 0]], 128, 128)).permute(2, 0, 1)[None] / 255
        for shift in (0, 3, 30)
    ]
    near, far = (float(agreement("pose", drawn[0], one)) for one in drawn[1:])
    assert 1 > near > 0.7 > far
