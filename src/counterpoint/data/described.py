"""Scenes as models learn from them that read layouts: what only a layout can tell must not stand in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from counterpoint.conditions.layout import Layout
from counterpoint.data.scenes.caption import listed
from counterpoint.data.scenes.vocabulary import COLOURS, TEXTURES
from counterpoint.types import Samples

_WORDS = (*COLOURS, *(texture for texture in TEXTURES if texture != "plain"))
_PERSON = "a person"


class Described:
    """Samples in which half of the captions do not say who does what.

    Args:
        samples: with the fields ``caption``, ``caption:plain`` and ``layout``.
        seed: of what is drawn, once for each sample.
        mislead: whether half of the things are called by colours and textures of chance, so that such words are heard
            and tell nothing.
    """

    def __init__(self, samples: Samples, seed: int, *, mislead: bool) -> None:
        self.samples, self.seed, self.mislead = samples, seed, mislead

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The same samples, described so."""
        batch = self.samples.batch(indices)
        plain = batch.pop("caption:plain")
        draws = [np.random.default_rng((self.seed, index)) for index in indices]
        captions = [
            two if rng.random() < 0.5 else one for one, two, rng in zip(batch["caption"], plain, draws, strict=True)
        ]
        layouts = batch["layout"]
        if self.mislead:
            layouts = [_misled(layout, rng) for layout, rng in zip(layouts, draws, strict=True)]
        return {**batch, "caption": captions, "layout": layouts}


class Untold:
    """Samples in which half of the captions name people and things only, without colour, place and style: a reference
    picture has something to tell.

    Args:
        samples: with the fields ``caption`` and ``layout``.
        seed: of what is drawn, once for each sample.
    """

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The same samples, described so."""
        batch = self.samples.batch(indices)
        layouts = batch.pop("layout")
        bare = [listed([one.phrase for one in layout.instances]) for layout in layouts]
        few = [np.random.default_rng((self.seed, index)).random() < 0.5 for index in indices]
        told = zip(batch["caption"], bare, few, strict=True)
        return {**batch, "caption": [short if less else full for full, short, less in told]}


class Subset:
    """Some samples of many.

    Args:
        samples: all.
        places: of those that count.
    """

    def __init__(self, samples: Samples, places: np.ndarray) -> None:
        self.samples, self.places = samples, places

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The same samples under other numbers."""
        return self.samples.batch(self.places[list(indices)].tolist())


def crowded(members: np.ndarray) -> np.ndarray:
    """The places of scenes that have several people or things, and of every fourth one of the others."""
    alone = np.flatnonzero(members < 2)
    return np.sort(np.concatenate([np.flatnonzero(members >= 2), alone[::4]]))


def _misled(layout: Layout, rng: np.random.Generator) -> Layout:
    return replace(layout, instances=tuple(replace(one, phrase=_called(one.phrase, rng)) for one in layout.instances))


def _called(phrase: str, rng: np.random.Generator) -> str:
    word = str(rng.choice(_WORDS))
    if phrase == _PERSON or rng.random() < 0.5:
        return phrase
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word} {phrase.partition(' ')[2]}"
