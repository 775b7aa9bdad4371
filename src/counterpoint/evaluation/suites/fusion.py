"""The suites that compare ways to join controls: conflicting, complementary and silent ones, and single controls.

Protocols: Cross-ControlNet (2025, section 4), Minimal Impact ControlNet (ICLR 2025, section 5 and appendix G),
ControlNet++ (arXiv:2404.07987, section 5). Where the papers give no definition, ``docs/evaluation.md`` has ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Protocol

from counterpoint.data.pairs import Case, Layout
from counterpoint.evaluation import measures
from counterpoint.evaluation.suite import CHUNK, KINDS, Finished, Method, Packed, Readers, Row, Task, stack
from counterpoint.fusion import get_fusion
from counterpoint.metrics.metric import Metric
from counterpoint.types import UserError

NO_SUBJECT = "no case names a subject, so no keys were lent"


class Cases(Protocol):
    """Where cases come from: :mod:`counterpoint.data.pairs`, or published photos."""

    SILENT_KINDS: tuple[str, str]
    LEVELS: tuple[str, ...]
    CLASSES: int

    def conflicting(self, number: int, background: str) -> Case:
        """Pose over something else."""
        ...

    def complementary(self, number: int, kinds: tuple[str, ...]) -> Case:
        """Maps of one picture."""
        ...

    def silent(self, number: int, layout: Layout, kinds: tuple[str, str], level: str) -> Case:
        """Maps with silent regions."""
        ...

    def alone(self, number: int, kind: str) -> Case:
        """One map."""
        ...


@dataclass(frozen=True)
class Sort:
    """One sort of cases: their controls, number -> case, and the measures that apply to it.

    ``metrics`` takes the name of the features that distances stand on, and the number of cases. A measure takes
    ``(pictures, cases, readers)`` and gives a row a case.
    """

    kinds: tuple[str, ...]
    build: Callable[[int], Case]
    metrics: Callable[[str, int], list[Metric]]


@dataclass(frozen=True)
class FusionSuite:
    """Sorts of cases, each made with every method from the same noise."""

    sorts: dict[str, Sort]

    def only(self, kinds: Collection[str]) -> FusionSuite:
        """The sorts that need no other controls than these.

        Raises:
            UserError: there is none.
        """
        kept = {name: sort for name, sort in self.sorts.items() if set(sort.kinds) <= set(kinds)}
        if not kept:
            wanted = " or ".join(sorted({" and ".join(sort.kinds) for sort in self.sorts.values()}))
            raise UserError(f"this suite needs ControlNets for {wanted}; there are {', '.join(kinds) or 'none'}")
        return FusionSuite(kept)

    def about(self, methods: Sequence[Method]) -> FusionSuite:
        """The sorts that tell apart what methods have for some kinds only, or all where no method has such.

        Raises:
            UserError: one has it for a kind that no sort has.
        """
        heard = {kind for sort in self.sorts.values() for kind in sort.kinds}
        for method in methods:
            if deaf := sorted(method.concerns - heard):
                raise UserError(f"{method.name}: no case here has {deaf[0]}; there are {', '.join(sorted(heard))}")
        kinds = {kind for method in methods for kind in method.concerns}
        return FusionSuite({name: sort for name, sort in self.sorts.items() if kinds & set(sort.kinds) or not kinds})

    def tasks(self, n: int, methods: Sequence[Method]) -> list[Task]:
        """Seeds are the numbers of the cases; a case is built once for all methods."""
        return [
            Task(_key(method, name, number), case.prompt, number, images, method, case.subject)
            for name, sort in self.sorts.items()
            for number, case in enumerate(map(sort.build, range(n)))
            for images in [Packed(case.images)]
            for method in _concerned(sort, methods)
        ]

    def contents(self, n: int) -> dict[str, list[dict[str, Any]]]:
        """What the cases of each sort are made of: ``prompt``, ``seed``, and label -> photo by name and hash."""
        return {
            name: [
                {"prompt": case.prompt, "seed": number, "photos": _named(case)}
                for number, case in enumerate(map(sort.build, range(n)))
            ]
            for name, sort in self.sorts.items()
        }

    def score(self, finished: Finished, n: int, methods: Sequence[Method], readers: Readers) -> list[Row]:
        """One row a method and sort."""
        rows = []
        for name, sort in self.sorts.items():
            mine = _concerned(sort, methods)
            tables = {method.name: sort.metrics(readers.features_of, n) for method in mine}
            told = False
            for start in range(0, n, CHUNK):
                numbers = range(start, min(start + CHUNK, n))
                cases = [sort.build(number) for number in numbers]
                told |= any(case.subject for case in cases)
                for method in mine:
                    pictures = stack([finished(_key(method, name, number)) for number in numbers])
                    for metric in tables[method.name]:
                        metric.update(pictures, cases, readers)
            notes = {method.name: NO_SUBJECT for method in mine if _lends(method) and not told}
            rows += [
                Row(method, name, tuple(metrics), rival=True, note=notes.get(method, ""))
                for method, metrics in tables.items()
            ]
        return rows


def _lends(method: Method) -> bool:
    return any(rule.keys is not None for rule in get_fusion(method.fusion).rules)


def _named(case: Case) -> dict[str, dict[str, str]]:
    hashes = {label: hashlib.sha256(photo.tobytes()).hexdigest()[:16] for label, photo in case.photos.items()}
    return {label: {"name": case.names.get(label, ""), "sha256": made} for label, made in hashes.items()}


def _concerned(sort: Sort, methods: Sequence[Method]) -> list[Method]:
    """Methods that are for all kinds, or have something for one of this sort."""
    return [method for method in methods if not method.concerns or method.concerns & set(sort.kinds)]


def _key(method: Method, name: str, number: int) -> str:
    return f"{name}/{method.slug}/{number:05d}"


def _conflicting(other: str, *_: object) -> list[Metric]:
    return [measures.clip(), measures.map_mse(other), measures.background_mse(other), measures.person_iou()]


def _complementary(kinds: Sequence[str], *_: object) -> list[Metric]:
    return [
        measures.source_ssim(),
        measures.naturalness(),
        measures.clip(),
        *(measures.map_mse(kind) for kind in kinds),
    ]


def _silent(kinds: Sequence[str], told: bool, features_of: str, n: int) -> list[Metric]:
    distance = partial(measures.region_distance, features_of=features_of, n=n)
    each = (distance, measures.cycle, measures.silent_variance)
    return [*(measure(kind) for measure in each for kind in kinds), *([measures.clip()] if told else [])]


def _single(kind: str, classes: int, side: int, features_of: str, n: int) -> list[Metric]:
    obeyed = {
        "canny": lambda: measures.edges("canny", side),
        "hed": lambda: measures.edges("hed", side),
        "lineart": lambda: measures.edges("lineart", side),
        "depth": lambda: [measures.depth_error()],
        "pose": lambda: [measures.person_iou()],
        "seg": lambda: [measures.class_iou(classes)],
    }
    return [*obeyed[kind](), measures.region_distance(kind, features_of, n), measures.clip()]


def conflicting(cases: Cases) -> FusionSuite:
    """A person against a background that is something else where the person stands."""
    return FusionSuite(
        {
            f"pose+{other}": Sort(
                ("pose", other), partial(cases.conflicting, background=other), partial(_conflicting, other)
            )
            for other in ("seg", "depth")
        }
    )


def complementary(cases: Cases) -> FusionSuite:
    """Two maps of one picture."""
    return FusionSuite(
        {
            "+".join(kinds): Sort(kinds, partial(cases.complementary, kinds=kinds), partial(_complementary, kinds))
            for kinds in (("hed", "seg"), ("hed", "depth"), ("seg", "depth"))
        }
    )


def silent(cases: Cases) -> FusionSuite:
    """Each control is silent where the other speaks."""
    return FusionSuite(
        {
            f"{layout}, {level} prompt": Sort(
                cases.SILENT_KINDS,
                partial(cases.silent, kinds=cases.SILENT_KINDS, layout=layout, level=level),
                partial(_silent, cases.SILENT_KINDS, level != "none"),
            )
            for layout, level in [
                *product(("crops", "split", "centre"), ("brief",)),
                *(("split", level) for level in cases.LEVELS if level != "brief"),
            ]
        }
    )


def single(cases: Cases, side: int) -> FusionSuite:
    """One control at a time, on pictures of ``side`` pixels."""
    return FusionSuite(
        {
            kind: Sort((kind,), partial(cases.alone, kind=kind), partial(_single, kind, cases.CLASSES, side))
            for kind in KINDS
        }
    )
