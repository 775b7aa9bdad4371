"""The suites that compare ways to join controls: conflicting, complementary and silent ones, and single controls.

Protocols: Cross-ControlNet (2025, section 4), Minimal Impact ControlNet (ICLR 2025, section 5 and appendix G),
ControlNet++ (arXiv:2404.07987, section 5). Where the papers give no definition, ``docs/evaluation.md`` has ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from counterpoint.data.pairs import Case, alone, complementary, conflicting, silent
from counterpoint.data.scenes.vocabulary import SEG_CLASSES
from counterpoint.evaluation import measures
from counterpoint.evaluation.suite import Finished, Method, Readers, Row, Task, stack
from counterpoint.metrics.metric import Metric

CHUNK = 32
"""Cases scored at a time."""


@dataclass(frozen=True)
class Sort:
    """One sort of cases: number -> case, and the measures ``(pictures, cases, readers) -> rows`` that apply to it."""

    build: Callable[[int], Case]
    metrics: Callable[[], list[Metric]]


@dataclass(frozen=True)
class FusionSuite:
    """Sorts of cases, each made with every method from the same noise."""

    sorts: dict[str, Sort]

    def tasks(self, n: int, methods: Sequence[Method]) -> list[Task]:
        """Seeds are the numbers of the cases."""
        return [
            Task(_key(method, name, number), case.prompt, number, case.images, method)
            for name, sort in self.sorts.items()
            for method in methods
            for number, case in enumerate(map(sort.build, range(n)))
        ]

    def score(self, finished: Finished, n: int, methods: Sequence[Method], readers: Readers) -> list[Row]:
        """One row a method and sort."""
        return [
            Row(method.name, name, self._measure(finished, n, method, name, readers))
            for name, method in product(self.sorts, methods)
        ]

    def _measure(self, finished: Finished, n: int, method: Method, name: str, readers: Readers) -> tuple[Metric, ...]:
        sort = self.sorts[name]
        metrics = sort.metrics()
        for start in range(0, n, CHUNK):
            numbers = range(start, min(start + CHUNK, n))
            cases = [sort.build(number) for number in numbers]
            pictures = stack([finished(_key(method, name, number)) for number in numbers])
            for metric in metrics:
                metric.update(pictures, cases, readers)
        return tuple(metrics)


def _key(method: Method, name: str, number: int) -> str:
    return f"{name}/{method.name.replace(' ', ',')}/{number:05d}"


def _conflicting(other: str) -> list[Metric]:
    return [measures.clip(), measures.map_mse(other), measures.person_iou()]


def _complementary(kinds: Sequence[str]) -> list[Metric]:
    return [
        measures.source_ssim(),
        measures.naturalness(),
        measures.clip(),
        *(measures.map_mse(kind) for kind in kinds),
    ]


def _silent(kinds: Sequence[str]) -> list[Metric]:
    each = (measures.region_distance, measures.cycle, measures.silent_variance)
    return [*(measure(kind) for measure in each for kind in kinds), measures.clip()]


def _single(kind: str) -> list[Metric]:
    obeyed = {
        "canny": partial(measures.map_ssim, "canny"),
        "hed": partial(measures.map_ssim, "hed"),
        "depth": measures.depth_error,
        "pose": measures.person_iou,
        "seg": partial(measures.class_iou, len(SEG_CLASSES)),
    }
    return [obeyed[kind](), measures.region_distance(kind), measures.clip()]


CONFLICTING = FusionSuite(
    {
        f"pose+{other}": Sort(partial(conflicting, background=other), partial(_conflicting, other))
        for other in ("seg", "depth")
    }
)
COMPLEMENTARY = FusionSuite(
    {
        "+".join(kinds): Sort(partial(complementary, kinds=kinds), partial(_complementary, kinds))
        for kinds in (("hed", "seg"), ("hed", "depth"), ("seg", "depth"))
    }
)
SILENT = FusionSuite(
    {
        f"{layout}, {level} prompt": Sort(
            partial(silent, layout=layout, level=level), partial(_silent, ("canny", "pose"))
        )
        for layout, level in [
            *product(("crops", "split", "centre"), ("brief",)),
            ("split", "none"),
            ("split", "detailed"),
        ]
    }
)
SINGLE = FusionSuite(
    {kind: Sort(partial(alone, kind=kind), partial(_single, kind)) for kind in ("canny", "hed", "depth", "pose", "seg")}
)
