"""A ControlNet that makes way for others: the stage is the plain one until a part of the method is asked for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler
from torch import Tensor

from counterpoint import attach
from counterpoint.control.influence import influence
from counterpoint.fusion import get_fusion
from counterpoint.fusion.minimal_impact import BalancedInjection
from counterpoint.metrics.conservativity import jacobian_products
from counterpoint.models.strength import strength_of, strengthen
from counterpoint.sampling.controls import check_injection
from counterpoint.training.order import Draws
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.stages.minimal_impact import MinimalImpactStage
from counterpoint.types import UserError
from tests.parity import families
from tests.training.test_reward_stage import BATCH, in_double, slope_and_difference

__all__ = ["in_double"]


@pytest.fixture
def make(parts: dict):
    def build(network: ControlNetModel | None = None, **settings: object) -> MinimalImpactStage:
        if network is None:
            network = ControlNetModel.from_config(parts["networks"][0].config)
            network.load_state_dict(parts["networks"][0].state_dict())
        host = [copy.deepcopy(parts[name]) for name in ("unet", "text_encoder")]
        schedule = DDPMScheduler(num_train_timesteps=1000)
        return MinimalImpactStage(network, "depth", *host, parts["tokenizer"], schedule, **settings).double()

    return build


def loss(stage: ControlNetStage, forward=None) -> Tensor:
    return (forward or type(stage).forward)(stage, BATCH, Draws(0, range(3)), 0)[0]


def test_without_its_parts_it_is_plain_training(make) -> None:
    stage = make()
    assert torch.equal(loss(stage), loss(stage, ControlNetStage.forward))
    assert not torch.equal(loss(make(inject=BalancedInjection("min-norm"))), loss(stage))


def test_the_price_is_in_units_of_noise(parts: dict) -> None:
    host = [parts[name] for name in ("unet", "text_encoder", "tokenizer")]
    other = DDPMScheduler(prediction_type="v_prediction")
    MinimalImpactStage(parts["networks"][0], "depth", *host, other)
    with pytest.raises(UserError, match="predicts the noise"):
        MinimalImpactStage(parts["networks"][0], "depth", *host, other, weight=0.01)


@pytest.mark.parametrize("estimator", ["hutchinson", "symmetric", "paired"])
@pytest.mark.parametrize("injection", [torch.add, BalancedInjection("min-norm")])
def test_the_gradient_is_the_slope(make, estimator: str, injection) -> None:
    stage = make(inject=injection, weight=1.0, estimator=estimator, share=0.67)
    assert abs(float((loss(stage) - loss(make(inject=injection))).detach())) > 1e-6
    wanted, found = slope_and_difference(stage)
    assert wanted != 0
    rel = 2e-3 if estimator == "paired" else 1e-5  # what its differences miss
    assert found == pytest.approx(wanted, rel=rel), "torch's own layer norm would be off by a hundredth"


def test_a_score_is_steeper_and_a_window_leaves_samples_out(make) -> None:
    settings = {"weight": 1.0, "estimator": "symmetric", "share": 1.0}
    stage = make(**settings)
    noisy = stage._noisy(BATCH, Draws(0, range(3)))
    prices = stage._asymmetry(noisy, BATCH, Draws(0, range(3)), torch.arange(3)).detach()
    steep = make(**settings, of="score")._asymmetry(noisy, BATCH, Draws(0, range(3)), torch.arange(3)).detach()
    sigma = (1 - noisy.level).sqrt()
    torch.testing.assert_close(steep, prices / sigma**2, check_dtype=False)
    middle = int(noisy.t.sort().values[1])
    found = make(**settings, window=(0, middle))(BATCH, Draws(0, range(3)), 0)[1]["asymmetry"]
    estimated = make(**settings)(BATCH, Draws(0, range(3)), 0)[1]["asymmetry"]
    assert found != estimated
    outside, extra = make(**settings, window=(2000, 2001))(BATCH, Draws(0, range(3)), 0)
    assert extra["asymmetry"].isnan(), "the log has no number for it"
    assert torch.equal(outside, make()(BATCH, Draws(0, range(3)), 0)[0])


def test_two_processes_price_the_samples_of_one(make) -> None:
    stage = make(share=0.25)
    whole = stage._few(8).tolist()
    assert whole == [*stage._few(4).tolist(), *(4 + stage._few(4)).tolist()] == [0, 4]


def test_the_price_is_that_of_a_share_of_the_samples(make) -> None:
    stage = make(weight=2.0, estimator="symmetric", share=0.67)
    _, extra = stage(BATCH, Draws(0, range(3)), 0)
    draws = Draws(0, range(3))
    noisy = stage._noisy(BATCH, draws)
    probe = 2.0 * (draws.uniform(4, 8, 8) < 0.5) - 1
    hint = stage._hint(BATCH)
    field = influence(stage.unet, stage.controlnet, hint[:2], noisy.text[:2], noisy.t[:2], noisy.x_t[:2])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        forward, backward = jacobian_products(field, noisy.x_t[:2], probe[:2].double(), create_graph=False)
    wanted = (forward - backward).square().flatten(1).sum(1).mean() / 2
    torch.testing.assert_close(extra["asymmetry"], wanted, rtol=1e-6, atol=0)
    total, plain = loss(stage), loss(stage, ControlNetStage.forward)
    torch.testing.assert_close(total - plain, 2 * wanted, rtol=1e-6, atol=1e-12)


def test_a_strength_that_was_found_for_a_sum_is_not_that_of_an_injection(make, tmp_path: Path) -> None:
    """Of a smaller control, the min-norm injection takes in more."""
    network, balanced = make().controlnet, BalancedInjection("min-norm")
    trained = network.controlnet_mid_block.weight.detach().clone()
    strengthen(network, 2.5)
    make(network, inject=balanced).export(tmp_path / "one")
    out = ControlNetModel.from_pretrained(tmp_path / "one")
    assert strength_of(out) == 1
    torch.testing.assert_close(out.controlnet_mid_block.weight.double(), trained.double())
    strengthen(out, 0.5)
    make(out, inject=balanced).export(tmp_path / "two")
    assert strength_of(ControlNetModel.from_pretrained(tmp_path / "two")) == 0.5


def test_what_was_trained_with_an_injection_is_not_used_without(make, parts: dict, tmp_path: Path) -> None:
    trained = BalancedInjection("min-norm")
    make(inject=trained).export(tmp_path)
    network = ControlNetModel.from_pretrained(tmp_path)
    half = ControlNetModel.from_pretrained(tmp_path).half()
    half.save_pretrained(tmp_path / "half")
    check_injection(get_fusion(trained.rule), {"depth": network})
    for folder in (tmp_path, tmp_path / "half"):
        for name in ("sum", "minimal-impact:injection=literal", f"0:{trained.rule},0.5:mean"):
            with pytest.raises(UserError, match=f"trained to be taken in by {trained.rule}, .*: choose that rule"):
                check_injection(get_fusion(name), {"depth": ControlNetModel.from_pretrained(folder)})
    stock, _ = families.union({**parts, "networks": [network]}, 1)
    stock.controlnet = network
    with pytest.raises(UserError, match="the control 0 was trained"), attach(stock, "sum"):
        pass
    with pytest.raises(UserError, match="go on so"):
        make(network=network)
    network.register_to_config(_injection={"made": "elsewhere"})
    with pytest.raises(UserError, match="unknown here"):
        check_injection(get_fusion("sum"), {"depth": network})


def test_differences_have_all_digits(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    make()
    assert torch.backends.cudnn.allow_tf32
    stage = make(weight=0.01, inject=BalancedInjection("literal"))
    assert not torch.backends.cudnn.allow_tf32
    assert stage.reaches_inside
