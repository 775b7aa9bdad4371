"""Benchmark pairs: real conflicts, one and the same scene, and silence where silence is said to be."""

from __future__ import annotations

import numpy as np
import pytest

from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.data.pairs import complementary, conflicting, silent
from counterpoint.data.scenes.vocabulary import KINDS, SEG_CLASSES


def test_conflicts_are_conflicts() -> None:
    """The person covers a region that the other control assigns to something else, mostly to a thing."""
    covered, on_things = [], []
    for number in range(50):
        case = conflicting(number)
        colours = case.images["seg"][case.person]
        covered.append(float((colours != SEG_CLASSES["person"]).any(-1).mean()) > 0.5)
        things = np.array([SEG_CLASSES[kind] for kind in KINDS])
        on_things.append(float((colours[:, None] == things).all(-1).any(-1).mean()) > 0.1)
    assert np.mean(covered) >= 0.8
    assert np.mean(on_things) >= 0.8


def test_conflicting_depth() -> None:
    case = conflicting(0, "depth")
    assert set(case.images) == {"pose", "depth"}


def test_complementary_is_one_scene() -> None:
    case = complementary(3, ("hed", "seg"))
    assert case.photos["hed"] is case.photos["seg"]
    np.testing.assert_array_equal(case.images["hed"], soft_edge(case.photos["seg"]))


@pytest.mark.parametrize("layout", ["crops", "split", "centre"])
@pytest.mark.parametrize("kinds", [("canny", "pose"), ("hed", "canny")])
def test_silence(layout: str, kinds: tuple[str, str]) -> None:
    for number in range(5):
        case = silent(number, layout, kinds)
        first, second = (case.active[kind] for kind in kinds)
        assert not (first & second).any()
        assert (first | second).all()
        for kind in kinds:
            assert not case.images[kind][~case.active[kind]].any()
        assert any(case.images[kind].any() for kind in kinds)


def test_silence_needs_a_silent_value() -> None:
    with pytest.raises(ValueError, match="silent value"):
        silent(0, "split", ("seg", "pose"))


@pytest.mark.parametrize("number", range(12))
def test_subjects_are_words_of_the_prompt(number: int) -> None:
    assert conflicting(number).subject == "person"
    for case in (complementary(number), silent(number, "split"), silent(number, "centre", level="detailed")):
        assert case.subject in case.prompt.split()
    assert silent(number, "split", level="none").subject == ""
