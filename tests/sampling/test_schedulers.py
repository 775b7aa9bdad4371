"""How much noise there is at a timestep, whatever the scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from counterpoint.sampling.schedulers import noise_level


@pytest.mark.parametrize("kind", [DDIMScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_noise_for_each_part_of_signal(kind: type) -> None:
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(20)
    found = [noise_level(scheduler, t) for t in scheduler.timesteps]
    assert found == sorted(found, reverse=True)
    product = float(scheduler.alphas_cumprod[500])
    assert noise_level(scheduler, torch.tensor(500)) == pytest.approx(math.sqrt((1 - product) / product))
    if kind is EulerDiscreteScheduler:  # it tells itself
        torch.testing.assert_close(torch.tensor(found), scheduler.sigmas[:-1].float(), rtol=5e-3, atol=1e-3)


def test_noise_of_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert noise_level(scheduler, torch.tensor(1000.0)) == math.inf
    assert noise_level(scheduler, torch.tensor(500.0)) == pytest.approx(1)
