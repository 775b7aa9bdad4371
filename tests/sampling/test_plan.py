"""What is foretold without being computed is what is there when it is computed."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import counterpoint
from counterpoint.control.attach import hints_encoded_once
from counterpoint.sampling import floor
from counterpoint.sampling import plan as planning
from counterpoint.sampling.economy import QUALITIES
from counterpoint.sampling.floor import Rates
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.plan import Plan, plan
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.types import UserError

MIB = 2**20


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return counterpoint.load("tiny", ["pose", "seg"])


@pytest.fixture(autouse=True)
def known_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of which nothing has to be measured."""
    monkeypatch.setattr(floor, "rates", lambda *_: Rates(1e11, 1e11, 1e11, 1e10))
    monkeypatch.setattr(planning, "_pace", lambda *_: (1.0, 0.0))


class Living(TorchDispatchMode):
    """Real tensors' bytes at their largest."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and (key := one.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self.live += one.untyped_storage().nbytes()
                weakref.finalize(one.untyped_storage(), self.gone, key, one.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("side", [128, 256])
def test_memory_is_that_of_the_real_decoder(pipe: Pipeline, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest part here; oneDNN's copies, which no tensor shows, are left out, and the hints remain."""
    monkeypatch.setattr(planning, "BLOCKED", ())
    found = plan(pipe, height=side, width=side)
    latents = torch.randn(1, 16, side // 8, side // 8)
    with torch.no_grad(), Living() as real:
        pipe.vae.decode(latents, return_dict=False)
    weights = sum(found.weights.values())
    assert found.memory["all"] - weights - 4 * 3 * side**2 * 4 == pytest.approx(real.peak, rel=0.02)


def test_seconds_are_arithmetic_over_the_rate(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "rates", lambda *_: Rates(1.0, 1.0, 1.0, 1e30))
    found = plan(pipe, 2, num_inference_steps=3, guidance_scale=3.0, active=[1.0, 1 / 3])
    length = pipe.tokenizer.model_max_length
    latents, text = torch.randn(4, 16, 16, 16), torch.randn(4, length, pipe.unet.config.cross_attention_dim)
    hint = torch.rand(4, 3, 128, 128)
    with torch.no_grad(), hints_encoded_once(list(pipe.controls.values())), FlopCounterMode(display=False) as real:
        pipe.text_encoder(torch.zeros(4, length, dtype=torch.long))
        pipe.vae.decode(latents[:2])
        for _ in range(3):
            down, mid = pipe.controls["pose"](latents, 500, text, hint, return_dict=False)
            pipe.unet(latents, 500, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)
        pipe.controls["seg"](latents, 500, text, hint)
    counted = real.get_total_flops()
    assert counted < found.seconds < 1.2 * counted, "torch does not count the CPU's attention"


def test_fewer_controls_come_and_go_where_more_fits(pipe: Pipeline) -> None:
    found = plan(pipe)
    assert list(found.turns) == [("seg",), ("pose", "seg")]
    one, both = found.turns.values()
    assert both == found.memory["controls"] < one <= found.memory["stages"]
    assert one - both <= found.weights["control pose"]
    twice = plan(replace(pipe, controls={"pose": pipe.controls["pose"], "pose:1": pipe.controls["pose"]}))
    assert list(twice.turns) == [("pose",)], "one network"


def test_what_is_asked_decides(pipe: Pipeline) -> None:
    one = plan(pipe)
    assert one.memory["all"] > one.memory["stages"] >= one.memory["controls"]
    assert plan(pipe, 4).memory["all"] > one.memory["all"] + 3 * MIB
    assert plan(pipe, guidance_scale=1.0).seconds < one.seconds < plan(pipe, strength=1.0).seconds
    assert plan(pipe, strength=0.5).seconds == pytest.approx(0.5 * plan(pipe, strength=1.0).seconds, rel=0.3)
    assert plan(pipe, num_inference_steps=40).seconds == pytest.approx(2 * one.seconds, rel=0.2)
    twice = replace(pipe, scheduler=make_scheduler("heun", pipe.scheduler.config))
    assert plan(twice).seconds == plan(pipe, num_inference_steps=40).seconds, "asked twice a step"
    assert plan(pipe, active=[0.5, 0.5]).seconds < one.seconds
    alone = plan(replace(pipe, controls={}))
    assert alone.seconds < one.seconds
    assert set(one.weights) - set(alone.weights) == {"control pose", "control seg"}


def test_guidance_is_held_as_the_quality_says(pipe: Pipeline) -> None:
    """Steps that hold it ask for one half of the batch; controls are planned as if nothing of them were foretold."""
    found = {name: plan(pipe, quality=name, num_inference_steps=20) for name in QUALITIES}
    assert found["exact"].seconds > found["balanced"].seconds > found["fast"].seconds
    assert plan(pipe, quality="fast", guidance_scale=1.0).seconds == plan(pipe, guidance_scale=1.0).seconds
    assert found["balanced"].memory["all"] > found["exact"].memory["all"], "two answers of every control"
    both, one = (plan(pipe, guidance_scale=scale, num_inference_steps=20).seconds for scale in (2.0, 1.0))
    computed = 3 + 8 + 1  # of 20: the first, every other between, the last
    assert found["balanced"].seconds == pytest.approx((computed * both + (20 - computed) * one) / 20, rel=0.05)


def test_nothing_is_computed(pipe: Pipeline) -> None:
    seen = []
    hooks = [one.register_forward_hook(lambda _, __, out: seen.append(out)) for one in (pipe.unet.conv_in,)]
    plan(pipe)
    for hook in hooks:
        hook.remove()
    assert all(type(one).__name__ == "FakeTensor" for one in seen)
    assert seen


def test_the_residency_that_keeps_most_is_chosen() -> None:
    turns = {("seg",): 15, ("pose", "seg"): 10}
    found = Plan({"all": 30, "stages": 20, "controls": 10}, {}, {}, {}, torch.device("cpu"), torch.float32, turns)
    stages, one, both = ("stages", ()), ("controls", ("seg",)), ("controls", ("pose", "seg"))
    assert [found.fitting(limit) for limit in (30, 29, 20, 19, 15, 14, 10)] == [
        ("all", ()), stages, stages, one, one, both, both
    ]  # fmt: skip
    with pytest.raises(UserError, match="only what is at work"):
        found.fitting(9)


def test_a_machine_is_told_by_two_measurements() -> None:
    """Seconds that are three times the best, and a tenth for every call."""
    small, large = (1.0, 50.0, 3.0 + 5.0), (20.0, 60.0, 60.0 + 6.0)
    assert planning.fit(small, large) == pytest.approx((3.0, 0.1))
    assert planning.fit((1.0, 50.0, 1.0), (20.0, 50.0, 10.0)) == (1.0, 0.0), "noise makes nothing negative"


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    slowness, call = planning._pace(torch.device("cpu"), torch.float32)
    assert slowness >= 1
    assert 0 <= call < 1e-2


def test_rules_that_walk_through_all_controls_keep_them_together(pipe: Pipeline) -> None:
    found = plan(pipe, fusion="maxfusion")
    assert not found.turns
    assert found.memory["controls"] == found.memory["stages"]
    later = plan(pipe, fusion="0:sum,0.5:maxfusion")
    assert later.memory["controls"] == later.memory["stages"]


def test_a_plan_for_an_accelerator_is_made_where_networks_wait() -> None:
    waiting = counterpoint.load("tiny", ["pose"], residency="controls")
    assert waiting.residency is not None
    waiting.residency.device = torch.device("cuda")
    found = plan(waiting)
    assert found.weights == plan(counterpoint.load("tiny", ["pose"])).weights
    assert found.memory["controls"] < found.memory["all"]
