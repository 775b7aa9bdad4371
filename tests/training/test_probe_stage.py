"""Probes learn to read, and what they read reaches the ControlNet at every timestep."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler
from torch import Tensor

from counterpoint.control.features import embed_time
from counterpoint.models.perception import PerceptionModel
from counterpoint.models.probe import Probe
from counterpoint.training.order import Draws
from counterpoint.training.stages.probe import AlignmentStage, ProbeStage, Target
from counterpoint.training.stages.reward import Reward
from counterpoint.types import UserError
from tests.training.test_reward_stage import BATCH, CLASSES, hint, slope_and_difference

DIMS = {"attention": (16, 16), "convolution": (32, 32, 16, 16)}
TARGETS = {
    "depth": Target("attention", hint),
    "hed": Target("convolution", hint, "sparse"),
    "seg": Target("convolution", lambda batch: batch["seg"], "classes"),
}


def probe_for(kind: str) -> Probe:
    torch.manual_seed(1)
    out, bounded = (CLASSES, False) if kind == "seg" else (1, True)
    dims = DIMS[TARGETS[kind].layers]
    return Probe(dims, 64, 32, (16, 8), out, bounded=bounded, size=16).double()


def host_of(parts: dict) -> list:
    models = [copy.deepcopy(parts[name]).double() for name in ("unet", "text_encoder")]
    return [*models, parts["tokenizer"], DDPMScheduler(num_train_timesteps=1000)]


@pytest.fixture(autouse=True)
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages compute in float32; here, so that differences can be taken, in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_probe_learns_and_the_host_does_not(parts: dict, kind: str, tmp_path: Path) -> None:
    stage = ProbeStage(probe_for(kind), TARGETS[kind], *host_of(parts))
    shown = torch.nn.functional.interpolate(BATCH["latents"][:, :1], (64, 64), mode="bilinear")
    learnable = {
        "control:depth": (255 * shown.sigmoid()).byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3),
        "seg": (shown[:, 0] > 0).long(),
    }
    batch = {**BATCH, **learnable}
    before = copy.deepcopy(stage.unet.state_dict())
    optimizer = torch.optim.Adam(stage.probe.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss, extra = stage(batch, Draws(0, range(3)), 0)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in stage.probe.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    assert set(extra) == {"noisy", "clean"}
    assert all(p.grad is None for p in stage.unet.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in stage.unet.state_dict().items())
    stage.export(tmp_path)
    again = Probe.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert all(torch.equal(tensor, stage.probe.state_dict()[name]) for name, tensor in again.state_dict().items())


def aligned(parts: dict, kind: str, **settings: object) -> AlignmentStage:
    torch.manual_seed(0)
    judge = PerceptionModel(CLASSES, widths=(8, 8, 16, 16), depth=1).double()
    network = ControlNetModel.from_config(parts["networks"][0].config)
    network.load_state_dict(parts["networks"][0].state_dict())
    return AlignmentStage(
        probe_for(kind),
        TARGETS[kind],
        Reward(lambda pictures: judge(pictures).depth, hint),
        judge,
        copy.deepcopy(parts["vae"]).double(),
        network.double(),
        "depth",
        *host_of(parts),
        **{"weight": 0.0, "window": (0, 999), "alignment_weight": 100.0, "alignment_window": (0, 999), **settings},
    ).double()


@pytest.mark.parametrize("kind", TARGETS)
def test_the_gradient_of_alignment_is_the_slope(parts: dict, kind: str) -> None:
    stage = aligned(parts, kind)
    wanted, found = slope_and_difference(stage)
    assert abs(wanted) > 1e-6
    assert found == pytest.approx(wanted, rel=2e-3)


def test_outside_its_window_alignment_costs_nothing(parts: dict) -> None:
    loss, extra = aligned(parts, "depth", alignment_window=(2000, 2001))(BATCH, Draws(0, range(3)), 0)
    assert extra["alignment"].isnan(), "the log has no number for it"
    assert torch.equal(loss, aligned(parts, "depth", alignment_weight=0.0)(BATCH, Draws(0, range(3)), 0)[0])


def test_a_second_prediction_is_aligned_too(parts: dict) -> None:
    stage = aligned(parts, "depth", uncertainty=0.1)
    stage(BATCH, Draws(0, range(3)), 0)
    assert len(stage.aligned) == 2


@pytest.mark.parametrize("wrong", [{"dims": (16, 8)}, {"time_width": 32}])
def test_a_probe_for_another_denoiser_is_refused(parts: dict, monkeypatch: pytest.MonkeyPatch, wrong: dict) -> None:
    sizes = {"dims": (16, 16), "time_width": 64, "width": 32, "head": (16, 8), "out": 1, "size": 16, **wrong}
    monkeypatch.setattr("tests.training.test_probe_stage.probe_for", lambda _: Probe(**sizes))
    with pytest.raises(UserError, match="the probe is for another denoiser"):
        aligned(parts, "depth")


def test_the_published_heads_are_told_the_time_reversed(parts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "counterpoint.training.stages.probe.embed_time", lambda unet, t: seen.append(t) or embed_time(unet, t)
    )
    aligned(parts, "depth")(BATCH, Draws(0, range(3)), 0)
    monkeypatch.setitem(TARGETS, "depth", Target("attention", hint, reverse=True))
    aligned(parts, "depth")(BATCH, Draws(0, range(3)), 0)
    assert torch.equal(seen[1], 999 - seen[0])


def test_poses_are_read_in_colour() -> None:
    wanted = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    target = Target("convolution", lambda _: wanted, "map")
    assert target.losses(2 * wanted - 1, {}).abs().max() < 1e-12
    assert (target.losses(2 * wanted.flip(1) - 1, {}) > 0.01).all()
