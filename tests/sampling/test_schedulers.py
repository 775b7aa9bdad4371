"""How much noise there is at a timestep, whatever the scheduler."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from counterpoint.sampling.schedulers import make_scheduler, moments, noise_level
from counterpoint.types import Moment, UserError


@pytest.mark.parametrize("kind", [DDIMScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_noise_for_each_part_of_signal(kind: type) -> None:
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(20)
    found = [moment.sigma for moment in moments(scheduler, scheduler.timesteps)]
    assert found == sorted(found, reverse=True)
    product = float(scheduler.alphas_cumprod[500])
    assert noise_level(scheduler, 500) == pytest.approx(math.sqrt((1 - product) / product))
    if kind is EulerDiscreteScheduler:  # it tells itself
        torch.testing.assert_close(torch.tensor(found), scheduler.sigmas[:-1].float(), rtol=5e-3, atol=1e-3)


def test_a_moment_knows_its_time_without_asking_a_device() -> None:
    scheduler = make_scheduler("euler", EulerDiscreteScheduler().config)
    scheduler.set_timesteps(5)
    found = moments(scheduler, scheduler.timesteps)
    assert [moment.time for moment in found] == scheduler.timesteps.tolist()
    away = torch.empty((), device="meta")
    assert [replace(moment, timestep=away).time for moment in found] == scheduler.timesteps.tolist()
    assert Moment(0, 1, torch.tensor(7)).time == 7.0


def test_noise_of_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert noise_level(scheduler, 1000.0) == math.inf
    assert noise_level(scheduler, 500.0) == pytest.approx(1)


def test_settings_of_a_scheduler() -> None:
    scheduler = make_scheduler("dpm++:use_karras_sigmas=true,algorithm_type=sde-dpmsolver++,solver_order=3", {})
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert scheduler.config.use_karras_sigmas is True
    assert scheduler.config.algorithm_type == "sde-dpmsolver++"
    assert scheduler.config.solver_order == 3
    assert make_scheduler("DDIMScheduler:clip_sample_range=2", {}).config.clip_sample_range == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpm++:karras=true", "no setting 'karras'; it has .*use_karras_sigmas"),
        ("ddim:num_train_timesteps=1000000000", "no setting 'num_train_timesteps'"),
        ("euler:use_karras_sigmas=1", "true or false"),
        ("unipc:solver_order=2.5", "a whole number"),
        ("unipc:solver_order=1000000000", "at most 1000"),
        ("unipc:solver_type=7", "a word"),
        ("dpm++:algorithm_type=best", "best"),
        ("euler:timestep_spacing=wide", "wide is not supported"),
        ("RePaintScheduler", "unknown scheduler"),
        ("FlowMatchEulerDiscreteScheduler", "unknown scheduler"),
        ("DPMSolverSDEScheduler", "follows no generator"),
    ],
)
def test_schedulers_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scheduler(name, {})
