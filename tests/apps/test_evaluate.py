"""The command line around stored results."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from counterpoint.apps.cli.methods import methods_asked, models_asked
from counterpoint.apps.record import settle
from counterpoint.apps.suites import PipelineMaker, Source, _identity, identity, make_bench
from counterpoint.evaluation.suite import Task
from counterpoint.fusion import FUSIONS, RULES
from counterpoint.fusion.minimal_impact import INJECTION
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import UserError
from tests.conftest import random_parts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "folders that hold results"),
        ("[1]", "is no results file"),
        ("{", "is no results file"),
        ("{}", "no rows of a suite"),
    ],
)
def test_leaderboard_of_what_is_no_result(cli, tmp_path: Path, content: str | None, said: str) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    if content is not None:
        (folder / "results.json").write_text(content)
    status, _, message = cli("evaluate", "leaderboard", folder, "--out", tmp_path / "page.md")
    assert status == 2
    assert said in message
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    ("suite", "more", "rows"),
    [
        (
            "conflicting",
            ["--fusion", "sum", "--fusion", "mean", "--seeds", 2],
            [("sum", "pose+seg"), ("mean", "pose+depth")],
        ),
        (
            "silent",
            ["--fusion", "sum", "--gate-silence", "--quality", "fast"],
            [("sum gated fast", "crops, brief prompt")],
        ),
        ("layout", [], [("base", "L2"), ("base", "all levels")]),
        ("style", [], [("base", "reference of another scene")]),
        ("conservativity", [], [("canny", "noisy pictures"), ("seg", "noisy pictures")]),
        ("tiny-quality", [], [("codec", "test scenes"), ("hed", "test scenes")]),
    ],
)
def test_suites_on_the_family(
    cli, tiny: Path, tmp_path: Path, suite: str, more: list[str], rows: list[tuple[str, str]]
) -> None:
    arguments = ["evaluate", suite, "-n", 3, "--steps", 1, "--out", tmp_path / "run", "--json", *more]
    status, out, error = cli(*arguments)
    assert status == 0, error
    record = json.loads(out)
    assert set(rows) <= {(row["name"], row["case"]) for row in record["rows"]}
    assert record == json.loads((tmp_path / "run" / "results.json").read_text())
    page = (tmp_path / "run" / "index.html").read_text()
    assert all(row["name"] in page and row["case"] in page for row in record["rows"])
    for name in ("results.md", "results.tex"):
        assert (tmp_path / "run" / name).read_text()
    again = json.loads(cli(*arguments)[1])
    assert again["rows"] == record["rows"], "finished pictures are read, not made again"
    arguments[5] = 2
    status, _, error = cli(*arguments)
    assert (status, "steps: 1 -> 2" in error) == (2, True)


def test_two_cases_and_one(cli, tiny: Path, tmp_path: Path) -> None:
    """Intervals are null where two cases give none, and a distance of one picture is refused before any is made."""
    arguments = ["evaluate", "single", "--steps", 1, "--fusion", "sum", "--out", tmp_path / "run", "--json", "-n"]
    status, out, error = cli(*arguments, 2)
    assert status == 0, error
    row = json.loads(out)["rows"][0]
    assert row["metrics"]["tower_kid_canny"]["low"] is None
    assert row["metrics"]["f1_canny"]["low"] is not None
    status, _, error = cli(*arguments[:-4], "--out", tmp_path / "one", "-n", 1)
    assert (status, "at least two samples" in error) == (2, True), error
    assert not (tmp_path / "one").exists()
    status, _, error = cli(*arguments, 2, "--batch-size", 1)
    assert (status, "batch_size: 16 -> 1" in error) == (2, True), error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layout", "--fusion", "sum"], "--fusion belongs to evaluate conflicting"),
        (["style", "--sweep", "pose=0:1:0.5"], "--sweep belongs to"),
        (["tiny-quality", "--fusion", "sum"], "--fusion belongs to"),
        (["conservativity", "--gate-silence"], "--gate-silence belongs to"),
        (["conflicting", "--quality", "best"], "unknown quality 'best'"),
        (["single", "--metrics", "ssim"], "--metrics belongs to evaluate folder"),
        (["single", "--layouts", "a.json"], "--layouts belongs to evaluate layout"),
        (["leaderboard", "--fusion", "sum"], "evaluate leaderboard does not heed it"),
        (["silent", "--weight", "canny"], "--weight wants NAME=VALUE"),
        (["silent", "--weight", "canny=strong"], "--weight canny wants a number"),
        (["silent", "--weight", "canny=nan"], "--weight canny wants a number"),
        (["style", "--weight", "pose=1"], "--weight pose: layout and style weigh the reference alone, --weight refer"),
        (["style", "--weight", "reference=0.8"], "none of these models reads a reference, an IP-Adapter such as sty"),
        (["style", "--aggregate", "style", "--weight", "reference=3"], "of a reference is a number in 0..2, got 3.0"),
    ],
)
def test_options_that_would_be_ignored(cli, tmp_path: Path, arguments: list[str], said: str) -> None:
    status, _, error = cli("evaluate", *arguments, "--out", tmp_path / "run")
    assert (status, said in error) == (2, True), error
    assert not (tmp_path / "run").exists()


def test_rules_are_compared_once_under_fixed_weights() -> None:
    names = [
        method.name
        for method in methods_asked(["sum", "mean", "sum"], None, ["canny=0.5", "hed=1.5"], False, ["exact"], [], [])
    ]
    assert names == ["sum canny=0.5 hed=1.5", "mean canny=0.5 hed=1.5"]
    names = [method.name for method in methods_asked(None, "pose=0:1:1", ["seg=2"], False, ["exact"], [], [])]
    assert names == ["sum seg=2 pose=0", "sum seg=2 pose=1"]


@pytest.mark.filterwarnings("ignore::counterpoint.sampling.prompt.PromptCut")
def test_a_picture_of_no_numbers_is_never_black() -> None:
    parts = random_parts(controls=1)
    (network,) = parts.pop("networks")
    with torch.no_grad():
        next(parts["vae"].decoder.parameters()).fill_(torch.nan)
    pipe = Pipeline(**parts, controls={"pose": network})
    task = Task("one", "a person", 0, {"pose": np.zeros((64, 64, 3), np.uint8)})
    with pytest.raises(UserError, match="sum: the model made a picture of values that are no numbers"):
        PipelineMaker(pipe, 1, 1.0)([task])


@pytest.mark.filterwarnings("ignore::counterpoint.sampling.prompt.PromptCut")
def test_a_negative_prompt_is_heard_and_makes_another_run() -> None:
    parts = random_parts(controls=1)
    (network,) = parts.pop("networks")
    pipe = Pipeline(**parts, controls={"pose": network})
    task = Task("one", "a person", 0, {"pose": np.zeros((64, 64, 3), np.uint8)})
    plain, against = (PipelineMaker(pipe, 2, 4.0, text) for text in ("", "red"))
    assert not np.array_equal(plain([task])[0], against([task])[0])
    assert _identity(Source(negative_prompt="red"), plain, []) != _identity(Source(), plain, [])


def test_what_two_runs_must_have_in_common(tmp_path: Path, tiny: Path) -> None:
    """Readers make the conditions of photos; a device is told by its name, also where torch knows none such."""
    for name in ("depth", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    maker = SimpleNamespace(steps=2, guidance_scale=3.0)
    source = Source(device="openvino", readers={"depth": tmp_path / "depth"}, clip=tmp_path / "other")
    identity = _identity(source, maker, [])
    assert identity["device"] == "openvino"
    assert identity["versions"].keys() == {"counterpoint", "diffusers", "torch", "transformers"}
    other = replace(source, readers={"depth": tmp_path / "other"})
    assert _identity(other, maker, [])["readers"] != identity["readers"]
    assert _identity(replace(source, device="cuda:1"), maker, [])["device"] == "cuda"


def test_adapters_and_how_they_are_joined_make_another_run(tmp_path: Path) -> None:
    """Whether they were trained again, or the defaults of an aggregation have changed."""
    (tmp_path / "adapter.safetensors").write_text("first")
    methods = models_asked([f"interact,{tmp_path}", "base"], ["", "steps=5"], None)
    with pytest.raises(UserError, match="two of what is compared would be called 'migc'"):
        models_asked(["migc", "base", "migc"], [""], None)
    bench = SimpleNamespace(identity={"steps": 2})
    before = identity(bench, methods)
    assert before["steps"] == 2
    assert before["adapters"].keys() == {str(tmp_path)}
    assert ["steps=5" in one for one in before["aggregations"].values()] == [False, True]
    (tmp_path / "adapter.safetensors").write_text("second")
    after = identity(bench, methods)
    assert after["adapters"] != before["adapters"]
    assert after["aggregations"] == before["aggregations"]
    settle(tmp_path / "run", after, "choose another --out")
    settle(tmp_path / "run", identity(bench, methods), "choose another --out")
    assert identity(bench, models_asked(["base"], [""], None)) == {"steps": 2}


def test_a_control_of_the_family_is_exchanged(tiny: Path) -> None:
    with pytest.raises(UserError, match="--controlnet mlsd: on scenes there are canny"):
        make_bench(Source(controls={"mlsd": "nowhere"}))
    own = make_bench(Source())
    tuned = make_bench(Source(controls={"pose": str(tiny / "controls" / "seg")}))
    assert list(tuned.pipe.controls) == list(own.pipe.controls)
    for name, wanted in (("pose", "seg"), ("canny", "canny")):
        one, other = (bench.pipe.controls[kind].state_dict() for bench, kind in ((tuned, name), (own, wanted)))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert tuned.identity["weights"] != own.identity["weights"]


def test_networks_are_compared_on_the_same_cases(cli, tiny: Path, tmp_path: Path) -> None:
    """A network that is the family's own makes the family's own pictures; another one makes others."""
    shutil.copytree(tiny / "controls" / "canny", tmp_path / "same")
    shutil.copytree(tiny / "controls" / "depth", tmp_path / "other")
    given = [f"--versus=canny={tmp_path / 'same'}", f"--versus=canny={tmp_path / 'other'}"]
    small = ["evaluate", "single", "--fusion", "sum", "-n", 2, "--steps", 1, "--json"]
    status, out, error = cli(*small, *given, "--out", "run")
    assert status == 0, error
    rows = json.loads(out)["rows"]
    assert {row["case"] for row in rows} == {"canny"}
    found = {row["name"]: row["metrics"] for row in rows}
    assert set(found) == {"sum", "sum of same", "sum of other"}
    assert found["sum"]["ssim_canny"] == found["sum of same"]["ssim_canny"] != found["sum of other"]["ssim_canny"]
    status, out, error = cli(*small, *given, "--out", "run", "--baseline", "sum of other")
    assert status == 0, error
    assert json.loads(out)["rows"][0]["name"] == "sum of other", "what others are marked against comes first"
    status, _, error = cli(*small, *given, "--out", "run", "--baseline", "other")
    assert (status, "no row is called so; there are 'sum', 'sum of same', 'sum of other'" in error) == (2, True), error
    shutil.copytree(tiny / "controls" / "depth", tmp_path / "elsewhere" / "same")
    status, _, error = cli(*small, f"--versus=canny={tmp_path / 'elsewhere' / 'same'}", "--out", "run")
    assert (status, "made with other settings (versus" in error) == (2, True), "a row is one network's"
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), INJECTION: {"reading": "min-norm"}}))
    status, out, error = cli(*small, *given[1:], "--out", "own")
    assert status == 0, error
    names = {row["name"] for row in json.loads(out)["rows"]}
    assert names == {"sum", "minimal-impact:injection=min-norm,granularity=sample of other"}
    shutil.copytree(tmp_path / "same", tmp_path / "deep" / "same")
    for wrong, said in (
        ([*given[:1], f"--versus=canny={tmp_path / 'deep' / 'same'}"], "would be called 'sum of same'"),
        ([*given[:1], "--device=openvino"], "leave --device openvino away"),
        (["--versus=canny=nowhere"], "there is no ControlNet of diffusers' layout"),
        (["--versus=canny"], "--versus wants NAME=VALUE"),
        ([f"--versus=normal={tmp_path / 'same'}"], "--versus normal: there is no such control"),
    ):
        status, _, error = cli(*small, *wrong, "--out", "bad")
        assert (status, error.count("\n")) == (2, 1), error
        assert said in error
    status, out, error = cli("evaluate", "conservativity", "-n", 2, "--json", *given[:1], "--out", "gradient")
    assert status == 0, error
    assert [row["name"] for row in json.loads(out)["rows"]] == ["canny", "canny of same"]
    status, _, error = cli("evaluate", "conflicting", "--fusion", "sum", *given[:1], "--out", "bad")
    assert (status, error.count("\n")) == (2, 1), error
    assert "no case here has canny; there are depth, pose, seg" in error
    assert not (tmp_path / "bad").exists()


def test_pushes_are_compared(cli) -> None:
    """A push nobody feels makes the same pictures; only cases of the control that is pushed are made."""
    small = ["evaluate", "single", "--fusion", "sum", "-n", 2, "--steps", 1, "--json"]
    pushes = ["--steer", "depth=0.05", "--steer", "depth=0.3,pose=0.3", "--steer", "depth=0"]
    status, out, error = cli(*small, *pushes, "--out", "run")
    assert status == 0, error
    rows = [row for row in json.loads(out)["rows"] if row["case"] == "depth"]
    found = {row["name"]: row["metrics"]["depth_rmse"]["mean"] for row in rows}
    assert list(found) == ["sum", "sum steered depth=0.05", "sum steered depth=0.3 pose=0.3", "sum steered depth=0"]
    assert found["sum"] == found["sum steered depth=0"]
    assert len(set(found.values())) == 3
    assert {row["case"] for row in json.loads(out)["rows"]} == {"depth", "pose"}
    for wrong, said in (
        (["--steer", "canny=0.1"], "--steer canny: no probe reads it; the model's read hed, depth, pose, seg"),
        (["--steer", "depth"], "--steer wants NAME=VALUE"),
        (["--steer", "depth=much"], "--steer depth wants a number, got 'much'"),
        (["--steer", "depth=0.1", "--steer", "depth=0.10"], "would be called 'sum steered depth=0.1'"),
    ):
        status, _, error = cli(*small, *wrong, "--out", "bad")
        assert (status, error.count("\n")) == (2, 1), error
        assert said in error
    assert not Path("bad").exists()


def test_line_drawings_are_read_back(cli, tiny: Path) -> None:
    small = ["-n", 2, "--steps", 1, "--json"]
    status, out, error = cli("evaluate", "single", "--fusion", "sum", *small, "--out", "single")
    assert status == 0, error
    rows = {row["case"]: row["metrics"] for row in json.loads(out)["rows"]}
    assert 0 < rows["lineart"]["ssim_lineart"]["mean"] < 1
    status, out, error = cli("evaluate", "tiny-quality", *small, "--out", "quality")
    assert status == 0, error
    rows = {row["name"]: row["metrics"] for row in json.loads(out)["rows"]}
    assert rows["lineart"]["floor"]["mean"] < rows["lineart"]["ceiling"]["mean"] < 1


def test_rules_of_ones_own(cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared, their code is part of the run, and what they made is made again with them alone."""
    for table in (RULES, FUSIONS):  # whatever happens, they are as before afterwards
        monkeypatch.setitem(table, "loud", None)
        del table["loud"]
    mine = tmp_path / "mine.py"
    mine.write_text("def loud(features):\n    return features.amax(0)\n")
    arguments = [
        "evaluate",
        "conflicting",
        "-n",
        2,
        "--steps",
        1,
        "--fusion",
        "sum",
        "--fusion",
        "loud",
        "--out",
        "run",
    ]
    status, _, error = cli(*arguments)
    assert (status, "unknown fusion 'loud'" in error) == (2, True), error
    status, _, error = cli(*arguments, "--rules", mine, "--json")
    assert status == 0, error
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    scores = list(csv.DictReader((tmp_path / "run" / "scores.csv").open()))
    for row in results["rows"]:
        mine_alone = [
            float(one["value"])
            for one in scores
            if (one["case"], one["name"], one["measure"]) == (row["case"], row["name"], "clip")
        ]
        assert len(mine_alone) == 2
        assert np.mean(mine_alone) == pytest.approx(row["metrics"]["clip"]["mean"])
    del RULES["loud"], FUSIONS["loud"]
    mine.write_text("def loud(features):\n    return features.amin(0)\n")
    status, _, error = cli(*arguments, "--rules", mine)
    assert (status, "rules: " in error) == (2, True), error
    del RULES["loud"], FUSIONS["loud"]

    status, out, error = cli(
        "generate", "a person", "--rules", mine, "--control", "pose=" + str(next((tmp_path / "run").rglob("*.png"))),
        "--control", "seg=" + str(next((tmp_path / "run").rglob("*.png"))), "--fusion", "loud", "--steps", 1, "--json",
    )  # fmt: skip
    assert status == 0, error
    picture = json.loads(out)["images"][0]
    del RULES["loud"], FUSIONS["loud"]
    status, _, error = cli("replay", picture, "--verify")
    assert (status, "unknown fusion" in error) == (2, True), error
    status, out, error = cli("replay", picture, "--verify", "--rules", mine)
    assert (status, out.startswith("identical")) == (0, True), error
    del RULES["loud"], FUSIONS["loud"]
    status, out, error = cli("cite", picture)
    assert (status, "loud is no rule of counterpoint's" in error, "ControlNet" in out or "Adding" in out) == (
        0,
        True,
        True,
    )
