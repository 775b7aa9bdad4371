"""``kill -9`` at random moments: the resumed run ends with the same bits as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from counterpoint.training import checkpoint

pytestmark = pytest.mark.prove
STEPS, EVERY, KILLS = 240, 2, 20
"""Between two kills lie a checkpoint and at most 0.3 s, so that there are steps enough for all of them."""


def command(out: Path, cache: Path, *more: str) -> list[str]:
    settings = {
        "output_dir": out,
        "cache_dir": cache,
        "max_train_steps": STEPS,
        "max_train_samples": 2048,
        "train_batch_size": 2,
        "checkpointing_steps": EVERY,
        "logging_steps": 10,
        "lr_warmup_steps": 5,
    }
    code = "from counterpoint.apps.cli.main import main; main()"
    return [
        sys.executable,
        "-c",
        code,
        "train",
        "tiny-codec",
        *(f"--set={key}={value}" for key, value in settings.items()),
        *more,
    ]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=False, env=ENVIRONMENT)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2"}


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start the run that is to be cut, with its messages in a file."""
    with (folder / "stderr").open("w") as errors:
        return subprocess.Popen(command(folder / "cut", folder / "cache", *more), stderr=errors, env=ENVIRONMENT)


def test_random_kills(tmp_path: Path) -> None:
    whole = run(*command(tmp_path / "whole", tmp_path / "cache"))
    assert whole.returncode == 0, whole.stderr[-2000:]
    rng = random.Random(0)
    out, kills, tries = tmp_path / "cut", 0, 0
    while True:
        tries += 1
        assert tries < 3 * KILLS, "the run makes no progress between kills"
        resume = ["--resume"] if checkpoint.found(out) else []
        done = len(checkpoint.found(out)) and checkpoint.found(out)[-1][0]
        process = start(tmp_path, *resume)
        if kills < KILLS:
            # wait until this process has written at least one checkpoint, then kill it at a random moment
            while process.poll() is None and (not checkpoint.found(out) or checkpoint.found(out)[-1][0] == done):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                process.wait()
                continue
        assert process.wait() == 0, (tmp_path / "stderr").read_text()[-2000:]
        break
    assert kills == KILLS
    wanted, got = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("whole", "cut"))
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    ends = [checkpoint.found(tmp_path / name)[-1] for name in ("whole", "cut")]
    assert [step for step, _ in ends] == [STEPS, STEPS]
    states = [torch.load(folder / "state.pt", weights_only=True) for _, folder in ends]
    assert same(*(state["optimizer"] for state in states))
    assert same(*(state["ema"] for state in states))
    logs = [
        [line.split('"seconds_per_step"')[0] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert [line.split(",")[0] for line in logs[0]] == [line.split(",")[0] for line in logs[1]]


def same(one: Any, other: Any) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_ctrl_c_saves_and_stops(tmp_path: Path) -> None:
    out = tmp_path / "cut"
    process = start(tmp_path)
    while process.poll() is None and not checkpoint.found(out):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    status, error = process.wait(), (tmp_path / "stderr").read_text()
    assert status == 130, error[-2000:]
    assert "--resume" in error
    assert "Traceback" not in error
    step = checkpoint.verify(checkpoint.newest(out, print))
    assert step >= EVERY


def test_wrong_resume_is_loud(tmp_path: Path) -> None:
    result = run(*command(tmp_path / "typo", tmp_path / "cache", "--resume"))
    assert result.returncode == 2
    assert "nothing to resume" in result.stderr.splitlines()[-1]
