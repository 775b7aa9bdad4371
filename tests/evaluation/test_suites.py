"""Suites on pictures whose score is known: the scenes themselves, and noise."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint.apps.detectors import by_classes
from counterpoint.apps.readers import _classes_of, load_pristine
from counterpoint.apps.record import settle
from counterpoint.conditions.canny import canny
from counterpoint.conditions.layout import Instance, Layout
from counterpoint.conditions.lines import lines
from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.data import pairs
from counterpoint.data.layouts import MOST, scene_actions, scene_levels
from counterpoint.data.scenes.render import SPLITS, Scene, scene
from counterpoint.data.scenes.vocabulary import SEG_CLASSES, SEG_INDEX
from counterpoint.evaluation import measures
from counterpoint.evaluation.make import costs, in_turn, make, reader
from counterpoint.evaluation.report import markdown, records
from counterpoint.evaluation.seeds import Seeded
from counterpoint.evaluation.suite import KINDS, Method, Packed, Readers, Suite, Task, stack, unstack
from counterpoint.evaluation.suites import conservativity, fusion
from counterpoint.evaluation.suites.layout import LayoutSuite
from counterpoint.evaluation.suites.style import StyleSuite
from counterpoint.evaluation.suites.tiny_quality import TinyQuality
from counterpoint.models.strength import strength_of, strengthen
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import Image, UserError
from tests.conftest import random_parts

METHODS = [Method("sum"), Method("mean", {"pose": 0.5})]
SUITES: dict[str, Suite] = {
    "conflicting": fusion.conflicting(pairs),
    "complementary": fusion.complementary(pairs),
    "silent": fusion.silent(pairs),
    "single": fusion.single(pairs, 128),
    "tiny-quality": TinyQuality(lambda pictures: pictures),
    "layout": LayoutSuite(scene_levels(), scene_actions()),
    "style": StyleSuite(),
}


def blind_readers() -> Readers:
    """Readers that look at pictures only through colours: enough to tell suites' plumbing from its absence."""

    def classes(pictures: Tensor) -> Tensor:
        return (pictures.mean(1) * (len(SEG_CLASSES) - 1)).round().long()

    detect, segment = by_classes(classes, SEG_INDEX)
    return Readers(
        maps={
            "canny": lambda pictures: stack([canny(image) for image in unstack(pictures)]),
            "hed": lambda pictures: stack([soft_edge(image) for image in unstack(pictures)]),
            "lineart": lambda pictures: stack([lines(image) for image in unstack(pictures)]),
            "depth": lambda pictures: pictures,
            "seg": lambda pictures: pictures,
            "pose": lambda pictures: pictures,
        },
        person=lambda pictures: pictures[:, 0] > 0.5,
        joints=lambda pictures: torch.full((len(pictures), 18, 2), torch.nan, dtype=torch.float64),
        classes=classes,
        classes_of=lambda images: classes(stack(images)),
        embed_pictures=lambda pictures: pictures.mean((2, 3)) + 0.1,
        embed_texts=lambda texts: torch.ones(len(texts), 3),
        pristine=load_pristine(),
        features=lambda pictures: pictures.mean((2, 3)),
        features_of="colour",
        detect=detect,
        segment=segment,
    )


WITHOUT_AND_WITH_PROMPT = ("split, none prompt", "split, brief prompt")


def noise(task: Task) -> Image:
    return np.random.default_rng(task.seed).integers(0, 256, (128, 128, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_makes_and_scores(name: str, tmp_path: Path) -> None:
    suite = SUITES[name]
    tasks = suite.tasks(3, METHODS)
    assert len({task.key for task in tasks}) == len(tasks)
    make(tasks, in_turn(lambda chunk: [noise(task) for task in chunk]), tmp_path)
    rows = suite.score(reader(tmp_path), 3, METHODS, blind_readers())
    assert len({(row.name, row.case) for row in rows}) == len(rows)
    for row in rows:
        wanted = 15 if row.case == "all levels" else 3
        assert all(len(metric.rows) == wanted for metric in row.metrics), row


def test_methods_share_seeds_and_cases() -> None:
    tasks = fusion.conflicting(pairs).tasks(2, METHODS)
    for first, second in zip(tasks[:4:2], tasks[1:4:2], strict=True):
        assert (first.prompt, first.seed) == (second.prompt, second.seed)
        assert first.method.name == "sum"
        assert second.method.name == "mean pose=0.5"
        for kind in first.images:
            np.testing.assert_array_equal(first.images[kind], second.images[kind])


@pytest.mark.parametrize(
    ("features_of", "n", "name"),
    [("inception", 2047, "kid_canny"), ("inception", 2048, "fid_canny"), ("tower", 5000, "tower_kid_canny")],
)
def test_which_distance_is_reported(features_of: str, n: int, name: str) -> None:
    assert measures.region_distance("canny", features_of, n).name == name


def test_silent_regions_are_measured_where_they_are() -> None:
    """A canny picture that speaks on the left only: its edges count there, the variance of the picture elsewhere."""
    case = pairs.silent(0, "split", ("canny", "pose"))
    speaks = case.active["canny"]
    readers = replace(blind_readers(), maps={"canny": lambda pictures: pictures})
    picture = np.where(speaks[..., None], case.images["canny"], 0).astype(np.uint8)
    other = np.where(speaks[..., None], 0, np.random.default_rng(0).integers(0, 2, (128, 128, 1)) * 255)
    pictures = stack([picture, np.broadcast_to(other, picture.shape).astype(np.uint8)])
    cycle, variance = measures.cycle("canny"), measures.silent_variance("canny")
    for metric in (cycle, variance):
        metric.update(pictures, [case, case], readers)
    edges = (case.images["canny"][speaks] / 255).mean()
    np.testing.assert_allclose(cycle.rows.flatten(), [0, edges], atol=1e-6)
    assert variance.rows.flatten()[0] == 0
    np.testing.assert_allclose(variance.rows.flatten()[1], 3 * 127.5**2, rtol=0.01)


def test_rows_say_where_no_keys_were_lent(tmp_path: Path) -> None:
    methods = [Method(fusion=name) for name in ("pix", "0:pix,0.5:cross")]
    suite = fusion.FusionSuite({name: fusion.silent(pairs).sorts[name] for name in WITHOUT_AND_WITH_PROMPT})
    make(suite.tasks(2, methods), in_turn(lambda chunk: [noise(task) for task in chunk]), tmp_path)
    rows = suite.score(reader(tmp_path), 2, methods, blind_readers())
    noted = {(row.case, row.name) for row in rows if row.note == fusion.NO_SUBJECT}
    assert noted == {(WITHOUT_AND_WITH_PROMPT[0], "0:pix,0.5:cross")}
    assert f"* 0:pix,0.5:cross, {WITHOUT_AND_WITH_PROMPT[0]}: {fusion.NO_SUBJECT}" in markdown(records(rows, "tiny"))


def test_a_person_is_no_error_of_the_background() -> None:
    """With depth "read" from the picture itself: the background as asked, and the person white on it."""
    cases = [pairs.conflicting(number, "depth") for number in range(2)]
    pictures = [np.where(case.person[..., None], 255, case.images["depth"]).astype(np.uint8) for case in cases]
    whole, background = measures.map_mse("depth"), measures.background_mse("depth")
    for metric in (whole, background):
        metric.update(stack(pictures), cases, blind_readers())
    assert (whole.compute() > 0, background.compute()) == (True, 0)


def test_a_killed_run_continues(tmp_path: Path) -> None:
    tasks = fusion.conflicting(pairs).tasks(3, METHODS)
    seen: list[str] = []

    def maker(chunk: list[Task]) -> list[Image]:
        if len(seen) >= 8:
            raise KeyboardInterrupt
        seen.extend(task.key for task in chunk)
        return [noise(task) for task in chunk]

    with pytest.raises(KeyboardInterrupt):
        make(tasks, in_turn(maker), tmp_path / "cut", batch=2)
    seen_before, heard = list(seen), []
    seen.clear()
    recorded = in_turn(lambda chunk: seen.extend(t.key for t in chunk) or [noise(t) for t in chunk])
    make(tasks, recorded, tmp_path / "cut", 2, lambda done, total: heard.append((done, total)))
    assert not set(seen) & set(seen_before)
    assert heard[-1] == (len(tasks), len(tasks))
    make(tasks, in_turn(lambda chunk: [noise(task) for task in chunk]), tmp_path / "whole", batch=5)
    scores = [
        [metric.compute()
         for row in fusion.conflicting(pairs).score(reader(tmp_path / run), 3, METHODS, blind_readers())
         for metric in row.metrics]
        for run in ("cut", "whole")
    ]  # fmt: skip
    assert scores[0] == scores[1]


def test_a_batch_that_lacks_a_picture_is_made_again_whole(tmp_path: Path) -> None:
    """Which pictures are neighbours must not depend on when a run was killed."""
    tasks = fusion.conflicting(pairs).tasks(4, METHODS[:1])
    seen: list[list[str]] = []

    def maker(chunk: list[Task]) -> list[Image]:
        seen.append([task.key for task in chunk])
        return [noise(task) for task in chunk]

    make(tasks, in_turn(maker), tmp_path, batch=3)
    whole, first = list(seen), next(batch for batch in seen if len(batch) == 3)
    seen.clear()
    (tmp_path / f"{first[1]}.png").unlink()
    make(tasks, in_turn(maker), tmp_path, batch=3)
    assert seen == [first]
    seen.clear()
    make(fusion.conflicting(pairs).tasks(2, METHODS[:1]), in_turn(maker), tmp_path / "fewer", batch=3)
    make(tasks, in_turn(maker), tmp_path / "fewer", batch=3)
    assert seen[2:] == whole


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "another"},
        {"seed": 99},
        {"subject": "dog"},
        {"method": METHODS[1]},
        {"layout": Layout((Instance("a dog", (0.0, 0.0, 0.5, 0.5)),))},
        {"images": {"pose": np.eye(32, dtype=np.uint8)[..., None].repeat(3, -1)}},
    ],
)
def test_pictures_of_another_case_are_not_taken_for_those_of_this_one(change: dict, tmp_path: Path) -> None:
    task = Task("one", "a prompt", 5, {"pose": np.zeros((32, 32, 3), np.uint8)}, METHODS[0])
    calls: list[str] = []
    maker = in_turn(lambda chunk: calls.extend(one.key for one in chunk) or [noise(one) for one in chunk])
    for _ in range(2):
        make([replace(task, method=replace(task.method))], maker, tmp_path)
    assert calls == ["one"]
    with pytest.raises(UserError, match="was made for another case"):
        make([replace(task, **change)], maker, tmp_path)
    assert calls == ["one"]
    (tmp_path / "one.png").write_bytes(b"cut")
    with pytest.raises(UserError, match="was made for another case"):
        make([task], maker, tmp_path)


def test_several_seeds_of_a_case(tmp_path: Path) -> None:
    """Distinct for a case, the same for every method; a number is the mean over seeds, its interval one over cases."""
    suite = Seeded(fusion.single(pairs, 128).only(["depth"]), 3)
    tasks = suite.tasks(4, METHODS)
    assert len({task.key for task in tasks}) == len(tasks) == 3 * 4 * 2
    for method in METHODS:
        assert len({task.seed for task in tasks if task.method is method}) == 12
    assert {task.seed for task in tasks if task.method is METHODS[0]} == {
        task.seed for task in tasks if task.method is METHODS[1]
    }
    assert [task.seed for task in tasks[:8]] == [task.seed for task in suite.suite.tasks(4, METHODS)]
    make(tasks, in_turn(lambda chunk: [noise(task) for task in chunk]), tmp_path)
    found = suite.score(reader(tmp_path), 4, METHODS, blind_readers())
    alone = [
        suite.suite.score(
            lambda key, one=one: reader(tmp_path)(f"{key}-{one}" if one else key), 4, METHODS, blind_readers()
        )
        for one in range(3)
    ]
    for place, row in enumerate(found):
        for metric, *same in zip(row.metrics, *(rows[place].metrics for rows in alone), strict=True):
            assert metric.rows.shape[:2] == (4, 3)
            assert metric.compute() == pytest.approx(sum(one.compute() for one in same) / 3)


def test_images_are_packed_without_loss() -> None:
    case = pairs.conflicting(0)
    packed = Packed(case.images)
    assert list(packed) == list(case.images)
    for label, image in case.images.items():
        np.testing.assert_array_equal(packed[label], image)


def test_edges_are_compared_as_the_benchmark_does_where_pictures_are_large_enough() -> None:
    small, large = (fusion.single(pairs, side).sorts for side in (128, 512))
    names = [[metric.name for metric in sort["canny"].metrics("tower", 3)] for sort in (small, large)]
    assert names[0][:3] == ["ssim_canny", "psnr_canny", "f1_canny"]
    assert names[1][:3] == ["ms_ssim_canny", "psnr_canny", "f1_canny"]
    assert large["hed"].metrics("tower", 3)[0].name == "ms_ssim_hed"
    picture = pairs.alone(0, "canny")
    readers = replace(blind_readers(), maps={"canny": lambda pictures: torch.ones_like(pictures)})
    share = float((picture.images["canny"][..., 0] > 127).mean())  # of the pixels that are edges: all are found
    f1 = measures.edges("canny", 128)[2].measure(torch.zeros(1, 3, 128, 128), [picture], readers)
    assert float(f1) == pytest.approx(2 * share / (1 + share))


def test_unlabelled_places_count_nowhere() -> None:
    """Published classes come first; black is no class of ADE20K, and classes of one colour are one."""
    case = pairs.alone(0, "seg")
    labels = np.full((128, 128), -1)
    labels[:64] = 5
    read = torch.zeros(1, 128, 128, dtype=torch.long)
    read[:, :32] = 5
    readers = replace(blind_readers(), classes=lambda _: read)
    iou = measures.class_iou(150)
    iou.update(torch.zeros(1, 3, 128, 128), [replace(case, classes=labels)], readers)
    assert iou.compute() == pytest.approx((0.5 + 0) / 2)
    classes = partial(_classes_of, ADE20K_PALETTE)
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2] = ADE20K_PALETTE[48]
    assert classes([image])[0].tolist() == [[6] * 4] * 2 + [[-1] * 4] * 2
    readers = replace(readers, classes_of=classes, maps={"seg": lambda pictures: stack(list(ADE20K_PALETTE[
        np.full((len(pictures), 4, 4), 48)]))})  # fmt: skip
    iou = measures.class_iou(150)
    iou.update(torch.zeros(1, 3, 4, 4), [replace(case, images={"seg": image})], readers)
    assert iou.compute() == 1


def test_batches_hold_one_sort_of_task(tmp_path: Path) -> None:
    def maker(chunk: list[Task]) -> list[Image]:
        assert len({(task.method.name, tuple(task.images)) for task in chunk}) == 1
        return [noise(task) for task in chunk]

    make(TinyQuality(lambda x: x).tasks(2), in_turn(maker), tmp_path)


def test_perfect_pictures_reach_the_ceiling(tmp_path: Path) -> None:
    """The real scenes in place of generated ones: edges have adherence 1 with a codec that loses nothing."""
    suite = TinyQuality(lambda pictures: pictures)
    start = SPLITS["test"].start

    def maker(chunk: list[Task]) -> list[Image]:
        made = []
        for task in chunk:
            kind = task.key.split("/")[0]
            made.append(scene(task.seed).image if kind in KINDS else scene(start + 500).image)
        return made

    make(suite.tasks(4), in_turn(maker), tmp_path)
    rows = {row.name: row for row in suite.score(reader(tmp_path), 4, (), blind_readers())}
    for kind in ("canny", "hed", "lineart"):
        values = {metric.name: metric.compute() for metric in rows[kind].metrics}
        assert values["adherence"] == pytest.approx(1)
        assert values["floor"] < values["ceiling"] == pytest.approx(1)


def test_a_folder_belongs_to_one_runs_settings(tmp_path: Path) -> None:
    settle(tmp_path, {"steps": 20, "weights": "ab"}, "choose another --out")
    settle(tmp_path, {"steps": 20, "weights": "ab"}, "choose another --out")
    with pytest.raises(UserError, match="steps: 20 -> 50"):
        settle(tmp_path, {"steps": 50, "weights": "ab"}, "choose another --out")
    for more in ({"ways": {"a": 1}}, {"ways": {"b": 2}}, {"ways": {"a": 1}}, {}):
        settle(tmp_path, {"steps": 20, "weights": "ab", **more}, "choose another --out")
    assert json.loads((tmp_path / "settings.json").read_text())["ways"] == {"a": 1, "b": 2}
    with pytest.raises(UserError, match=r"ways: \{'a': 1, 'b': 2\} -> \{'a': 3\}"):
        settle(tmp_path, {"steps": 20, "weights": "ab", "ways": {"a": 3}}, "choose another --out")
    for damaged in ("{", "[1]", ""):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            settle(tmp_path, {"steps": 20}, "choose another --out")


def test_costs_are_medians_and_maxima_by_method(tmp_path: Path) -> None:
    assert costs(tmp_path) == {"seconds_a_picture": {}, "peak_mb": {}}
    tasks = fusion.conflicting(pairs).tasks(2, METHODS)
    make(tasks, in_turn(lambda chunk: [noise(task) for task in chunk]), tmp_path, batch=1)
    found = costs(tmp_path)
    assert set(found["seconds_a_picture"]) == set(found["peak_mb"]) == {method.name for method in METHODS}
    assert all(seconds > 0 for seconds in found["seconds_a_picture"].values())


def drawn(number: int, level: int) -> Scene:
    return scene(number, content="things", style="photo", things=level if level > MOST else None)


def truthful_readers() -> Readers:
    """Readers that know the layout suite's scenes by their picture."""
    known = {one.image.tobytes(): one.seg for level, first in scene_levels().items() for case in first(3)
             if (one := drawn(case.number, level))}  # fmt: skip
    detect, segment = by_classes(
        lambda pictures: torch.from_numpy(np.stack([known[image.tobytes()] for image in unstack(pictures)])).long(),
        SEG_INDEX,
    )
    return replace(blind_readers(), detect=detect, segment=segment)


def test_layouts_of_real_scenes_succeed_and_noise_fails(tmp_path: Path) -> None:
    suite = LayoutSuite(scene_levels())
    methods = [Method(models=("base",)), Method(models=("interact", "migc"), aggregation="steps=3,eta=0.5x:0.4x")]
    tasks = suite.tasks(3, methods)
    assert all(len(task.layout.instances) == int(task.key[1]) for task in tasks if task.layout)
    real = in_turn(lambda chunk: [drawn(task.seed, int(task.key[1])).image for task in chunk])
    make(tasks, real, tmp_path / "real")
    rows = suite.score(reader(tmp_path / "real"), 3, methods, truthful_readers())
    assert [row.case for row in rows[::3]] == ["L2", "L3", "L4", "L5", "L6", "all levels"]
    assert [row.name for row in rows[:3]] == ["the scenes themselves", "base", "interact+migc steps=3,eta=0.5x:0.4x"]
    for own, other in zip(rows[::3], rows[1::3], strict=True):
        assert not own.rival, "nobody competes with the truth"
        for one, same in zip(own.metrics, other.metrics, strict=True):
            assert torch.equal(one.rows, same.rows)
    success, overlap, _ = rows[-1].metrics
    assert success.compute() > 0.85  # a thing behind another of its kind is one patch with it
    assert overlap.compute() > 0.85
    assert success.rows[:, 2].tolist() == [level for level in range(2, 7) for _ in range(3)]
    make(tasks, in_turn(lambda chunk: [noise(task) for task in chunk]), tmp_path / "noise")
    rows = suite.score(reader(tmp_path / "noise"), 3, methods, blind_readers())
    assert rows[-1].metrics[0].compute() == 0
    published = LayoutSuite({2: lambda n: [replace(case, picture=None) for case in scene_levels()[2](n)]})
    rows = published.score(reader(tmp_path / "noise"), 3, methods, blind_readers())
    assert {row.name for row in rows} == {method.name for method in methods}, "a published layout has no picture"


@pytest.mark.parametrize("suite", [LayoutSuite(scene_levels(), scene_actions()), StyleSuite()])
def test_a_reference_has_the_weight_that_a_method_gives_it(suite: LayoutSuite | StyleSuite) -> None:
    methods = [Method(models=("style",)), Method(models=("style",), weights={"reference": 0.8})]
    assert [method.name for method in methods] == ["style", "style reference=0.8"]
    tasks = suite.tasks(1, methods)
    assert [task.layout.reference.weight for task in tasks] == [1.0, 0.8] * (len(tasks) // 2)
    assert len({task.key for task in tasks}) == len(tasks)


@pytest.mark.filterwarnings("ignore::counterpoint.sampling.prompt.PromptCut")
def test_asymmetry_is_each_cases_own(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts(controls=2)
    networks = parts.pop("networks")
    for model in (parts["unet"], parts["vae"], parts["text_encoder"], *networks):
        model.double()
    pipe = Pipeline(**parts, controls=dict(zip(("pose", "seg"), networks, strict=True)))
    suite, tables = conservativity.Conservativity(pipe, pairs, {"runs/other": networks[1]}.__getitem__), []
    for size in (3, 2):
        monkeypatch.setattr(conservativity, "_CHUNK", size)
        tables.append(suite.score(reader(Path("nowhere")), 3, (), blind_readers()))
    assert suite.tasks(3) == []
    assert [row.name for row in tables[0]] == ["pose", "seg"]
    for one, two in zip(*tables, strict=True):
        torch.testing.assert_close(one.metrics[0].rows, two.metrics[0].rows, rtol=1e-4, atol=0)
        found = {metric.name: metric.compute() for metric in one.metrics}
        assert found["asym"] > 0
        assert 0 < found["nasym"] < 1
    rows = suite.score(reader(Path("nowhere")), 2, [Method(networks=(("pose", "runs/other"),))], blind_readers())
    assert [row.name for row in rows] == ["pose", "pose of other"], "and nothing that is not compared"
    assert not torch.equal(*(row.metrics[0].rows for row in rows))
    strengthen(networks[0], 2.5)
    again = suite.score(reader(Path("nowhere")), 3, (), blind_readers())
    torch.testing.assert_close(again[0].metrics[0].rows, tables[0][0].metrics[0].rows, rtol=1e-4, atol=0)
    assert strength_of(networks[0]) == 2.5, "only a copy was weakened"
    strengthen(networks[0], 0.4)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(UserError, match="predicts v_prediction"):
        conservativity.Conservativity(pipe, pairs, suite.network)
    networks[0].register_to_config(_injection={"reading": "literal", "cap": 20.0, "granularity": "sample"})
    trained = suite.score(reader(Path("nowhere")), 2, (), blind_readers())
    plain = tables[0][0].metrics[0].rows[:2]
    assert not torch.allclose(trained[0].metrics[0].rows, plain, rtol=1e-2), "its own injection counts"
    torch.testing.assert_close(trained[1].metrics[0].rows, tables[0][1].metrics[0].rows[:2], rtol=1e-4, atol=0)
