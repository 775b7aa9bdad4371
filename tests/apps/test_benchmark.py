"""Timings are taken in turns and compared round by round."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from counterpoint.api import load
from counterpoint.apps.benchmark import Timing, alternate, compare, plain
from counterpoint.apps.benchmark_batch import JOBS, batch_cases
from counterpoint.apps.benchmark_cases import Comparison, fusion_cases
from counterpoint.apps.benchmark_generate import _compiled, _copied, drawn, generate_cases, notes, operations
from counterpoint.apps.benchmark_memory import apart
from counterpoint.apps.benchmark_models import SHAPES, Shape, outspoken
from counterpoint.apps.benchmark_train import train_cases
from counterpoint.apps.service.routes import router
from counterpoint.metrics.cost import measuring
from counterpoint.models.compiling import is_compiled
from counterpoint.sampling.economy import ENCODER
from counterpoint.sampling.floor import Ledger, Operation, Rates
from counterpoint.sampling.plan import plan
from counterpoint.sampling.residency import RESIDENCIES
from counterpoint.types import Notice

CPU = torch.device("cpu")
SHAPE = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
}


def test_cases_take_turns() -> None:
    seen: list[str] = []
    timings = alternate({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3, CPU)
    assert seen == ["a", "b"] * 4, "one round more than is counted"
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_seconds_are_those_of_the_case() -> None:
    timings = alternate({"sleep": lambda: time.sleep(0.02), "nothing": lambda: None}, 3, CPU)
    assert min(timings["sleep"].seconds) >= 0.02


def test_operations_are_counted_where_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a case that torch does not see, by what it made."""
    monkeypatch.setattr("counterpoint.sampling.floor.rates", lambda *_: Rates(1e3, 1e3, 1e3, 1e12))
    matrix, one = torch.ones(10, 10), Operation("matrix", torch.float32, 500.0, 0)
    cases = {"product": lambda: matrix @ matrix, "elsewhere": lambda: 3.0, "none": lambda: None}
    timings = alternate(cases, 3, CPU, unseen={"elsewhere": lambda made: {one: made}})
    rows = {row["name"]: row for row in compare(timings, "product", CPU)}
    assert {name: row["flops"] for name, row in rows.items()} == {"product": 2000.0, "elsewhere": 1500.0, "none": 0.0}
    assert {name: row["floor"] for name, row in rows.items()} == {"product": 2.0, "elsewhere": 1.5, "none": 0.0}
    assert rows["product"]["bytes"] == 3 * 400
    assert "floor 2.0000 s (2e-06 GFLOP, 1.2e-06 GB)" in plain(list(rows.values()), "product")


def test_ratios_are_of_the_same_round() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    timings = {"base": Timing([1.0, 2.0, 1.0]), "half": Timing([0.5, 1.0, 0.5])}
    base, half = compare(timings, "base", CPU)
    assert base["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert half["ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert half["seconds"]["median"] == 0.5
    assert base["peak_mb"] is half["peak_mb"] is None, "this process holds what all cases need"
    assert "50.00% of base" in plain([base, half], "base")


def test_the_median_of_an_even_number_of_rounds_lies_between_two() -> None:
    timings = {"base": Timing([1.0] * 4), "other": Timing([1.0, 2.0, 4.0, 9.0])}
    _, other = compare(timings, "base", CPU)
    assert other["seconds"]["median"] == other["ratio"]["median"] == 3


def test_several_controls_are_held_against_one_of_the_same_round() -> None:
    timings = {
        "stock diffusers": Timing([5.0] * 3),
        "balanced, bf16": Timing([1.1, 2.2, 1.1]),
        "balanced, bf16, 1 control": Timing([1.0, 2.0, 1.0]),
        "balanced, bf16, 4 controls": Timing([1.5, 3.0, 1.5]),
        "exact": Timing([4.0] * 3),
    }
    found = {name: note["of_one"]["median"] for name, note in notes(timings).items()}
    assert found == pytest.approx({"balanced, bf16": 1.1, "balanced, bf16, 4 controls": 1.5})


def test_controls_of_a_timed_picture_show_something() -> None:
    found = drawn(["pose", "depth", "pose", "depth"], 256)
    assert all(image.size == (256, 256) and np.asarray(image).std() > 5 for image in found)
    assert len({image.tobytes() for image in found}) == 4


def test_pictures_do_as_much_arithmetic_as_is_counted() -> None:
    """Stock diffusers encodes the hints at every step; what is counted without running anything is what is run."""
    names = ["exact", "balanced", "part: hints"]
    compared = generate_cases("tiny", CPU, torch.float32, 6, [*names, "exact, compiled, fp32"])
    cases = {name: compared.cases[name] for name in ("stock diffusers", *names)}
    timings = alternate(cases, 1, CPU)
    found = {name: sum(n * one.flops for one, n in timing.operations.items()) for name, timing in timings.items()}
    assert found["stock diffusers"] == found["exact"] + 5 * found["part: hints"]
    parts = plan(load("tiny", ["pose", "seg"]), quality="balanced").parts
    for name in ("exact", "balanced"):
        counted = operations(parts, ["pose", "seg"], 2, 6, timings[name].made)
        assert sum(n * one.flops for one, n in counted.items()) == pytest.approx(found[name], rel=0.01), name
    assert set(compared.unseen) == {"exact, compiled, fp32"}


@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own ways
def test_compiled_networks_share_their_weights() -> None:
    pipe = load("tiny", ["pose"])
    other = _compiled(pipe)
    for one, twin in ((pipe.unet, other.unet), (pipe.controls["pose"], other.controls["pose"])):
        assert is_compiled(twin)
        assert not is_compiled(one)
        assert all(a is b for a, b in zip(one.parameters(), twin.parameters(), strict=True))


@pytest.fixture
def small_sdxl(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's layout with few channels."""
    unet = {**SHAPES["sdxl"].unet, "block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1}
    narrow = {"attention_head_dim": (2, 4, 4), "cross_attention_dim": 48, "sample_size": 8}
    inputs = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8}
    monkeypatch.setitem(SHAPES, "sdxl", Shape({**unet, **narrow, **inputs}, ((16, 2, 2), (32, 2, 2))))


@pytest.fixture
def small_sd15(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD1.5's layout with few channels."""
    small = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 2}
    monkeypatch.setitem(SHAPES, "sd15", Shape({**small, "sample_size": 8}, ((32, 2, 2),)))


def test_sdxl_is_timed_beside_its_stock_pipeline(small_sdxl: None) -> None:
    compared = generate_cases("sdxl", CPU, torch.float32, 2, ["exact", "part: host"])
    wanted, found = (compared.cases[name]().images for name in ("stock diffusers", "exact"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    compared.cases["part: host"]()
    for name, case in fusion_cases("sdxl", CPU, torch.bfloat16).cases.items():
        if name in ("step sum", "step pix+channel", "operator pix"):
            case()


def test_what_has_no_room_is_refused(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its plan, before anything is made."""
    made: list[torch.device] = []
    monkeypatch.setattr("counterpoint.apps.benchmark_models.free_bytes", lambda _: 2**33)
    monkeypatch.setattr("counterpoint.apps.benchmark_models.outspoken", made.append)
    status, _, message = cli("benchmark", "generate", "--size", "sdxl", "--only", "exact")
    assert (status, message.count("\n")) == (2, 2), message
    needed = int(re.search(r"--size sdxl needs (\d+) GiB for all that is timed, and 8 are free", message)[1])
    weights = 4 * (2.57e9 + 2 * 1.25e9 + 0.8e9 + 0.08e9) / 2**30
    assert weights < needed < weights + 12
    assert not made


def test_half_precision_lies_as_load_gives_it() -> None:
    half = _copied(load("tiny", ["pose"]), "bf16")
    for network in (half.unet, half.controls["pose"]):
        weight = next(one for one in network.parameters() if one.ndim == 4 and one.shape[-1] > 1 and one.shape[1] > 1)
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_where_nothing_is_foretold_nothing_is_timed_as_if(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(*_: object) -> None:
        raise AssertionError("half precision was not asked for")

    monkeypatch.setattr("counterpoint.apps.benchmark_generate._copied", copied)
    status, _, message = cli("benchmark", "generate", "--steps", 3, "--only", "fast")
    assert (status, "--only 'fast': in 3 steps nothing is foretold; --steps 4 or more" in message) == (2, True)
    monkeypatch.setattr("counterpoint.apps.benchmark_generate.find_dtype", lambda *_: "fp32")
    with pytest.warns(Notice, match="balanced and fast are left out"):
        short = generate_cases("tiny", CPU, torch.float32, steps=3)
    assert not [name for name in short.cases if name.startswith(("balanced", "fast"))]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("music",), "there are fusion, generate, train, batch, aggregate, memory"),
        (("--size", "huge"), "tiny, sd15, sdxl"),
        (("memory", "--size", "sdxl"), "--size tiny or sd15"),
        (("--dtype", "fp8"), "fp32, bf16, fp16"),
        (("generate", "--dtype", "bf16"), "compares dtypes itself"),
        (("train", "--dtype", "bf16"), "in both number formats"),
        (("batch", "--size", "sdxl"), "--size tiny or sd15"),
        (("serve", "--size", "sd15"), "--size tiny"),
        (("serve", "--only", "GET /health"), "benchmark serve does not heed it"),
        (("fusion", "--steps", "3"), "--steps is for benchmark generate"),
        (("--device", "gpu"), "there is no device 'gpu'"),
    ],
)
def test_what_cannot_be_measured(cli, arguments: tuple[str, ...], said: str) -> None:
    status, _, message = cli("benchmark", *arguments)
    assert status == 2
    assert said in message


def test_every_way_makes_the_picture_that_stock_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoint.models.openvino.CACHE", tmp_path)
    compared = generate_cases("tiny", CPU, torch.float32)
    wanted = compared.cases["stock diffusers"]().images
    for name, case in compared.cases.items():
        if name.startswith("exact"):
            found = case().images
            assert (found - wanted).abs().mean() < (0.2 if name.endswith("bf16") else 1e-4), name
    assert torch.equal(compared.cases["exact"]().images, wanted), "bit for bit"


def test_pictures_are_held_against_stock_and_say_what_was_computed(cli) -> None:
    status, out, _ = cli(
        "benchmark", "generate", "--steps", 6, "--rounds", 3, "--only", "exact", "--only", "fast", "--json"
    )
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert (status, set(rows)) == (0, {"stock diffusers", "exact", "fast"})
    assert rows["exact"]["apart"] == 0
    assert 0 < rows["fast"]["apart"] < 0.5
    assert rows["exact"]["computed"] == {}
    assert set(rows["fast"]["computed"]) == {"pose", "seg", ENCODER, "guidance"}
    assert 0 < min(rows["fast"]["computed"].values()) < 1
    status, _, message = cli("benchmark", "generate", "--only", "slow")
    assert (status, "--only 'slow': there are 'stock diffusers', 'exact'" in message) == (2, True)


def test_random_controls_have_something_to_say() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(block_out_channels=(8, 16), norm_num_groups=8, cross_attention_dim=8, **SHAPE)
    network = outspoken(ControlNetModel.from_unet(unet, load_weights_from_unet=False))
    inputs = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 3, 8)
    said, other = (network(*inputs, hint, return_dict=False) for hint in torch.rand(2, 1, 3, 64, 64))
    assert all(bool(site.any()) for site in (*said[0], said[1]))
    assert not torch.equal(said[1], other[1])


def test_what_one_case_has_freed_counts_for_no_other() -> None:
    """In one process the second maximum would begin where the first one ended."""
    large, small = (apart(held, size) for size in (2**28, 2**20))
    if large is not None:
        assert large > 900
        assert small < 300


def held(numbers: int) -> float | None:
    """MiB of a tensor of float32, as a step's are measured."""
    with measuring(CPU) as before:
        torch.ones(2, 2)
    with measuring(CPU) as cost:
        torch.ones(numbers)
    return None if cost.peak_mb is None else cost.peak_mb - before.peak_mb


def test_every_training_method_has_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoint.apps.benchmark_train.BATCH", 4)
    compared = train_cases("tiny", CPU, torch.float32)
    assert {"controlnet++", "innercontrol", "mi-stage2, paired", "controlnet, bf16"} < set(compared.cases)
    for case in compared.cases.values():
        case()


def test_training_steps_of_a_published_shape(cli, small_sd15: None) -> None:
    """Few channels; a reward costs more than none, and what is kept for the backward pass is no method's."""
    compared = train_cases("sd15", CPU, torch.float32)
    flops = {}
    for name in ("controlnet", "controlnet++", "innercontrol", "mi-stage2, paired", "controlnet"):
        with Ledger() as ledger:
            compared.cases[name]()
        arithmetic = sum(one.flops * times for one, times in ledger.operations.items())
        assert flops.setdefault(name, arithmetic) == arithmetic
    assert flops["innercontrol"] > flops["controlnet++"] > 1.5 * flops["controlnet"]
    status, _, message = cli("benchmark", "train", "--size", "sdxl")
    assert (status, message.splitlines()[-1]) == (
        2,
        "error: benchmark train: no recipe trains SDXL; there are --size tiny and sd15",
    )


def test_jobs_are_the_same_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JOBS, "tiny", 4)
    made: dict[int, int] = {}

    def count(jobs: list, _: object) -> None:
        made[len(jobs)] = made.get(len(jobs), 0) + 1

    monkeypatch.setattr("counterpoint.apps.benchmark_batch.run_together", count)
    for case in batch_cases("tiny", CPU, torch.float32).cases.values():
        case()
    assert made == {1: 4, 2: 2, 4: 1}


def test_batches_of_a_published_shape(small_sd15: None) -> None:
    cases = batch_cases("sd15", CPU, torch.float32).cases
    assert list(cases) == ["one by one", "batches of 2", "batches of 4"]
    cases["batches of 2"]()


def test_a_record_and_a_page(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(*_: object) -> Comparison:
        return Comparison({"sum": lambda: torch.ones(9).sum(), "other": lambda: None}, "sum")

    rates = Rates(4e10, 3e10, 2e10, 1e10)
    for place in ("sampling.floor", "apps.benchmark"):
        monkeypatch.setattr(f"counterpoint.{place}.rates", lambda *_: rates)
    monkeypatch.setattr("counterpoint.apps.benchmark_cases.fusion_cases", cases)
    status, out, error = cli("benchmark", "fusion", "--rounds", 3, "--out", "found", "--json")
    assert status == 0, error
    assert json.loads(out) == json.loads(Path("found/benchmark.json").read_text())
    assert json.loads(out)["rates"] == {"fp32": vars(rates)}, "what the floor was made of"
    assert json.loads(out)["rows"][0]["bytes"] == 36 + (36 + 4), "nine numbers are made, read and summed"
    page = Path("found/index.html").read_text()
    assert page.count("<tr") == 3
    assert "counterpoint benchmark fusion --rounds 3" in page


@pytest.mark.enable_socket
def test_every_route_of_the_service_is_timed_while_pictures_are_made(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoint.apps.benchmark_serve.CLIENTS", 3)
    status, out, error = cli("benchmark", "serve", "--rounds", 3, "--json", "--out", "found")
    assert status == 0, error
    found = json.loads(out)
    rows = {row["name"]: row for row in found["rows"]}
    routes = {f"{method} {route.path}" for route in router.routes for method in route.methods}
    wanted = {name.replace("{name}", "ID").replace("{number}", "0") for name in routes}
    assert set(rows) == {"all", "POST /v1/jobs, malformed", *wanted}
    assert {row["requests"] for name, row in rows.items() if name != "all"} == {9}
    assert all(0 < row["p50"] <= row["p99"] for row in rows.values())
    assert found["jobs"]["done"] >= 3
    assert sum(found["jobs"].values()) == 3 * (2 + 3)
    page = Path("found/index.html").read_text()
    assert page.count("<tr>") == len(rows) + 1
    assert "99 % within" in page


def test_memory_is_that_of_a_process_of_its_own(cli) -> None:
    status, out, error = cli("benchmark", "memory", "--json", "--out", "found")
    assert status == 0, error
    rows = json.loads(out)["rows"]
    assert [row["name"] for row in rows] == ["stock diffusers", *(f"residency {name}" for name in RESIDENCIES)]
    if rows[0]["peak_mb"] is not None:
        assert all(row["peak_mb"] > 0 for row in rows)
        assert rows[0]["ratio"] == 1
        assert rows[-1]["peak_mb"] < rows[1]["peak_mb"]
    assert "four controls" in Path("found/index.html").read_text()
