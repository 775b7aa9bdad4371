"""Style: does a picture of one prompt look like a reference of another scene?

Each case has the people and things of one test scene in words that leave place and style open, and the picture of the
next; likeness is the cosine of their embeddings in CLIP's image tower, as IP-Adapter measures it (arXiv:2308.06721,
section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

from counterpoint.conditions.layout import Instance, Layout, Reference
from counterpoint.data.scenes.caption import content
from counterpoint.data.scenes.render import SPLITS, Scene, scene
from counterpoint.evaluation.suite import CHUNK, Finished, Method, Readers, Row, Task, stack, weighed
from counterpoint.metrics.metric import Metric
from counterpoint.metrics.text import clip_score
from counterpoint.types import Image

_START = SPLITS["test"].start
_CASE = "reference of another scene"


class StyleSuite:
    """The first test scenes. A model that reads no reference knows nothing of it."""

    def tasks(self, n: int, methods: Sequence[Method]) -> list[Task]:
        """Seeds are the numbers of the scenes."""
        made = []
        for number in range(n):
            one = scene(_START + number)
            things = tuple(Instance(thing.phrase, thing.box) for thing in one.instances if thing.box[0] < thing.box[2])
            layout = Layout(things, reference=Reference(self._reference(number)))
            made += [
                Task(_key(method, number), _prompt(one), number, method=method, layout=weighed(layout, method))
                for method in methods
            ]
        return made

    def score(self, finished: Finished, n: int, methods: Sequence[Method], readers: Readers) -> list[Row]:
        """A row a method: ``likeness`` to the reference, ``clip`` to the prompt."""
        tables = {method.name: (Metric("likeness", clip_score), Metric("clip", clip_score)) for method in methods}
        for start in range(0, n, CHUNK):
            numbers = range(start, min(start + CHUNK, n))
            references = readers.embed_pictures(stack([self._reference(number) for number in numbers]))
            scenes = [scene(_START + number) for number in numbers]
            words = readers.embed_texts([_prompt(one) for one in scenes])
            for method in methods:
                seen = readers.embed_pictures(stack([finished(_key(method, number)) for number in numbers]))
                likeness, clip = tables[method.name]
                likeness.update(seen, references)
                clip.update(seen, words)
        return [Row(name, _CASE, metrics, rival=True) for name, metrics in tables.items()]

    def _reference(self, number: int) -> Image:
        return scene(_START + number + 1).image


def _prompt(one: Scene) -> str:
    """Who and what is there: place and style are the reference's."""
    return content(one.layout, detailed=False)


def _key(method: Method, number: int) -> str:
    return f"style/{method.slug}/{number:05d}"
