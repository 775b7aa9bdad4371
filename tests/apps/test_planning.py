"""``generate --plan`` and ``--memory``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from counterpoint.apps import planning
from counterpoint.apps.request import GenerateRequest
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import scene
from counterpoint.metrics.cost import Cost
from counterpoint.sampling.plan import Plan


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    for kind in ("pose", "seg"):
        PIL.Image.fromarray(control_map(scene(0), kind)).save(tmp_path / f"{kind}.png")
    return ["generate", "a person", "--control=pose=pose.png", "--control=seg=seg.png", "--steps=2", "--out=a.png"]


def test_a_plan_makes_nothing(cli, asked: list[str]) -> None:
    status, out, error = cli(*asked, "--plan")
    assert status == 0, error
    first, *rows = out.splitlines()
    assert first.startswith("this needs 0.0")
    assert [row.split()[0] for row in rows] == ["all", "stages", "controls"]
    assert not Path("a.png").exists()
    found = json.loads(cli(*asked, "--plan", "--json", "--window=pose=0:0.5", "--memory=0.03")[1])["plan"]
    assert "at most about" in cli(*asked, "--plan", "--quality=balanced")[1], "controls may be foretold"
    assert found["residency"] == "stages"
    assert found["memory"]["stages"] <= 0.03 * 2**30 < found["memory"]["all"]


def test_a_picture_within_a_limit_is_the_same(cli, asked: list[str]) -> None:
    assert cli(*asked)[0] == 0
    free = np.asarray(PIL.Image.open("a.png"))
    assert "--dtype auto is " in cli(*asked[:-1], "--out=auto.png", "--dtype=auto")[2]
    status, out, error = cli(*asked[:-1], "--out=b.png", "--memory=0.03", "--json")
    assert status == 0, error
    found = json.loads(out)
    assert found["plan"]["residency"] == "stages"
    assert found["plan"]["seconds"] > 0
    assert found["seconds"] > 0, "what was planned and what it took"
    assert "take turns" in error
    assert "it took" in error
    assert found["plan"]["planned"] == found["plan"]["memory"]["stages"]
    if (taken := found["plan"]["taken"]) is not None:
        assert taken == pytest.approx(found["plan"]["planned"], abs=64 * 2**20), "libraries and planning do not count"
        assert ("more than the 0.03 GiB allowed" in error) == (taken > 0.03 * 2**30)
    assert np.array_equal(free, np.asarray(PIL.Image.open("b.png")))


def test_what_cannot_be_planned(cli, asked: list[str]) -> None:
    for wrong, said in (
        (["--aggregate", "base"], "--aggregate names several"),
        (["--device", "openvino"], "leave --device openvino away"),
        (["--steer", "pose=0.1"], "leave --steer away"),
        (["--memory", "inf"], "--memory wants a number of GiB"),
        (["--control", "canny=nowhere.png"], "nowhere.png"),
    ):
        status, _, error = cli(*asked, "--plan", *wrong)
        assert (status, error.count("\n")) == (2, 1), error
        assert said in error


def test_what_fits_nowhere_is_refused(cli, asked: list[str]) -> None:
    status, _, error = cli(*asked, "--memory=0.01")
    assert (status, error.count("\n")) == (2, 1), error
    assert "0.01 are allowed" in error
    assert not Path("a.png").exists()


def test_what_planning_takes_is_not_what_the_request_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are loaded to be planned, and libraries, are there before anything is counted."""
    order: list[str] = []

    @contextmanager
    def measuring(_: object) -> Iterator[Cost]:
        order.append("measure")
        cost = Cost(1.0)
        yield cost
        cost.peak_mb = 100.0 + 512 * order.count("run")

    def ran(*_: object, **__: object) -> SimpleNamespace:
        order.append("run")
        return SimpleNamespace(seconds=1.0)

    def prepared(*_: object) -> tuple[planning.Planned, SimpleNamespace]:
        order.append("prepare")
        away = SimpleNamespace(residency=SimpleNamespace(level="controls"))
        sizes = {"all": 3, "stages": 2, "controls": 1}
        return planning.Planned(Plan(sizes, {}, {}, {}, torch.device("cpu"), torch.float32), "stages"), away

    for name, stand_in in (("measuring", measuring), ("run", ran), ("prepare", prepared)):
        monkeypatch.setattr(planning, name, stand_in)
    said: list[str] = []
    planned, _ = planning.run_within(GenerateRequest(prompt="a person"), 0.25, said.append)
    assert order[:2] == ["prepare", "measure"]
    assert planned.record["taken"] == 512 * 2**20
    assert "it took 0.50 GiB and 1.0 s" in said
    assert "more than the 0.25 GiB allowed" in said[-1]
