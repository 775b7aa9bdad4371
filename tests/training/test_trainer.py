"""The loop: an interrupted run ends with the same bits, a wrong resume is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

from counterpoint.recipes import RECIPES
from counterpoint.training.card import write_card
from counterpoint.training.checkpoint import CheckpointError
from counterpoint.training.config import TrainConfig, override
from counterpoint.training.order import Draws
from counterpoint.training.stage import Batch, Job, Stage
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.trainer import DivergenceError, Interrupted, train
from counterpoint.types import UserError


class Line(Stage):
    """Learns y = 2x through noise that the draws supply; can ask the run to stop, or turn its loss into NaN."""

    trained = ("net",)

    def __init__(self, stop_at: int = -1, nan_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, 1))
        self.frozen = nn.Linear(1, 1)
        self.stop_at, self.nan_at = stop_at, nan_at

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == self.stop_at:
            self.stop_at = -1
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        x = batch["x"] + 0.1 * draws.normal(1)
        loss = (self.net(x) - 2 * batch["x"]).square().mean()
        return loss * (float("nan") if step == self.nan_at else 1), {"size": x.abs().mean()}

    def export(self, folder: Path) -> None:
        torch.save(self.net.state_dict(), folder / "net.pt")


class Numbers:
    def __len__(self) -> int:
        return 37

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


def test_wrong_resumes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(Job(Line(), Numbers()), config(tmp_path / "typo"), resume=True)
    train(Job(Line(), Numbers()), config(tmp_path / "a"))
    with pytest.raises(UserError, match="already holds a run"):
        train(Job(Line(), Numbers()), config(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="learning_rate"):
        train(Job(Line(), Numbers()), config(tmp_path / "a", learning_rate=1.0), resume=True)
    with pytest.raises(CheckpointError, match="marker"):
        train(Job(Line(), Numbers()), config(tmp_path / "a"), resume=tmp_path / "a" / "checkpoint-11")


def test_nan_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="step 13"):
        train(Job(Line(nan_at=13), Numbers()), config(tmp_path / "a"))
    train(Job(Line(), Numbers()), config(tmp_path / "a"), resume=True)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "a").values())


def test_reports_to_a_tracker(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_an_absent_tracker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoint.training.trainer.get_available_trackers", list)
    with pytest.raises(UserError, match="wandb is not installed"):
        train(Job(Line(), Numbers()), config(tmp_path / "a", report_to="wandb"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=3", "unknown setting"),
        ("seed", "key=value"),
        ("seed=x", "seed"),
        ("max_train_steps=0", "max_train_steps"),
        ("lr_scheduler=up", "lr_scheduler"),
    ],
)
def test_wrong_settings(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(config(tmp_path), [setting])


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
    assert "25 steps of 4 samples" in body
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
    write_card(tmp_path, stage, settings, processes=2)
    text = (tmp_path / "README.md").read_text()
    assert "base_model: some/model" in text
    assert f'counterpoint.load("some/model", controls={{"hed": "{tmp_path}"}})' in text
    assert "2 processes" in text
