"""``generate`` and ``evaluate layout`` with models that read a layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

import counterpoint
from counterpoint.models.gligen import fuser_state, with_fusers
from counterpoint.models.interact import InteractionEmbedding
from counterpoint.models.migc import instance_state, with_instances

LAYOUT = {
    "instances": [
        {"phrase": "a person", "box": [0.1, 0.2, 0.4, 0.9]},
        {"phrase": "a red ball", "box": [0.45, 0.6, 0.75, 0.9]},
    ],
    "interactions": [{"subject": "a person", "action": "kicking", "object": "a red ball"}],
}


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of the tiny family's size, with random weights."""
    folder, unet = tmp_path_factory.mktemp("adapters"), counterpoint.load("tiny").unet
    torch.manual_seed(0)
    text = unet.config.cross_attention_dim
    states = {
        "who": fuser_state(with_fusers(unet, InteractionEmbedding(text, text, 8, 16))),
        "what": instance_state(with_instances(unet, ("mid_block.attentions.0",), hidden=16)),
    }
    for name, state in states.items():
        random = {key: 0.2 * torch.randn_like(value) for key, value in state.items()}
        save_file(random, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in states}


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(LAYOUT))
    return path


def test_one_model_and_several(cli, adapters: dict[str, Path], layout: Path) -> None:
    found = {}
    for name, given in (("one", "{who}"), ("both", "{who},{what}"), ("none", "{who}, base")):
        status, out, error = cli(
            "generate", "a person kicking a red ball", "--aggregate", given.format(**adapters), "--layout", layout,
            "--steps", 4, "--out", f"{name}.png", "--json",
        )  # fmt: skip
        assert status == 0, error
        found[name] = np.asarray(PIL.Image.open(json.loads(out)["images"][0]))
    assert not np.array_equal(found["one"], found["both"])
    assert not np.array_equal(found["both"], found["none"])
    with PIL.Image.open("both.png") as picture:
        request = json.loads(picture.text["counterpoint"])["request"]
    assert request["scheduler"] == "ddim"
    cited = cli("cite", "both.png")[1]
    assert all(name in cited for name in ("amdm2024", "interactdiffusion", "migc", "song2021ddim"))
    assert "amdm2024" not in cli("cite", "one.png")[1]
    assert request["aggregate"] == [str(adapters["who"]), str(adapters["what"])]


def test_controls_and_layouts_together_and_the_layout_drawn(
    cli, adapters: dict[str, Path], layout: Path, tmp_path: Path
) -> None:
    PIL.Image.new("RGB", (128, 128)).save(tmp_path / "pose.png")
    status, out, error = cli(
        "generate", "a person", "--aggregate", f"base,{adapters['what']}", "--layout", layout, "--control",
        f"pose={tmp_path / 'pose.png'}", "--aggregation", "steps=2,weights=0.6,mix=unit", "--steps", 3, "--report",
        "--out", "a.png",
    )  # fmt: skip
    assert status == 0, error
    assert out.split() == ["a.png", "a.html", "a.layout.png"]
    drawn, plain = (np.asarray(PIL.Image.open(name)) for name in ("a.layout.png", "a.png"))
    assert [side // 4 for side in drawn.shape[:2]] == list(plain.shape[:2]), "small pictures are enlarged"
    assert (drawn[::4, ::4] != plain).any()


def test_the_shipped_ones_work_together(cli, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "style.png")
    path = tmp_path / "layout.json"
    path.write_text(json.dumps({**LAYOUT, "reference": {"image": "style.png", "weight": 0.8}}))
    status, out, error = cli(
        "generate", "a person and a red ball", "--aggregate", "interact,migc,style", "--layout", path, "--steps", 2,
        "--report", "--out", tmp_path / "out.png", "--json",
    )  # fmt: skip
    assert status == 0, error
    assert json.loads(out)["images"] == [str(tmp_path / "out.png")]
    drawn = np.asarray(PIL.Image.open(tmp_path / "out.layout.png"))
    assert not np.array_equal(drawn, np.asarray(PIL.Image.open(tmp_path / "out.png")))


def test_who_is_told_of_boxes_puts_more_things_into_them(cli, tmp_path: Path) -> None:
    status, out, error = cli(
        "evaluate", "layout", "-n", 3, "--steps", 12, "--aggregate", "base", "--aggregate", "migc", "--out", tmp_path,
        "--json",
    )  # fmt: skip
    assert status == 0, error
    rows = {(row["name"], row["case"]): row["metrics"] for row in json.loads(out)["rows"]}
    found = {name: rows[name, "all levels"]["miou"]["mean"] for name in ("base", "migc", "the scenes themselves")}
    assert 2 * found["base"] < found["migc"] < found["the scenes themselves"]


def test_the_layout_suite_compares_models(cli, adapters: dict[str, Path], tmp_path: Path) -> None:
    who, what = adapters.values()
    status, out, error = cli(
        "evaluate", "layout", "-n", 3, "--steps", 2, "--aggregate", "base", "--aggregate", f"{who},{what}",
        "--aggregation", "steps=1", "--aggregation", "steps=2", "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert status == 0, error
    record = json.loads(out)
    assert {row["name"] for row in record["rows"]} == {
        "the scenes themselves",
        "base",
        *(f"{who}+{what} steps={n}" for n in (1, 2)),
    }
    assert {row["case"] for row in record["rows"]} == {*(f"L{level}" for level in range(2, 7)), "all levels", "actions"}
    assert record["settings"]["scheduler"] == "ddim"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aggregate", "interactive"], "there is no adapter 'interactive': give a safetensors file"),
        (["--aggregate", "{who},"], "there is no adapter '': give a safetensors file"),
        (["--aggregate", "{who}"], "interact reads a layout, and there is none"),
        (["--layout", "{layout}"], "nothing here reads a layout"),
        (["--aggregate", "{who}", "--layout", "none.json"], "cannot read the layout none.json"),
        (["--aggregate", "{who},{what}", "--layout", "{layout}", "--scheduler", "euler"], "load the first model with"),
        (["--aggregate", "{who}", "--layout", "{layout}", "--aggregation", "steps=2"], "how several models work"),
        (["--aggregate", "{who},base", "--layout", "{layout}", "--aggregation", "stops=2"], "unknown setting 'stops'"),
        (["--aggregate", "{who},base", "--layout", "{layout}", "--aggregation", "steps=x"], "steps cannot be 'x'"),
        (["--aggregate", "{who},base", "--layout", "{layout}", "--aggregation", "weights=2"], "weights of an aggregat"),
        (["--aggregate", "pose.png"], "there is no adapter 'pose.png'"),
    ],
)
def test_mistakes(cli, adapters: dict[str, Path], layout: Path, arguments: list[str], message: str) -> None:
    status, _, error = cli("generate", "a person", *(one.format(layout=layout, **adapters) for one in arguments))
    assert status == 2, error
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(Path.cwd().glob("counterpoint-out/*"))
