"""Rendered shards hold the scenes they are named for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from counterpoint.data import shards
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import scene


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> shards.SceneShards:
    monkeypatch.setattr(shards, "SHARD", 16)
    made = shards.SceneShards(
        tmp_path, 16, 32, ("image", "caption", "control:pose", "control:depth", "control:canny", "control:seg")
    )
    for start in (16, 32):
        shards._render_shard(made._folder(start), start)
    return made.prepare()


def test_batch_is_the_scenes(small: shards.SceneShards) -> None:
    batch = small.batch([3, 20])
    for row, number in enumerate((19, 36)):
        one = scene(number)
        np.testing.assert_array_equal(batch["image"][row], one.image)
        assert batch["caption"][row] == one.caption
        for kind in ("pose", "depth", "canny", "seg"):
            difference = np.abs(batch[f"control:{kind}"][row].numpy().astype(int) - control_map(one, kind))
            assert difference.max() <= (0 if kind != "pose" else 8)


def test_nothing_half_written_is_left_or_in_the_way(small: shards.SceneShards) -> None:
    (small.root / "0123.partial.scenes-00000048").mkdir()
    shards._render_shard(small._folder(48), 48)
    shards._render_shard(small._folder(48), 48)  # another process was faster
    assert sorted(one.name for one in small.root.glob("*48")) == ["0123.partial.scenes-00000048", "scenes-00000048"]


def test_derived_fields(small: shards.SceneShards) -> None:
    small.derive("brightness", lambda images: images.mean((1, 2, 3)))
    small.fields = {"brightness": "light"}
    assert small.batch([0])["light"].shape == (1,)


def test_bounds() -> None:
    with pytest.raises(ValueError, match="multiples"):
        shards.SceneShards(Path("x"), 5, 2048)
