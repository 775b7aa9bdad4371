"""The loop: an interrupted run ends with the same bits, a wrong resume is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

from counterpoint.fusion.minimal_impact import BalancedInjection
from counterpoint.recipes import RECIPES
from counterpoint.training import checkpoint
from counterpoint.training.card import write_card
from counterpoint.training.checkpoint import CheckpointError
from counterpoint.training.config import TrainConfig, as_json, differences, override
from counterpoint.training.machine import check_machine
from counterpoint.training.order import Draws
from counterpoint.training.stage import Batch, Job, Stage
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.stages.minimal_impact import MinimalImpactStage
from counterpoint.training.trainer import DivergenceError, Interrupted, train
from counterpoint.types import UserError


class Line(Stage):
    """Learns y = 2x through noise that the draws supply; can ask the run to stop, or turn its loss, or the gradient
    alone, into NaN."""

    trained = ("net",)

    def __init__(self, stop_at: int = -1, nan_at: int = -1, steep_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, 1))
        self.frozen = nn.Linear(1, 1)
        self.stop_at, self.nan_at, self.steep_at = stop_at, nan_at, steep_at

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == self.stop_at:
            self.stop_at = -1
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        x = batch["x"] + 0.1 * draws.normal(1)
        loss = (self.net(x) - 2 * batch["x"]).square().mean()
        if 0 <= self.steep_at <= step:
            loss = loss + (0 * self.net[0].weight.sum()).sqrt()  # 0, with a slope of infinity times 0
        return loss * (float("nan") if step == self.nan_at else 1), {"size": x.abs().mean()}

    def export(self, folder: Path) -> None:
        torch.save(self.net.state_dict(), folder / "net.pt")


class Numbers:
    def __init__(self, length: int = 37) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: list[int]) -> Batch:
        return {"x": torch.tensor(indices, dtype=torch.float32)[:, None] / 37, "name": [str(i) for i in indices]}


def config(folder: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(
        output_dir=folder,
        max_train_steps=25,
        train_batch_size=4,
        checkpointing_steps=10,
        logging_steps=5,
        mixed_precision="no",
        lr_scheduler="cosine",
        lr_warmup_steps=3,
    )
    return replace(base, **changes)


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "net.pt", weights_only=True)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "settings", [{}, {"use_ema": False}, {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}]
)
def test_interrupted_equals_uninterrupted(tmp_path: Path, settings: dict) -> None:
    train(Job(Line(), Numbers()), config(tmp_path / "whole", **settings))
    with pytest.raises(Interrupted):
        train(Job(Line(stop_at=13), Numbers()), config(tmp_path / "cut", **settings))
    assert not (tmp_path / "cut" / "net.pt").exists()
    train(Job(Line(), Numbers()), config(tmp_path / "cut", **settings), resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert torch.tensor(1e-40) * 0.5 > 0, "a run leaves arithmetic as it was"
    lines = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]


@pytest.mark.prove
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on the way to its compiler
def test_a_compiled_run_resumes_exactly(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler here")
    train(Job(Line(), Numbers()), config(tmp_path / "whole", torch_compile=True))
    with pytest.raises(Interrupted):
        train(Job(Line(stop_at=13), Numbers()), config(tmp_path / "cut", torch_compile=True))
    torch.compiler.reset()
    train(Job(Line(), Numbers()), config(tmp_path / "cut", torch_compile=True), resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert all(name.split(".")[0].isdigit() for name in weights(tmp_path / "whole")), "names of a wrapper leaked"


def test_no_compiler_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", absent)
    with pytest.raises(UserError, match="install g"):
        train(Job(Line(), Numbers()), config(tmp_path / "a", torch_compile=True))
    assert not (tmp_path / "a").exists()


def test_resume_from_an_older_checkpoint(tmp_path: Path) -> None:
    train(Job(Line(), Numbers()), config(tmp_path / "whole", checkpoints_total_limit=5))
    wanted = weights(tmp_path / "whole")
    train(
        Job(Line(), Numbers()),
        config(tmp_path / "whole", checkpoints_total_limit=5),
        resume=tmp_path / "whole" / "checkpoint-10",
    )
    assert equal(wanted, weights(tmp_path / "whole"))


class Rarely(Line):
    """Has something to log at every third step only."""

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extra = super().forward(batch, draws, step)
        return loss, extra | {"rare": torch.tensor(1.0 + step if step % 3 == 0 else torch.nan)}


def test_the_log_leaves_out_what_there_was_nothing_of(tmp_path: Path) -> None:
    """And means of steps before and after an interruption are those of an uninterrupted run."""
    train(Job(Rarely(), Numbers()), config(tmp_path / "whole", logging_steps=6, max_train_steps=12))
    with pytest.raises(Interrupted):
        train(Job(Rarely(stop_at=3), Numbers()), config(tmp_path / "cut", logging_steps=6, max_train_steps=12))
    train(Job(Rarely(), Numbers()), config(tmp_path / "cut", logging_steps=6, max_train_steps=12), resume=True)
    whole, cut = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    )
    assert [line["rare"] for line in whole] == [(1 + 4) / 2, (7 + 10) / 2]
    for line in (*whole, *cut):
        del line["seconds_per_step"]
    assert cut == whole
    train(Job(Rarely(), Numbers()), config(tmp_path / "short", logging_steps=2, max_train_steps=6))
    lines = [json.loads(line) for line in (tmp_path / "short" / "log.jsonl").read_text().splitlines()]
    assert [line.get("rare") for line in lines] == [1, 4, None]


class Talkative(Line):
    """Has many numbers to log."""

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extra = super().forward(batch, draws, step)
        return loss, extra | {f"number {place}": extra["size"] * place for place in range(9)}


def test_numbers_are_read_only_when_they_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To read one is to wait for an accelerator."""
    read, real = [], Tensor.__float__
    monkeypatch.setattr(Tensor, "__float__", lambda tensor: read.append(None) or real(tensor))
    counts = []
    for stage in (Line(), Talkative()):
        train(Job(stage, Numbers()), config(tmp_path / type(stage).__name__, logging_steps=6, max_train_steps=6))
        counts.append(len(read))
        read.clear()
    assert counts[0] == counts[1]


class Told(Numbers):
    def __init__(self, says: str, length: int = 37) -> None:
        super().__init__(length)
        self.says = says

    def batch(self, indices: list[int]) -> Batch:
        return super().batch(indices) | {"caption": [f"{self.says} {index}" for index in indices]}


def test_a_run_goes_on_with_its_own_samples_only(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(Job(Line(stop_at=3), Told("ball")), config(tmp_path))
    for samples, said in ((Told("ball", 38), "37 samples, and there are 38"), (Told("cube"), "other captions")):
        with pytest.raises(CheckpointError, match=said):
            train(Job(Line(), samples), config(tmp_path), resume=True)
    train(Job(Line(), Told("ball")), config(tmp_path), resume=True)


def test_batch_split_changes_nothing_but_rounding(tmp_path: Path) -> None:
    train(Job(Line(), Numbers()), config(tmp_path / "a", train_batch_size=4))
    train(Job(Line(), Numbers()), config(tmp_path / "b", train_batch_size=2, gradient_accumulation_steps=2))
    for name, value in weights(tmp_path / "a").items():
        torch.testing.assert_close(value, weights(tmp_path / "b")[name], atol=1e-5, rtol=0)


def test_only_the_named_modules_learn(tmp_path: Path) -> None:
    stage = Line()
    before = stage.frozen.weight.clone()
    train(Job(stage, Numbers()), config(tmp_path / "a"))
    assert torch.equal(stage.frozen.weight, before)


def test_no_run_takes_the_place_of_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        train(Job(Line(), Numbers()), config(tmp_path / name, seed=seed))
    before = (tmp_path / "b" / "train.json").read_text()
    with pytest.raises(UserError, match=r"b holds another run than .*a/checkpoint-10: choose another output_dir"):
        train(Job(Line(), Numbers()), config(tmp_path / "b"), resume=tmp_path / "a" / "checkpoint-10")
    assert (tmp_path / "b" / "train.json").read_text() == before
    bare = tmp_path / "model"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model already holds a model"):
        train(Job(Line(), Numbers()), config(bare))
    assert [one.name for one in bare.iterdir()] == ["config.json"]


def test_a_constant_rate_goes_on_beyond_its_end(tmp_path: Path) -> None:
    steady = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3}
    train(Job(Line(), Numbers()), config(tmp_path / "whole", **steady))
    train(Job(Line(), Numbers()), config(tmp_path / "longer", **steady, max_train_steps=12))
    train(Job(Line(), Numbers()), config(tmp_path / "longer", **steady), resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "longer"))
    for changes in ({**steady, "max_train_steps": 12}, {"lr_scheduler": "cosine", "max_train_steps": 30}):
        with pytest.raises(CheckpointError, match=r"max_train_steps|lr_scheduler"):
            train(Job(Line(), Numbers()), config(tmp_path / "longer", **changes), resume=True)


def test_wrong_resumes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(Job(Line(), Numbers()), config(tmp_path / "typo"), resume=True)
    train(Job(Line(), Numbers()), config(tmp_path / "a"))
    with pytest.raises(UserError, match="already holds a run"):
        train(Job(Line(), Numbers()), config(tmp_path / "a"))
    split = config(tmp_path / "a", train_batch_size=2, gradient_accumulation_steps=2)
    with pytest.raises(CheckpointError, match="train_batch_size: 4 -> 2; gradient_accumulation_steps: 1 -> 2"):
        train(Job(Line(), Numbers()), split, resume=True)
    with pytest.raises(CheckpointError, match="learning_rate"):
        train(Job(Line(), Numbers()), config(tmp_path / "a", learning_rate=1.0), resume=True)
    with pytest.raises(CheckpointError, match="marker"):
        train(Job(Line(), Numbers()), config(tmp_path / "a"), resume=tmp_path / "a" / "checkpoint-11")


def test_nan_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"step 13; .*checkpoint-13 holds the last good state"):
        train(Job(Line(nan_at=13), Numbers()), config(tmp_path / "a"))
    train(Job(Line(), Numbers()), config(tmp_path / "a"), resume=True)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "a").values())


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("step", [0, 3, 10, 24])
def test_a_gradient_of_nan_under_a_finite_loss_stops_before_it_spoils_anything(
    tmp_path: Path, step: int, settings: dict
) -> None:
    kept = f"checkpoint-{step} holds the last good state" if step else "nothing had been learnt"
    with pytest.raises(DivergenceError, match=f"gradient's norm is nan at step {step}; .*{kept}"):
        train(Job(Line(steep_at=step), Numbers()), config(tmp_path / "a", **settings))
    assert not (tmp_path / "a" / "net.pt").exists()
    if step:
        train(Job(Line(), Numbers()), config(tmp_path / "a", **settings), resume=True)
        train(Job(Line(), Numbers()), config(tmp_path / "whole", **settings))
        assert equal(weights(tmp_path / "a"), weights(tmp_path / "whole"))


def test_a_scaler_skips_what_overflows_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Accelerator.__init__

    def with_scaler(self: Accelerator, **settings: object) -> None:
        made(self, **settings)
        self.scaler = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    train(Job(Line(steep_at=10), Numbers()), config(tmp_path / "a"))
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "a").values())
    with pytest.raises(Interrupted):
        train(Job(Line(steep_at=10, stop_at=13), Numbers()), config(tmp_path / "cut"))
    train(Job(Line(steep_at=10), Numbers()), config(tmp_path / "cut"), resume=True)
    of_whole, of_cut = (
        torch.load(checkpoint.newest(tmp_path / run, print) / "state.pt", weights_only=True)["scaler"]
        for run in ("a", "cut")
    )
    assert of_whole == of_cut
    assert of_whole["skipped"] > 3
    with pytest.raises(DivergenceError, match="gradient's norm is nan at step 50"):
        train(Job(Line(steep_at=10), Numbers()), config(tmp_path / "b", max_train_steps=60))


def test_what_reaches_into_networks_is_not_compiled(tmp_path: Path) -> None:
    stage = Line()
    stage.reaches_inside = True
    with pytest.raises(UserError, match="--set torch_compile=false"):
        train(Job(stage, Numbers()), config(tmp_path / "a", torch_compile=True))


def test_another_recipe_is_another_run(tmp_path: Path) -> None:
    def job(recipe: str) -> Job:
        return Job(Line(), Numbers(), recipe)

    train(job("ctrl-u"), config(tmp_path / "a"))
    assert json.loads((tmp_path / "a" / "train.json").read_text())["recipe"] == "ctrl-u"
    with pytest.raises(CheckpointError, match="recipe: ctrl-u -> innercontrol"):
        train(job("innercontrol"), config(tmp_path / "a"), resume=True)
    train(job("ctrl-u"), config(tmp_path / "a"), resume=True)
    train(job(""), config(tmp_path / "older"))
    train(job("ctrl-u"), config(tmp_path / "older"), resume=True)
    assert RECIPES["tiny-ctrl-u"].config.resolved() == RECIPES["tiny-innercontrol"].config.resolved()


def test_a_run_older_than_its_settings_goes_on(tmp_path: Path) -> None:
    """Such a run says ``null`` where the paper's number stands now, and nothing where a setting is new."""
    now = override(RECIPES["tiny-innercontrol"].config, ["control_type=seg"])
    old = json.loads(as_json(now)) | dict.fromkeys(("grad_scale", "u_scale", "min_timestep_readout"))
    del old["reward_ramp_steps"]
    assert differences(old, now, "tiny-innercontrol") == []
    assert differences(old | {"grad_scale": 3}, now) == ["grad_scale: 3.0 -> 0.5"]


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data set is empty"):
        train(Job(Line(), Numbers(0)), config(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_precision_that_the_machine_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(UserError, match="mixed_precision=fp16 needs an accelerator"):
        train(Job(Line(), Numbers()), config(tmp_path / "a", mixed_precision="fp16"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("accelerated", "has_bf16", "wanted"),
    [(False, True, "bf16"), (False, False, "no"), (True, True, "bf16"), (True, False, "fp16")],
)
def test_precision_is_what_the_machine_is_quicker_in(
    monkeypatch: pytest.MonkeyPatch, accelerated: bool, has_bf16: bool, wanted: str
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerated)
    for name in ("bf16_pays", "is_bf16_available"):
        monkeypatch.setattr(f"counterpoint.training.config.{name}", lambda **_: has_bf16)
    assert {override(recipe.config, []).mixed_precision for recipe in RECIPES.values()} == {wanted}
    assert override(TrainConfig(), ["mixed_precision=no"]).mixed_precision == "no"


def test_a_run_goes_on_in_the_precision_that_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = config(tmp_path / "a", mixed_precision="auto", max_train_steps=10)
    monkeypatch.setattr("counterpoint.training.config.bf16_pays", lambda: False)
    train(Job(Line(), Numbers()), open_)
    monkeypatch.setattr("counterpoint.training.config.bf16_pays", lambda: True)
    with pytest.raises(CheckpointError, match="mixed_precision: no -> bf16"):
        train(Job(Line(), Numbers()), open_, resume=True)


def test_adherence_is_asked_for_and_its_rise_is_told(tmp_path: Path) -> None:
    answers = iter((0.0, 0.01, 0.0, 0.8, 0.81))
    heard = []

    def validate() -> dict[str, float]:
        heard.append(next(answers))
        return {"adherence": heard[-1]}

    train(Job(Line(), Numbers()), config(tmp_path / "a", validation_steps=5), validate=validate)
    assert heard == [0.0, 0.01, 0.0, 0.8, 0.81]
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [(one["step"], one["validation/adherence"]) for one in lines if "validation/adherence" in one] == [
        (5 * (number + 1), value) for number, value in enumerate(heard)
    ]
    assert [one["sudden_convergence"] for one in lines if "sudden_convergence" in one] == [20]


def test_eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="use_8bit_adam needs bitsandbytes"):
        train(Job(Line(), Numbers()), config(tmp_path / "a", use_8bit_adam=True))
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr("counterpoint.training.machine.find_spec", lambda _: True)
    given: dict[str, object] = {}

    def adamw(parameters: list[nn.Parameter], **settings: object) -> torch.optim.Optimizer:
        given.update(settings)
        return torch.optim.AdamW(parameters, **settings)

    package = ModuleType("bitsandbytes.optim")
    package.AdamW8bit = adamw
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package)
    train(Job(Line(), Numbers()), config(tmp_path / "a", use_8bit_adam=True))
    assert given == {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.01, "eps": 1e-8}


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, "start it with torchrun"), ({"torch_compile": True}, "start"), ({"use_8bit_adam": True}, "bitsandbytes")],
)
def test_networks_that_cannot_be_split(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_machine(config(tmp_path, fsdp=True, **changes))


def test_what_does_not_go_with_split_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_machine(config(tmp_path, fsdp=True))
    with pytest.raises(UserError, match="fsdp takes no torch_compile=true"):
        check_machine(config(tmp_path, fsdp=True, torch_compile=True))


def test_reports_to_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "a-secret-of-mine")
    train(Job(Line(), Numbers()), config(tmp_path / "a", report_to="tensorboard"))
    (events,) = (
        path.parent
        for path in (tmp_path / "a").rglob("events.*")
        if "loss" in EventAccumulator(str(path)).Reload().Tags()["scalars"]
    )
    reported = EventAccumulator(str(events)).Reload().Scalars("loss")
    logged = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [(event.step, round(event.value, 4)) for event in reported] == [
        (line["step"], round(line["loss"], 4)) for line in logged
    ]
    written = [path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert not any(b"a-secret-of-mine" in content for content in written)
    assert "a-secret-of-mine" not in "".join(capfd.readouterr())


def test_an_absent_tracker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoint.training.machine.get_available_trackers", list)
    with pytest.raises(UserError, match="wandb is not installed"):
        train(Job(Line(), Numbers()), config(tmp_path / "a", report_to="wandb"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=3", "unknown setting 'steps'"),
        ("lerning_rate=3", "known: learning_rate, "),
        ("learning_rate=inf", "finite"),
        ("learning_rate=nan", "learning_rate"),
        ("seed", "key=value"),
        ("seed=x", "seed"),
        ("max_train_steps=0", "max_train_steps"),
        ("lr_scheduler=up", "lr_scheduler"),
    ],
)
def test_wrong_settings(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(config(tmp_path), [setting])


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        (
            "innercontrol",
            ["min_timestep_readout=500", "max_timestep_readout=400"],
            "min_timestep_readout=500 lies above",
        ),
        ("innercontrol", ["min_timestep_readout=950"], "max_timestep_readout=920"),
        ("innercontrol", ["max_timestep_readout=1000"], "less than or equal to 999"),
        ("ctrl-u", ["max_timestep_rewarding=-1"], "greater than or equal to 0"),
        ("ctrl-u", ["u_scale=nan"], "finite"),
        ("controlnet++", ["grad_scale=-1"], "grad_scale"),
        ("base", ["proportion_empty_prompts=7"], "proportion_empty_prompts"),
        ("base", ["snr_gamma=-1"], "snr_gamma"),
        ("mi-stage2", ["min_timestep_conservativity=9", "max_timestep_conservativity=8"], "no timestep is in between"),
        ("mi-stage2", ["conservativity_weight=inf"], "finite"),
        ("mi-stage1", ["control_type=seg", "balanced=true"], "seg has no silent value"),
        *(
            ("mi-stage2", [f"conservativity_estimator={estimator}", f"{setting}=true"], f"--set {setting}=false, or")
            for estimator in ("symmetric", "hutchinson")
            for setting in ("gradient_checkpointing", "torch_compile")
        ),
    ],
)
def test_nonsense_is_refused_by_the_dry_run(recipe: str, setting: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(RECIPES[f"tiny-{recipe}"].config, setting)


def test_what_goes_with_second_derivatives() -> None:
    for settings in (
        ["conservativity_estimator=paired", "torch_compile=true", "injection=sum"],
        ["conservativity_estimator=hutchinson"],
    ):
        override(RECIPES["tiny-mi-stage2"].config, settings)
    with pytest.raises(UserError, match="gradient_checkpointing=false, or the paired estimator"):
        override(RECIPES["sd15-mi-stage2"].config, ["conservativity_estimator=hutchinson"])
    off = ["conservativity_estimator=hutchinson", "gradient_checkpointing=false"]
    override(RECIPES["sd15-mi-stage2"].config, off)


def test_what_is_left_open_is_the_papers() -> None:
    config = RECIPES["tiny-mi-stage1"].config
    assert [override(config, [f"control_type={kind}"]).balanced for kind in ("hed", "depth")] == [True, False]
    found = override(RECIPES["sd15-innercontrol"].config, ["control_type=seg", "aligning_alpha=0.5", "snr_gamma=none"])
    paper = {"grad_scale": 0.5, "max_timestep_rewarding": 200, "min_timestep_readout": 450, "max_timestep_readout": 980}
    wanted = {**paper, "aligning_alpha": 0.5, "u_scale": 1.0, "max_train_steps": 5000, "snr_gamma": None}
    assert {name: getattr(found, name) for name in wanted} == wanted
    steps = {
        kind: override(RECIPES["sd15-probe"].config, [f"control_type={kind}"]).max_train_steps
        for kind in ("depth", "hed", "lineart", "canny", "seg", "pose")
    }
    assert steps == {"depth": 5000, "hed": 10000, "lineart": 10000, "canny": 10000, "seg": 5000, "pose": 5000}
    assert override(RECIPES["tiny-base"].config, ["snr_gamma=None"]).snr_gamma is None
    assert override(RECIPES["tiny-base"].config, ["report_to=none"]).report_to == "none"


def test_settings_are_typed(tmp_path: Path) -> None:
    changed = override(config(tmp_path), ["seed=5", "learning_rate=1e-3", "use_ema=false", f"output_dir={tmp_path}/x"])
    assert (changed.seed, changed.learning_rate, changed.use_ema, changed.output_dir) == (
        5,
        1e-3,
        False,
        tmp_path / "x",
    )


def test_the_card_tells_a_stranger(tmp_path: Path) -> None:
    train(Job(Line(), Numbers()), config(tmp_path / "run"))
    text = (tmp_path / "run" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert "library_name: diffusers" in front
    assert "Learns y = 2x" in body
    assert f"25 steps of 4 samples, out of {len(Numbers())}" in body
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert f"| {last['step']} | {last['loss']} |" in body
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == json.loads(
        (tmp_path / "run/train.json").read_text()
    )


def test_the_card_of_a_controlnet_says_how_to_use_it(tmp_path: Path, parts: dict) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    settings = replace(
        RECIPES["tiny-controlnet"].config, control_type="hed", pretrained_model_name_or_path=Path("some/model")
    )
    host = [parts[name] for name in ("unet", "text_encoder", "tokenizer")]
    stage = ControlNetStage(parts["networks"][0], "hed", *host, DDPMScheduler())
    write_card(tmp_path, Job(stage, Numbers(), "tiny-controlnet"), settings, as_json(settings), processes=2)
    text = (tmp_path / "README.md").read_text()
    assert "base_model: some/model" in text
    assert f'counterpoint.load("some/model", controls={{"hed": "{tmp_path}"}})' in text
    assert "2 processes" in text
    assert "ControlNetModel for hed, trained by the recipe `tiny-controlnet`" in text
    assert f'ControlNetModel.from_pretrained("{tmp_path}", torch_dtype' in text
    assert "fusion=" not in text


def test_the_card_says_how_a_network_is_taken_in(tmp_path: Path, parts: dict) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    settings = replace(
        RECIPES["tiny-mi-stage1"].config, control_type="pose", pretrained_model_name_or_path=Path("some/model")
    )
    host = [parts[name] for name in ("unet", "text_encoder", "tokenizer")]
    inject = BalancedInjection("min-norm")
    stage = MinimalImpactStage(parts["networks"][0], "pose", *host, DDPMScheduler(), inject=inject)
    write_card(tmp_path, Job(stage, Numbers(), "tiny-mi-stage1"), settings, as_json(settings))
    text = (tmp_path / "README.md").read_text()
    assert f'fusion="{inject.rule}"' in text
    assert "from_pretrained" not in text, "it would be added"
