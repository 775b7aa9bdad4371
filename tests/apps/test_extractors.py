"""Extractors with the user's networks, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from counterpoint.apps.extractors import extractor
from counterpoint.conditions.normals import normals
from counterpoint.conditions.plain import PLAIN
from counterpoint.conditions.scribble import strokes
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.models.edge_networks import EDGE_NETWORKS
from counterpoint.types import UserError

PHOTO = np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", EDGE_NETWORKS)
def test_published_networks_draw_any_size(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(EDGE_NETWORKS[kind]().state_dict(), tmp_path / "file.safetensors")
    drawn = extractor(kind, str(tmp_path / "file.safetensors"))(PHOTO)
    assert drawn.shape == PHOTO.shape
    assert drawn.dtype == np.uint8
    assert (drawn[..., 0] == drawn[..., 1]).all()
    assert not np.array_equal(drawn, PLAIN[kind](PHOTO))


def test_one_network_serves_two_kinds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(EDGE_NETWORKS["hed"]().state_dict(), tmp_path / "file.safetensors")
    soft, thick = (extractor(kind, str(tmp_path / "file.safetensors"))(PHOTO) for kind in ("hed", "scribble"))
    np.testing.assert_array_equal(thick, strokes(soft))


def test_normals_come_from_whatever_reads_depth(tiny: Path) -> None:
    scene_ = scene(SPLITS["test"].start).image
    np.testing.assert_array_equal(extractor("normal")(scene_), normals(extractor("depth")(scene_)))


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("smell", None, "unknown control 'smell'"),
        ("canny", "x", "no model makes canny images here"),
        ("hed", "x.pth", "is a pickle"),
        ("pose", "nowhere,x", "there is no model 'nowhere'"),
        ("sam", "nowhere", "there is no model 'nowhere'"),
        ("depth", "nowhere", "there is no model 'nowhere'"),
    ],
)
def test_what_cannot_be_extracted(kind: str, source: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        extractor(kind, source)


def test_a_model_is_named_where_one_is_needed(saved: Path) -> None:
    with pytest.raises(UserError, match="--extractor depth=MODEL, such as Intel/dpt-hybrid-midas"):
        extractor("depth", model=str(saved))
    with pytest.raises(UserError, match="nothing here makes pose images"):
        extractor("pose", model=str(saved))
