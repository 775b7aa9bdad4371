"""Silent-signal balancing: whole segments fall silent, the picture stays."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from counterpoint.conditions.canny import canny
from counterpoint.conditions.image import read_image
from counterpoint.data.balance import keep_some, segment, silence
from counterpoint.data.scenes.render import scene

SEGMENTS = (np.indices((30, 40)).sum(0) // 10 * 70_001).astype(np.int64)
"""Seven segments with numbers as large as panoptic ones."""


def test_whole_segments_are_kept_and_never_none() -> None:
    counts = []
    for seed in range(200):
        kept = keep_some(SEGMENTS, np.random.default_rng(seed))
        names = np.unique(SEGMENTS)
        speaking = [kept[name == SEGMENTS].all() for name in names]
        assert speaking == [kept[name == SEGMENTS].any() for name in names]
        counts.append(sum(speaking))
    assert set(counts) == set(range(1, 8)), "any number of them, from one to all"
    again = keep_some(SEGMENTS, np.random.default_rng(3))
    np.testing.assert_array_equal(again, keep_some(SEGMENTS, np.random.default_rng(3)))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 3), (3, 3), (1, 200), (300, 2), (4, 4), (8, 8), (9, 40)])
@pytest.mark.parametrize("flat", [True, False])
def test_the_smallest_pictures_have_segments(shape: tuple[int, int], flat: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    found = segment(np.full_like(noise, 90) if flat else noise)
    assert found.shape == shape
    assert found.min() >= 1


def test_a_control_is_silent_outside() -> None:
    one = scene(5)
    edges = canny(one.image)
    kept = keep_some(one.seg, np.random.default_rng(0))
    quiet = silence(edges, kept, "canny")
    np.testing.assert_array_equal(quiet[kept], edges[kept])
    assert not quiet[~kept].any()
    with pytest.raises(ValueError, match="depth has no silent value"):
        silence(edges, kept, "depth")


def test_a_classical_segmenter_finds_what_has_an_outline() -> None:
    photo = np.full((200, 300, 3), (40, 90, 160), np.uint8)
    cv2.circle(photo, (80, 100), 50, (230, 200, 60), cv2.FILLED)
    cv2.rectangle(photo, (180, 40), (280, 160), (160, 30, 60), cv2.FILLED)
    found = segment(photo)
    assert found.shape == photo.shape[:2]
    assert found.min() >= 1
    background, ball, box = found[10, 150], found[100, 80], found[100, 230]
    assert len({background, ball, box}) == 3
    inside = np.zeros(found.shape, np.uint8)
    cv2.circle(inside, (80, 100), 50, 1, cv2.FILLED)
    overlap = ((found == ball) & (inside > 0)).sum() / ((found == ball) | (inside > 0)).sum()
    assert overlap > 0.85
    assert len(np.unique(segment(np.full((64, 64, 3), 128, np.uint8)))) == 1


def test_photos_of_any_sort_are_covered(test_data: Path) -> None:
    counts = []
    for path in sorted((test_data / "coco_free" / "images").glob("*.jpg"))[:24]:
        found = segment(read_image(path))
        assert found.min() >= 1
        counts.append(len(np.unique(found)))
    assert 5 < np.median(counts) < 30
    assert max(counts) < 60
