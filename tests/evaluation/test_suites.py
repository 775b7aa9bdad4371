"""Suites on pictures whose score is known: the scenes themselves, and noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint.apps.readers import load_pristine
from counterpoint.apps.suites import settle
from counterpoint.conditions.canny import canny
from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.data import pairs
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.data.scenes.vocabulary import SEG_CLASSES
from counterpoint.evaluation.make import make, reader
from counterpoint.evaluation.suite import Method, Readers, Suite, Task, stack, unstack
from counterpoint.evaluation.suites import fusion
from counterpoint.evaluation.suites.tiny_quality import CONTROLS, TinyQuality
from counterpoint.types import Image, UserError

METHODS = [Method("sum"), Method("mean", {"pose": 0.5})]
SUITES: dict[str, Suite] = {
    "conflicting": fusion.conflicting(pairs),
    "complementary": fusion.complementary(pairs),
    "silent": fusion.silent(pairs),
    "single": fusion.single(pairs),
    "tiny-quality": TinyQuality(lambda pictures: pictures),
}


def blind_readers() -> Readers:
    """Readers that look at pictures only through colours: enough to tell suites' plumbing from its absence."""

    def classes(pictures: Tensor) -> Tensor:
        return (pictures.mean(1) * (len(SEG_CLASSES) - 1)).round().long()

    return Readers(
        maps={
            "canny": lambda pictures: stack([canny(image) for image in unstack(pictures)]),
            "hed": lambda pictures: stack([soft_edge(image) for image in unstack(pictures)]),
            "depth": lambda pictures: pictures,
            "seg": lambda pictures: pictures,
            "pose": lambda pictures: pictures,
        },
        person=lambda pictures: pictures[:, 0] > 0.5,
        classes=classes,
        classes_of=lambda images: classes(stack(images)),
        embed_pictures=lambda pictures: pictures.mean((2, 3)) + 0.1,
        embed_texts=lambda texts: torch.ones(len(texts), 3),
        pristine=load_pristine(),
    )


def noise(task: Task) -> Image:
    return np.random.default_rng(task.seed).integers(0, 256, (128, 128, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_makes_and_scores(name: str, tmp_path: Path) -> None:
    suite = SUITES[name]
    tasks = suite.tasks(3, METHODS)
    assert len({task.key for task in tasks}) == len(tasks)
    make(tasks, lambda chunk: [noise(task) for task in chunk], tmp_path)
    rows = suite.score(reader(tmp_path), 3, METHODS, blind_readers())
    assert len({(row.name, row.case) for row in rows}) == len(rows)
    for row in rows:
        assert all(len(metric.rows) == 3 for metric in row.metrics), row


def test_methods_share_seeds_and_cases() -> None:
    tasks = fusion.conflicting(pairs).tasks(2, METHODS)
    for first, second in zip(tasks[:2], tasks[2:4], strict=True):
        assert (first.prompt, first.seed) == (second.prompt, second.seed)
        assert first.method.name == "sum"
        assert second.method.name == "mean pose=0.5"
        for kind in first.images:
            np.testing.assert_array_equal(first.images[kind], second.images[kind])


def test_a_killed_run_continues(tmp_path: Path) -> None:
    tasks = fusion.conflicting(pairs).tasks(3, METHODS)
    seen: list[str] = []

    def maker(chunk: list[Task]) -> list[Image]:
        if len(seen) >= 8:
            raise KeyboardInterrupt
        seen.extend(task.key for task in chunk)
        return [noise(task) for task in chunk]

    with pytest.raises(KeyboardInterrupt):
        make(tasks, maker, tmp_path / "cut", batch=2)
    seen_before, heard = list(seen), []
    seen.clear()
    make(tasks, lambda chunk: seen.extend(t.key for t in chunk) or [noise(t) for t in chunk], tmp_path / "cut", 2,
         lambda done, total: heard.append((done, total)))  # fmt: skip
    assert not set(seen) & set(seen_before)
    assert heard[-1] == (len(tasks), len(tasks))
    make(tasks, lambda chunk: [noise(task) for task in chunk], tmp_path / "whole", batch=5)
    scores = [
        [metric.compute()
         for row in fusion.conflicting(pairs).score(reader(tmp_path / run), 3, METHODS, blind_readers())
         for metric in row.metrics]
        for run in ("cut", "whole")
    ]  # fmt: skip
    assert scores[0] == scores[1]


def test_batches_hold_one_sort_of_task(tmp_path: Path) -> None:
    def maker(chunk: list[Task]) -> list[Image]:
        assert len({(task.method.name, tuple(task.images)) for task in chunk}) == 1
        return [noise(task) for task in chunk]

    make(TinyQuality(lambda x: x).tasks(2), maker, tmp_path)


def test_perfect_pictures_reach_the_ceiling(tmp_path: Path) -> None:
    """The real scenes in place of generated ones: edges have adherence 1 with a codec that loses nothing."""
    suite = TinyQuality(lambda pictures: pictures)
    start = SPLITS["test"].start

    def maker(chunk: list[Task]) -> list[Image]:
        made = []
        for task in chunk:
            kind = task.key.split("/")[0]
            made.append(scene(task.seed).image if kind in CONTROLS else scene(start + 500).image)
        return made

    make(suite.tasks(4), maker, tmp_path)
    rows = {row.name: row for row in suite.score(reader(tmp_path), 4, (), blind_readers())}
    for kind in ("canny", "hed"):
        values = {metric.name: metric.compute() for metric in rows[kind].metrics}
        assert values["adherence"] == pytest.approx(1)
        assert values["floor"] < values["ceiling"] == pytest.approx(1)


def test_a_folder_belongs_to_one_runs_settings(tmp_path: Path) -> None:
    settle(tmp_path, {"steps": 20, "weights": "ab"})
    settle(tmp_path, {"steps": 20, "weights": "ab"})
    with pytest.raises(UserError, match="steps: 20 -> 50"):
        settle(tmp_path, {"steps": 50, "weights": "ab"})
