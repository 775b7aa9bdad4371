"""What is timed of training: a step of every method on the tiny family, and the two number formats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import ControlNetModel

from counterpoint.apps.benchmark import Case
from counterpoint.apps.benchmark_cases import Comparison
from counterpoint.apps.benchmark_models import SHIPPED
from counterpoint.data.scenes.vocabulary import SEG_CLASSES, SIZE
from counterpoint.fusion.minimal_impact import BalancedInjection
from counterpoint.metrics.cost import measuring
from counterpoint.models.perception import PerceptionModel
from counterpoint.recipes import parts
from counterpoint.recipes.worlds import SCENES
from counterpoint.sampling.floor import uncounted
from counterpoint.training.order import Draws
from counterpoint.training.stage import Stage
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.stages.minimal_impact import MinimalImpactStage
from counterpoint.training.stages.probe import AlignmentStage, Target
from counterpoint.training.stages.reward import Reward, RewardStage
from counterpoint.types import UserError

BATCH = 32
KIND = "depth"


def train_cases(size: str, device: torch.device, dtype: torch.dtype) -> Comparison:
    """Forward and backward pass of one step of every method, on the same batch of noise; the judge and the probe are
    untrained, which costs the same.

    Raises:
        UserError: another size than tiny, or a dtype, for both formats are measured.
    """
    if size != SHIPPED or dtype != torch.float32:
        raise UserError("benchmark train measures the tiny family in both number formats: leave out --size and --dtype")
    torch.manual_seed(0)
    config = parts.FamilyConfig()
    unet, known = SCENES.unet(config), SCENES.denoising(config)
    network = ControlNetModel.from_pretrained(
        config.pretrained_model_name_or_path / "controls" / KIND, local_files_only=True
    )
    judge = parts.fast(PerceptionModel(len(SEG_CLASSES)))
    wanted = SCENES.wanted(KIND)

    def start() -> tuple[Any, ...]:
        return parts.fast(copy.deepcopy(network)), KIND, copy.deepcopy(unet)

    reward = Reward(lambda pictures: judge(pictures).depth, wanted)
    rewarded = {"weight": 0.5, "window": (0, 400), **known}

    def aligned() -> AlignmentStage:
        probe = parts.fast(SCENES.new_probe(unet, "attention", KIND))
        target, windows = Target("attention", wanted), {"alignment_weight": 1.0, "alignment_window": (0, 920)}
        return AlignmentStage(probe, target, reward, judge, SCENES.vae(config), *start(), **windows, **rewarded)

    def conservative(estimator: str) -> MinimalImpactStage:
        inject = BalancedInjection("min-norm")
        return MinimalImpactStage(*start(), inject=inject, weight=0.01, estimator=estimator, **known)

    stages: dict[str, Callable[[], Stage]] = {
        "controlnet": lambda: ControlNetStage(*start(), **known),
        "controlnet++": lambda: RewardStage(reward, judge, SCENES.vae(config), *start(), **rewarded),
        "ctrl-u": lambda: RewardStage(reward, judge, SCENES.vae(config), *start(), uncertainty=0.1, **rewarded),
        "innercontrol": aligned,
        "mi-stage1": lambda: MinimalImpactStage(*start(), inject=BalancedInjection("min-norm"), **known),
        **{
            f"mi-stage2, {name}": lambda name=name: conservative(name) for name in ("paired", "hutchinson", "symmetric")
        },
    }
    cases = {name: _step(make, device, torch.float32) for name, make in stages.items()}
    cases["controlnet, bf16"] = _step(stages["controlnet"], device, torch.bfloat16)
    return Comparison(cases, "controlnet")


def step_peak(name: str, device: str, threads: int) -> float | None:
    """MiB at the largest that a method's step takes besides what was there before, in a process that did nothing
    else: what a step has freed, a process keeps, and the next one's maximum begins there."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    step = train_cases(SHIPPED, where, torch.float32).cases[name]
    with measuring(where) as before:
        torch.ones(2, 2, device=where) @ torch.ones(2, 2, device=where)
    with measuring(where) as cost:
        step()
    return None if cost.peak_mb is None else cost.peak_mb - (before.peak_mb or 0.0)


def _step(make: Callable[[], Stage], device: torch.device, dtype: torch.dtype) -> Case:
    """A step of a stage, which is made when it is first asked for."""

    @cache
    def ready() -> Stage:
        stage = make()
        stage.requires_grad_(False)
        for module in stage.trained_modules().values():
            module.requires_grad_(True)
        return stage.to(device)

    generator = torch.Generator().manual_seed(0)
    side = SIZE // 8
    batch = {
        "latents": torch.randn(BATCH, 16, side, side, generator=generator).to(device),
        "caption": ["a photo of a person on a meadow"] * BATCH,
        f"control:{KIND}": torch.randint(0, 256, (BATCH, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8).to(
            device
        ),
    }

    def step() -> None:
        with uncounted():
            stage = ready()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = stage(batch, Draws(0, range(BATCH), device), 0)
        loss.backward()
        for parameter in stage.parameters():
            parameter.grad = None

    return step
