"""Rewards reach the ControlNet and nothing else, whatever is read."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler
from torch import Tensor

from counterpoint.fusion.minimal_impact import BalancedInjection
from counterpoint.models.perception import PerceptionModel, heat_of
from counterpoint.training.order import Draws
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.stages.reward import Reward, RewardStage
from counterpoint.types import UserError

CLASSES = 5
BATCH = {
    "latents": torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "caption": ["a person", "a red ball", ""],
    "control:depth": torch.randint(0, 256, (3, 64, 64, 3), generator=torch.Generator().manual_seed(1)).byte(),
    "seg": torch.randint(CLASSES, (3, 64, 64), generator=torch.Generator().manual_seed(2)),
    "keypoints": 64 * torch.rand(3, 1, 18, 2, generator=torch.Generator().manual_seed(4)),
}


def hint(batch: dict) -> Tensor:
    return batch["control:depth"].permute(0, 3, 1, 2)[:, :1] / 255


def rewards(judge: PerceptionModel) -> dict[str, Reward]:
    return {
        "depth": Reward(lambda pictures: judge(pictures).depth, hint),
        "hed": Reward(lambda pictures: judge(pictures).edge, hint),
        "seg": Reward(lambda pictures: judge(pictures).seg, lambda batch: batch["seg"], classes=True),
        "pose": Reward(
            lambda pictures: judge(pictures).joints.sigmoid(), lambda batch: heat_of(batch["keypoints"], 64)
        ),
    }


@pytest.fixture
def make(parts: dict):
    """A stage in float64 whose window holds every timestep, unless told otherwise."""

    def build(kind: str = "depth", **settings: object) -> RewardStage:
        torch.manual_seed(0)
        judge = PerceptionModel(CLASSES, widths=(8, 8, 16, 16), depth=1).double()
        network = ControlNetModel.from_config(parts["networks"][0].config)
        network.load_state_dict(parts["networks"][0].state_dict())
        host = [copy.deepcopy(parts[name]).double() for name in ("unet", "text_encoder")]
        return RewardStage(
            rewards(judge)[kind],
            judge,
            copy.deepcopy(parts["vae"]).double(),
            network.double(),
            "depth",
            *host,
            parts["tokenizer"],
            DDPMScheduler(num_train_timesteps=1000),
            **{"weight": 1.0, "window": (0, 999), **settings},
        ).double()

    return build


@pytest.fixture(autouse=True)
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages compute in float32; here, so that differences can be taken, in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def price(stage: RewardStage) -> Tensor:
    return stage(BATCH, Draws(0, range(3)), 0)[0]


def slope_and_difference(stage: RewardStage, *others: RewardStage) -> tuple[float, float]:
    """Along a random direction of the ControlNet's parameters: by back-propagation, and by central differences."""
    for model in (stage, *others):
        model.requires_grad_(False)
    parameters = list(stage.controlnet.requires_grad_(True).parameters())
    slopes = torch.autograd.grad(price(stage), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    wanted = sum(float((s * d).sum()) for s, d in zip(slopes, directions, strict=True) if s is not None)
    values = []
    with torch.no_grad():
        for step in (1e-7, -2e-7):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            values.append(float(price(stage)))
    return wanted, (values[0] - values[1]) / 2e-7


@pytest.mark.parametrize("uncertainty", [None, 0.1])
@pytest.mark.parametrize("kind", ["depth", "hed", "seg", "pose"])
def test_the_gradient_is_the_slope(make, kind: str, uncertainty: float | None) -> None:
    """Along a random direction of the ControlNet's parameters, of the reward alone, by central differences."""
    stage = make(kind, uncertainty=uncertainty, weight=1000.0)
    plain = make(kind, uncertainty=uncertainty, weight=0.0)
    difference = price(stage) - price(plain)
    assert abs(float(difference.detach())) > 1e-4
    wanted, found = slope_and_difference(stage, plain)
    assert wanted != 0
    assert found == pytest.approx(wanted, rel=2e-3)


def test_outside_the_window_it_is_the_diffusion_loss(make, parts: dict) -> None:
    stage = make(window=(1000, 1001))
    loss, extra = stage(BATCH, Draws(0, range(3)), 0)
    assert extra["reward"].isnan(), "the log has no number for it"
    plain = ControlNetStage.forward(stage, BATCH, Draws(0, range(3)), 0)[0]
    assert torch.equal(loss, plain)


def test_the_weight_grows_over_a_ramp(make) -> None:
    stage, plain = make(ramp=10, weight=3.0), make(weight=0.0)
    reward = stage(BATCH, Draws(0, range(3)), 0)[1]["reward"]
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        total, without = (one(BATCH, Draws(0, range(3)), step)[0] for one in (stage, plain))
        torch.testing.assert_close(total - without, 3 * share * reward)


def test_what_was_trained_with_an_injection_goes_on_with_it(make) -> None:
    plain, given = make(), make()
    given.controlnet.register_to_config(_injection={"reading": "min-norm", "cap": 2.0, "granularity": "sample"})
    host = (given.unet, given.text_encoder, given.tokenizer, given.scheduler)
    reads = (given.reward, given.readers, given.vae)
    stage = RewardStage(*reads, given.controlnet, "depth", *host, weight=1.0, window=(0, 999)).double()
    assert stage.inject == BalancedInjection("min-norm", 2.0)
    assert not torch.allclose(price(stage), price(plain))
    given.controlnet.register_to_config(_injection={"made": "elsewhere"})
    with pytest.raises(UserError, match="unknown here"):
        ControlNetStage(given.controlnet, "depth", *host)


def test_a_flow_is_rewarded_by_its_own_equations(make) -> None:
    stage = make()
    stage.scheduler.register_to_config(prediction_type="flow_prediction")
    noisy = stage._noisy(BATCH, Draws(0, range(3)))
    torch.testing.assert_close(noisy.level, (noisy.t + 1) / 1001)
    said = stage._denoise(noisy, BATCH)
    torch.testing.assert_close(
        stage._losses(noisy, said), (said - (noisy.noise - noisy.x0)).square().flatten(1).mean(1), check_dtype=False
    )
    loss, extra = stage(BATCH, Draws(0, range(3)), 0)
    assert loss.isfinite()
    assert extra["reward"] > 0


def test_only_samples_inside_are_read(make) -> None:
    stage = make()
    times = stage._noisy(BATCH, Draws(0, range(3))).t.tolist()
    seen: list[int] = []
    read = stage.reward.read
    window = (min(times), sorted(times)[1])
    stage.reward = Reward(lambda pictures: seen.append(len(pictures)) or read(pictures), stage.reward.wanted)
    stage.window = window
    price(stage)
    assert seen == [2]


def test_a_sample_costs_the_same_alone(make) -> None:
    stage = make()
    whole = stage(BATCH, Draws(0, range(3)), 0)[1]["reward"]
    alone = [
        stage({key: value[i : i + 1] for key, value in BATCH.items()}, Draws(0, [i]), 0)[1]["reward"] for i in range(3)
    ]
    torch.testing.assert_close(whole, torch.stack(alone).mean())
