"""What needs no network: normals, straight lines, scribbles, tiles."""

from __future__ import annotations

import importlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from counterpoint.conditions.image import read_image
from counterpoint.conditions.normals import normals
from counterpoint.conditions.plain import PLAIN
from counterpoint.conditions.straight_lines import straight_lines
from counterpoint.conditions.tile import tile
from counterpoint.types import CONTROL_KINDS


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.clip(np.rint(values), 0, 255).astype(np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (96, 64), (65, 130)])
def test_any_size_gives_an_image_of_that_size(kind: str, shape: tuple[int, int]) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    made = PLAIN[kind](photo)
    assert made.shape == photo.shape
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, PLAIN[kind](photo))


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if CONTROL_KINDS[kind].silent == 0])
def test_an_even_photo_is_silent(kind: str) -> None:
    assert PLAIN[kind](np.full((64, 80, 3), 90, np.uint8)).max() == 0


@pytest.mark.parametrize("kind", CONTROL_KINDS)
def test_what_a_kind_declares_is_true(kind: str) -> None:
    declared = CONTROL_KINDS[kind]
    low, high = declared.value_range
    photo = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    made = PLAIN[kind](photo) if kind in PLAIN else normals(photo) if kind == "normal" else None
    if made is not None:
        assert low <= made.min() <= made.max() <= high
        assert (np.ptp(made, -1).max() == 0) == (declared.colour_order == "grey")
    assert declared.silent is None or low <= declared.silent <= high
    assert declared.resolution % 64 == 0
    if declared.differentiable is not None:
        room, _, name = declared.differentiable.rpartition(".")
        network = getattr(importlib.import_module(room), name)
        picture = torch.rand(1, 3, 16, 16, requires_grad=True)
        read = network(*[4] * (name == "PerceptionModel"))(picture)
        torch.stack([one.std() for one in ([read] if isinstance(read, torch.Tensor) else read)]).sum().backward()
        assert picture.grad.abs().sum() > 0


def test_the_page_declares_the_same() -> None:
    """The table of docs/photos.md, a row a kind."""
    text = (Path(__file__).parents[2] / "docs" / "photos.md").read_text()
    for kind in CONTROL_KINDS.values():
        silent = "-" if kind.silent is None else "black"
        where = "-" if kind.differentiable is None else f"`{kind.differentiable.removeprefix('counterpoint.')}`"
        assert (
            f"| `{kind.name}` | {kind.summary} | {silent} | {kind.colour_order} | {kind.resample} | {where} |" in text
        )


def test_normals_of_a_wall_and_of_slopes() -> None:
    across, down = np.meshgrid(np.linspace(0, 255, 128), np.linspace(0, 255, 128))
    wall, left, up = (normals(grey(values))[32:-32, 32:-32] for values in (np.full((128, 128), 90.0), across, down))
    assert (wall == (128, 128, 255)).all()
    assert left[..., 0].min() > 140, "nearer to the right: it faces left"
    assert abs(left[..., 1].astype(int) - 128).max() <= 2
    assert up[..., 1].min() > 140, "nearer below: it faces up"
    assert abs(up[..., 0].astype(int) - 128).max() <= 2


def test_normals_lean_as_the_published_map_does(test_data: Path) -> None:
    """Against Bae's network on one photo: better than saying that everything faces the viewer."""
    folder = test_data / "golden_refiners"
    wanted = read_image(folder / "cutecat_guide_normals.png") / 127.5 - 1
    made = normals(read_image(folder / "cutecat_guide_depth.png")) / 127.5 - 1

    def angle(one: np.ndarray) -> float:
        cosine = (one * wanted).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(wanted, axis=-1)
        return float(np.median(np.degrees(np.arccos(np.clip(cosine, -1, 1)))))

    flat = np.zeros_like(wanted)
    flat[..., 2] = 1
    assert angle(made) < 25 < 30 < angle(flat)


def test_straight_lines_are_found_and_round_ones_are_not() -> None:
    photo = np.full((256, 256, 3), 230, np.uint8)
    cv2.rectangle(photo, (40, 60), (200, 120), (30, 30, 30), cv2.FILLED)
    cv2.circle(photo, (128, 200), 12, (30, 30, 30), cv2.FILLED)
    drawn = straight_lines(photo)[..., 0] > 0
    assert drawn[58:63, 60:180].any(0).mean() > 0.9
    assert drawn[70:110, 38:43].any(1).mean() > 0.9
    assert not drawn[160:240].any()


def test_a_tile_keeps_the_colours_and_loses_the_detail() -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255.0
    made = tile(grey(board))
    assert abs(made.astype(int) - 128).max() <= 2
