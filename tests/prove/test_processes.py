"""Two processes learn what one does, split or not; an interrupted run of two ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(
    out: Path,
    processes: int,
    batch: int,
    fsdp: str = "-",
    stop: int = -1,
    resume: str = "-",
    method: str = "innercontrol",
) -> str:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launch, "-m", "tests.prove.shared_run", method, out, batch, fsdp, stop, resume]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=ROOT
    )
    return "" if done.returncode == 0 else done.stderr + done.stdout


def logged(out: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "diffusion_pytorch_model.safetensors")


def agree(two: Path, one: Path, parts: tuple[str, ...], rel: float = 1e-6, apart: float = 1e-4) -> None:
    """Losses to 1e-5 or ``rel``, weights to ``apart``."""
    for what in ("loss", *parts):
        assert logged(two, what) == pytest.approx(logged(one, what), rel=rel, abs=1e-5)
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=apart)


def test_two_processes_are_one(tmp_path: Path) -> None:
    assert run(tmp_path / "one", 1, 8) == ""
    for name in ("ddp", "fsdp"):
        assert run(tmp_path / name, 2, 4, name) == ""
        agree(tmp_path / name, tmp_path / "one", ("reward", "alignment"))
        assert run(tmp_path / f"{name}-cut", 2, 4, name, stop=5) == ""
        assert not (tmp_path / f"{name}-cut" / "config.json").exists(), "it was stopped"
        assert run(tmp_path / f"{name}-cut", 2, 4, name, resume="resume") == ""
        again = weights(tmp_path / f"{name}-cut")
        assert all(torch.equal(value, again[key]) for key, value in weights(tmp_path / name).items())


@pytest.mark.parametrize(
    ("method", "part", "rel", "apart"), [("ctrl-u", "reward", 1e-6, 1e-4), ("mi-stage2", "asymmetry", 1e-3, 1e-3)]
)
def test_two_processes_are_one_in_the_other_methods(
    method: str, part: str, rel: float, apart: float, tmp_path: Path
) -> None:
    """The asymmetry is the difference of two differences of predictions, 0.02 apart: rounding a thousandfold."""
    assert run(tmp_path / "one", 1, 8, method=method) == ""
    for name in ("ddp", "fsdp"):
        assert run(tmp_path / name, 2, 4, name, method=method) == ""
        agree(tmp_path / name, tmp_path / "one", (part,), rel, apart)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    assert run(tmp_path / "a", 1, 4, stop=5) == ""
    assert "was made by 1 processes, here are 2" in run(tmp_path / "a", 2, 4, resume="resume")
