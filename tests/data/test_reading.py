"""The words of a caption can be read back from a scene's exact annotations."""

from __future__ import annotations

import numpy as np

from counterpoint.data.scenes.reading import background, has_colour, main_thing
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.data.scenes.vocabulary import COLOURS


def test_every_word_is_found_on_the_truth() -> None:
    colours = []
    for number in range(120):
        one = scene(SPLITS["validation"].start + number, content="thing", style="photo")
        (thing,) = one.instances
        assert background(one.seg) == one.layout.background
        assert main_thing(one.seg) == thing.name
        colours.append(has_colour(one.image, one.instance == 1, thing.colour))
    assert np.mean(colours) >= 0.99


def test_wrong_words_are_not_found() -> None:
    wrong = []
    for number in range(60):
        one = scene(SPLITS["validation"].start + number, content="thing", style="photo")
        colour = one.instances[0].colour
        others = [name for name in COLOURS if name != colour and {name, colour} != {"red", "brown"}]
        wrong += [has_colour(one.image, one.instance == 1, name) for name in others]
    assert np.mean(wrong) < 0.05
    assert not has_colour(one.image, np.zeros((128, 128), bool), colour)
    assert main_thing(np.zeros((128, 128), np.uint8)) is None
