"""What models that read layouts are told in training: boxes of scenes, and no words that give away what they must."""

from __future__ import annotations

import numpy as np
import pytest

from counterpoint.data import shards
from counterpoint.data.described import Described, Subset, Untold, crowded
from counterpoint.data.scenes.render import scene
from counterpoint.data.scenes.vocabulary import ACTIONS, COLOURS, TEXTURES

WORDS = {*COLOURS, *TEXTURES}


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> shards.SceneShards:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 128)
        made = shards.SceneShards(
            tmp_path_factory.mktemp("scenes"), 0, 128, ("caption", "caption:plain", "layout", "layout:detailed")
        )
        shards._render_shard(made._folder(0), 0)
        shards._lay_out_shard(made._folder(0), 0)
        yield made.laid_out()


def test_layouts_are_those_of_the_scenes(laid_out: shards.SceneShards) -> None:
    batch = laid_out.batch(range(128))
    members = laid_out.members()
    for number in range(128):
        one = scene(number)
        seen = [thing for thing in one.instances if thing.box[0] < thing.box[2]]
        assert members[number] == len(one.instances)
        bare, full = batch["layout"][number], batch["layout:detailed"][number]
        assert [thing.box for thing in bare.instances] == [thing.box for thing in full.instances]
        np.testing.assert_allclose([thing.box for thing in bare.instances], [thing.box for thing in seen])
        assert not WORDS & {word for thing in bare.instances for word in thing.phrase.split()}
        for thing, wanted in zip(full.instances, seen, strict=True):
            coloured = wanted.colour in thing.phrase.split()
            assert coloured == (bool(wanted.colour) and one.layout.style != "line drawing")
        if len(seen) == len(one.instances):
            assert [(it.subject, it.action, it.object) for it in bare.interactions] == [*one.triplets]
        assert not any(action in batch["caption:plain"][number] for action in ACTIONS)


def test_half_of_the_captions_leave_the_action_to_the_layout(laid_out: shards.SceneShards) -> None:
    told = Described(laid_out, 0, mislead=False)
    before, batch = laid_out.batch(range(128)), told.batch(range(128))
    assert batch.keys() == before.keys() - {"caption:plain"}
    assert repr(batch["layout"]) == repr(before["layout"])
    changed = [one != two for one, two in zip(batch["caption"], before["caption"], strict=True)]
    assert 0.2 < np.mean(changed) < 0.8
    assert told.batch([5, 99])["caption"] == [batch["caption"][5], batch["caption"][99]], "whoever is beside it"
    assert Described(laid_out, 1, mislead=False).batch(range(128))["caption"] != batch["caption"]


def test_half_of_the_captions_leave_place_and_style_to_a_picture(laid_out: shards.SceneShards) -> None:
    told = Untold(laid_out, 0)
    before, batch = laid_out.batch(range(128)), told.batch(range(128))
    assert batch.keys() == before.keys() - {"layout"}
    changed = [number for number in range(128) if batch["caption"][number] != before["caption"][number]]
    assert 40 < len(changed) < 88
    for number in changed:
        said = batch["caption"][number]
        assert sorted(said.replace(" and ", ", ").split(", ")) == sorted(
            one.phrase for one in before["layout"][number].instances
        )
        assert not {*WORDS, "photo", "on", "in"} & {*said.split()}
    assert told.batch([5, 99])["caption"] == [batch["caption"][5], batch["caption"][99]], "whoever is beside it"


def test_colours_of_chance_tell_nothing(laid_out: shards.SceneShards) -> None:
    before, batch = laid_out.batch(range(128)), Described(laid_out, 0, mislead=True).batch(range(128))
    said = [
        (one.phrase, two.phrase, number)
        for number in range(128)
        for one, two in zip(before["layout"][number].instances, batch["layout"][number].instances, strict=True)
    ]
    assert all(one == two for one, two, _ in said if one == "a person")
    things = [(one, two, number) for one, two, number in said if one != "a person"]
    assert 0.3 < np.mean([one != two for one, two, _ in things]) < 0.7
    assert all(two.split()[-1] == one.split()[-1] for one, two, _ in things)
    right = [scene(number).instances[0].colour in two.split() for _, two, number in things if len(two.split()) == 3]
    assert np.mean(right) < 0.3, "no better than chance"
    assert all(two.startswith("an ") == (two.split()[1][0] in "aeiou") for _, two, _ in things)


def test_a_subset_has_the_crowded_scenes(laid_out: shards.SceneShards) -> None:
    places = crowded(np.array([1, 2, 1, 3, 1, 1, 1, 4]))
    assert places.tolist() == [0, 1, 3, 6, 7]
    some = Subset(laid_out, places)
    assert len(some) == 5
    assert some.batch([1, 4])["caption"] == laid_out.batch([1, 7])["caption"]
