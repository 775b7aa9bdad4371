"""The words of a caption can be read back from a scene's exact annotations."""

from __future__ import annotations

import numpy as np

from counterpoint.data.scenes.reading import background, main_thing
from counterpoint.data.scenes.render import SPLITS, scene


def test_every_word_is_found_on_the_truth() -> None:
    for number in range(120):
        one = scene(SPLITS["validation"].start + number, content="thing", style="photo")
        (thing,) = one.instances
        assert background(one.seg) == one.layout.background
        assert main_thing(one.seg) == thing.name


def test_an_empty_scene_shows_no_thing() -> None:
    assert main_thing(np.zeros((128, 128), np.uint8)) is None
