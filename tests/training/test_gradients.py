"""Lengths and cosines of a loss's parts, on gradients that are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterpoint.recipes import RECIPES
from counterpoint.training.config import TrainConfig
from counterpoint.training.gradients import pulls
from counterpoint.training.order import Draws, sample_index
from counterpoint.training.stage import Job, Stage
from counterpoint.types import UserError

Cli = Callable[..., tuple[int, str, str]]
ROWS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [2, 0, 0]])


class Known(Stage):
    """Every sample's gradient is its row; the weighed part always pulls the same way."""

    trained = ("network",)
    weighed = MappingProxyType({"pull": "weight", "nothing": "other"})

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(3, 1, bias=True)
        self.weight, self.other = 0.5, 0.0

    def learns(self, parameter: str) -> bool:
        return parameter == "weight"

    def forward(self, batch: Any, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        theta = self.network.weight[0]
        assert step == 7, "weights that grow have grown"
        return (batch["row"] @ theta).mean() + self.weight * theta[0] * 4, {}


class Rows:
    def __len__(self) -> int:
        return len(ROWS)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        return {"row": ROWS[indices]}


def config(size: int) -> TrainConfig:
    return TrainConfig(output_dir=Path("unused"), train_batch_size=size, max_train_steps=7, seed=3)


def test_lengths_and_cosines_are_those_of_the_gradients() -> None:
    stage = Known()
    before = [one.detach().clone() for one in stage.parameters()]
    heard: list[tuple[int, int]] = []
    found = pulls(Job(stage, Rows()), config(1), 3, lambda *now: heard.append(now))
    rows = ROWS[[sample_index(one, len(ROWS), 3) for one in range(3)]].double()
    pull = torch.tensor([2.0, 0, 0], dtype=torch.float64)
    pairs = [(rows[i] @ rows[j]).item() for i in range(3) for j in range(3) if i != j]
    assert list(found) == ["diffusion", "pull"]
    assert found["diffusion"].length == pytest.approx(float(rows.square().sum(1).mean().sqrt()))
    assert found["diffusion"].agreement == pytest.approx(sum(pairs) / 6 / float(rows.square().sum(1).mean()))
    assert (found["pull"].length, found["pull"].agreement) == pytest.approx((2, 1))
    cosine = float(torch.cosine_similarity(rows.sum(0), pull, dim=0))
    assert found["pull"].beside == pytest.approx({"diffusion": cosine})
    assert found["diffusion"].beside == pytest.approx({"pull": cosine})
    assert heard == [(1, 3), (2, 3), (3, 3)]
    assert stage.weight == 0.5
    assert all(torch.equal(one, other) for one, other in zip(before, stage.parameters(), strict=True))


def test_the_verb_prints_a_table_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    known = replace(RECIPES["tiny-tuned"], make=lambda _: Job(Known(), Rows()))
    monkeypatch.setattr("counterpoint.recipes.RECIPES", {"tiny-tuned": known})
    wishes = [f"output_dir={tmp_path / 'out'}", "train_batch_size=1", "max_train_steps=7", "seed=3"]
    settings = [part for wish in wishes for part in ("--set", wish)]
    status, told, _ = cli("train", "tiny-tuned", *settings, "--gradients", "3")
    assert status == 0
    head, plain, pull = told.splitlines()
    assert head.split() == ["part", "length", "agreement", "cos", "diffusion", "cos", "pull"]
    assert plain.split()[0] == "diffusion"
    assert pull.split()[:3] == ["pull", "2", "1.000"]
    assert not (tmp_path / "out").exists()
    assert cli("train", "tiny-tuned", *settings, "--gradients", "1")[0] == 2


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="2 batches of 3 want as many samples, and there are 4"):
        pulls(Job(Known(), Rows()), config(3), 2)
    plain = Known()
    plain.weight = 0.0
    with pytest.raises(UserError, match="this loss has one part"):
        pulls(Job(plain, Rows()), config(1), 2)
