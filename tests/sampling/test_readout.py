"""Probes read a control while it is sampled, change nothing, and push where they are told to."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterpoint.control.weight import Weight
from counterpoint.models.probe import Probe
from counterpoint.sampling.economy import ENCODER
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.readout import Readings, Readout
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.types import Moment, UserError
from tests.conftest import noise

FAST = {"num_inference_steps": 4, "width": 64, "height": 64, "output_type": "latent"}
HINT = noise((64, 64), 90)


def error(read: Tensor, hint: Tensor) -> Tensor:
    wanted = torch.nn.functional.interpolate(hint[:, :1], read.shape[2:], mode="area")
    return ((read + 1) / 2 - wanted).square().flatten(1).mean(1)


@pytest.fixture
def pipe(parts: dict) -> Pipeline:
    scheduler = make_scheduler("unipc", parts["scheduler"].config)
    torch.manual_seed(1)
    probe = Probe((16, 16), 64, 32, (16, 8), 1, size=8).eval()
    return Pipeline(
        parts["vae"],
        parts["text_encoder"],
        parts["tokenizer"],
        parts["unet"],
        scheduler,
        {"depth": parts["networks"][0]},
        readouts={"depth": Readout(probe, "attention", error)},
    )


def run(pipe: Pipeline, **more: object):
    own = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(["a person", "a ball"], [HINT], generator=own, **{**FAST, **more})


@pytest.mark.parametrize("more", [{}, {"quality": "fast", "num_inference_steps": 8}])
def test_reading_changes_nothing(pipe: Pipeline, more: dict) -> None:
    read, silent = run(pipe, report=True, **more), run(pipe, **more)
    assert torch.equal(read.images, silent.images)
    assert torch.equal(read.images, run(replace(pipe, readouts={}), **more).images)
    assert read.thrift == silent.thrift
    assert not more or read.thrift[0][ENCODER].share < 1, "the encoder's answers are foretold while features are read"
    assert [tuple(step.shape) for step in read.report.errors["depth"]] == [(2,)] * (8 if more else 4)
    assert "Followed from inside" in read.report.html(1)
    assert "Followed from inside" not in run(replace(pipe, readouts={}), report=True).report.html()


def test_a_probe_may_be_told_time_from_the_other_end(pipe: Pipeline) -> None:
    times: list[float] = []
    embed = pipe.unet.time_proj.register_forward_hook(lambda _, args, __: times.append(float(args[0].flatten()[0])))
    told = {}
    for reverse in (False, True):
        times.clear()
        readout = replace(pipe.readouts["depth"], reverse=reverse)
        run(replace(pipe, readouts={"depth": readout}), report=True)
        told[reverse] = times[1::2]  # the host's own, then the probe's
    embed.remove()
    assert told[True] == [999 - t for t in told[False]]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_push_brings_what_is_read_nearer(pipe: Pipeline, guidance: float) -> None:
    plain = run(pipe, report=True, guidance_scale=guidance).report.errors["depth"]
    pushed = run(pipe, report=True, guidance_scale=guidance, readout_guidance_scale=0.2).report.errors["depth"]
    assert torch.equal(plain[0], pushed[0]), "the first reading is made before the first push"
    assert (pushed[-1] < plain[-1]).all()
    away = run(pipe, report=True, guidance_scale=guidance, readout_guidance_scale=-0.2).report.errors["depth"]
    assert (away[-1] > plain[-1]).all()


def test_a_picture_is_pushed_alone_as_in_a_batch(pipe: Pipeline) -> None:
    both = run(pipe, readout_guidance_scale=0.2).images
    alone = pipe("a ball", [HINT], generator=torch.manual_seed(1), readout_guidance_scale=0.2, **FAST).images
    assert torch.allclose(both[1:], alone, atol=5e-3), "latents of a size of 30"


def test_a_schedule_ends_a_push(pipe: Pipeline) -> None:
    late = run(pipe, readout_guidance_scale="0:0,0.9:0,0.95:0.2", num_inference_steps=4).images
    assert torch.equal(late, run(pipe).images), "no step begins after 0.9"


def test_the_push_is_the_slope_of_the_error(pipe: Pipeline) -> None:
    """By differences in float64, at a guided batch: the conditional half alone is read."""
    unet, readout = copy.deepcopy(pipe.unet).double(), pipe.readouts["depth"]
    readout = replace(readout, probe=readout.probe.double())
    latents, moment = torch.randn(4, 4, 8, 8, dtype=torch.double), Moment(0, 4, torch.tensor(500))
    text = torch.randn(4, 5, unet.config.cross_attention_dim, dtype=torch.double)
    hints = {"depth": torch.rand(2, 3, 64, 64, dtype=torch.double)}

    def host(seen: Tensor) -> Tensor:
        return unet(seen, moment.timestep, text, return_dict=False)[0]

    original = Tensor.float
    Tensor.float = Tensor.double
    try:
        readings = Readings({"depth": readout}, hints, {"depth": Weight.parse(0.5)}, unet)
        with torch.no_grad():
            prediction = readings.predict(host, latents, moment)
            push = readings.pushed(prediction[2:]) - prediction[2:]
            lengths = push.flatten(1).norm(dim=1) / prediction[2:].flatten(1).norm(dim=1)
            assert torch.allclose(lengths, torch.full((2,), 0.5, dtype=torch.double))
            direction = push / push.flatten(1).norm(dim=1)[:, None, None, None]
            step = torch.zeros_like(latents)
            step[2:] = 1e-4 * direction
            for sign in (1, -1):
                readings.predict(host, latents + sign * step, moment)
            other = torch.randn_like(direction)
            other -= (other * direction).flatten(1).sum(1)[:, None, None, None] * direction
            step[2:] = 1e-4 * other / other.flatten(1).norm(dim=1)[:, None, None, None]
            for sign in (1, -1):
                readings.predict(host, latents + sign * step, moment)
    finally:
        Tensor.float = original
    _, up, down, across, back = readings.errors["depth"]
    assert (up > down).all()
    assert ((across - back).abs() < 1e-3 * (up - down)).all(), "no slope across the steepest one"


def test_what_cannot_be_pushed_is_said(pipe: Pipeline) -> None:
    with pytest.raises(UserError, match="nothing reads depth from the model's features"):
        run(replace(pipe, readouts={}), readout_guidance_scale=0.1)
    with pytest.raises(UserError, match="2 values of readout_guidance_scale for 1 controls"):
        run(pipe, readout_guidance_scale=[0.1, 0.2])
    other = type(pipe.scheduler)(prediction_type="v_prediction")
    with pytest.raises(UserError, match="models that predict noise"):
        run(replace(pipe, scheduler=other), readout_guidance_scale=0.1)


def test_half_precision_is_pushed_the_same_way(pipe: Pipeline) -> None:
    names = ("vae", "text_encoder", "unet")
    half = replace(pipe, **{name: copy.deepcopy(getattr(pipe, name)).bfloat16() for name in names})
    half = replace(half, controls={"depth": copy.deepcopy(pipe.controls["depth"]).bfloat16()})
    plain = run(half, report=True).report.errors["depth"]
    pushed = run(half, report=True, readout_guidance_scale=0.2).report.errors["depth"]
    assert (pushed[-1] < plain[-1]).all()


def test_it_goes_with_guidance_that_is_foretold(pipe: Pipeline) -> None:
    found = run(pipe, report=True, readout_guidance_scale=0.1, quality="fast", num_inference_steps=8)
    assert len(found.report.errors["depth"]) == 8
    assert found.thrift[0]["guidance"].share < 1


def test_a_readout_of_a_control_that_is_not_there(pipe: Pipeline) -> None:
    other = replace(pipe, controls={"pose": pipe.controls["depth"]})
    assert run(other, report=True).report.errors == {}
