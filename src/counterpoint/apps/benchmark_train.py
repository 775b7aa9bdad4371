"""What is timed of training: a step of every method, and the two number formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from counterpoint.apps.benchmark import Case
from counterpoint.apps.benchmark_cases import Comparison
from counterpoint.apps.benchmark_models import SHIPPED, make_model
from counterpoint.data.scenes.vocabulary import SEG_CLASSES
from counterpoint.fusion.minimal_impact import BalancedInjection
from counterpoint.metrics.cost import measuring
from counterpoint.models.edge_networks import HedNetwork
from counterpoint.models.perception import PerceptionModel
from counterpoint.recipes import parts
from counterpoint.recipes.sd15 import SD15_WORLD, Lines
from counterpoint.recipes.worlds import SCENES, World
from counterpoint.sampling.floor import uncounted
from counterpoint.training.order import Draws
from counterpoint.training.stage import Stage
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.stages.minimal_impact import MinimalImpactStage
from counterpoint.training.stages.probe import AlignmentStage, Target
from counterpoint.training.stages.reward import Reward, RewardStage
from counterpoint.types import UserError

BATCH = 32


@dataclass(frozen=True, eq=False)
class _Learner:
    """What learns, and from what.

    Attributes:
        world: what it stands on.
        kind: of control.
        network: what learns, beside a frozen UNet.
        judge: what a reward reads with.
        read: the control from pictures.
        samples: of a step.
        window: timesteps at which they are rewarded.
        thrifty: whether networks compute their features again for the backward pass, where the method lets them.
    """

    world: World
    kind: str
    unet: UNet2DConditionModel
    network: ControlNetModel
    vae: AutoencoderKL | AutoencoderTiny
    judge: nn.Module
    read: Callable[[Tensor], Tensor]
    known: Mapping[str, Any]
    samples: int
    window: tuple[int, int]
    thrifty: bool

    def batch(self, device: torch.device) -> dict[str, Any]:
        """One of noise, the same every time."""
        generator, config = torch.Generator().manual_seed(0), self.unet.config
        size = config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = self.samples, config.in_channels, config.sample_size, config.sample_size
        hint = torch.randint(0, 256, (self.samples, size, size, 3), generator=generator, dtype=torch.uint8)
        return {
            "latents": torch.randn(shape, generator=generator).to(device),
            "caption": ["a photo of a person on a meadow"] * self.samples,
            f"control:{self.kind}": hint.to(device),
        }


def _shipped() -> _Learner:
    """The tiny family."""
    config, kind = parts.FamilyConfig(), "depth"
    place = config.pretrained_model_name_or_path / "controls" / kind
    network = parts.fast(ControlNetModel.from_pretrained(place, local_files_only=True))
    judge = parts.fast(PerceptionModel(len(SEG_CLASSES)))
    unet, vae, known = SCENES.unet(config), SCENES.vae(config), SCENES.denoising(config)
    how = {"samples": BATCH, "window": (0, 400), "thrifty": False}
    return _Learner(SCENES, kind, unet, network, vae, judge, lambda shown: judge(shown).depth, known, **how)


def _published(size: str) -> _Learner:
    """A published shape; its one sample is always rewarded."""
    pipe, judge = make_model(size, torch.device("cpu")), Lines(HedNetwork())
    network = pipe.controls["depth"]
    known = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer, "scheduler": DDPMScheduler()}
    how = {"samples": 1, "window": (0, 1000), "thrifty": True}
    return _Learner(SD15_WORLD, "hed", pipe.unet, network, pipe.vae, judge, judge, known, **how)


def train_cases(size: str, device: torch.device, dtype: torch.dtype) -> Comparison:
    """Forward and backward pass of one step of every method, on the same batch of noise; the judge and the probe are
    untrained, which costs the same.

    Raises:
        UserError: SDXL, which no recipe trains; a dtype, for both formats are measured; or there is no room.
    """
    if size == "sdxl":
        raise UserError("benchmark train: no recipe trains SDXL; there are --size tiny and sd15")
    if dtype != torch.float32:
        raise UserError("benchmark train measures in both number formats: leave out --dtype")
    torch.manual_seed(0)
    one = _shipped() if size == SHIPPED else _published(size)
    start = one.network, one.kind, one.unet
    wanted = one.world.wanted(one.kind)
    reward = Reward(one.read, wanted)
    rewarded = {"weight": 0.5, "window": one.window, **one.known}

    def aligned() -> AlignmentStage:
        probe = parts.fast(one.world.new_probe(one.unet, "attention", one.kind))
        target, windows = Target("attention", wanted), {"alignment_weight": 1.0, "alignment_window": (0, 920)}
        return AlignmentStage(probe, target, reward, one.judge, one.vae, *start, **windows, **rewarded)

    def conservative(estimator: str) -> MinimalImpactStage:
        inject = BalancedInjection("min-norm")
        return MinimalImpactStage(*start, inject=inject, weight=0.01, estimator=estimator, **one.known)

    stages: dict[str, Callable[[], Stage]] = {
        "controlnet": lambda: ControlNetStage(*start, **one.known),
        "controlnet++": lambda: RewardStage(reward, one.judge, one.vae, *start, **rewarded),
        "ctrl-u": lambda: RewardStage(reward, one.judge, one.vae, *start, uncertainty=0.1, **rewarded),
        "innercontrol": aligned,
        "mi-stage1": lambda: MinimalImpactStage(*start, inject=BalancedInjection("min-norm"), **one.known),
        **{
            f"mi-stage2, {name}": lambda name=name: conservative(name) for name in ("paired", "hutchinson", "symmetric")
        },
    }
    cases = {name: _step(one, make, device, torch.float32) for name, make in stages.items()}
    cases["controlnet, bf16"] = _step(one, stages["controlnet"], device, torch.bfloat16)
    return Comparison(cases, "controlnet")


def step_peak(name: str, size: str, device: str, threads: int) -> float | None:
    """MiB at the largest that a method's step takes besides what was there before, in a process that did nothing
    else: what a step has freed, a process keeps, and the next one's maximum begins there."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    step = train_cases(size, where, torch.float32).cases[name]
    with measuring(where) as before:
        torch.ones(2, 2, device=where) @ torch.ones(2, 2, device=where)
    with measuring(where) as cost:
        step()
    return None if cost.peak_mb is None else cost.peak_mb - (before.peak_mb or 0.0)


def _step(one: _Learner, make: Callable[[], Stage], device: torch.device, dtype: torch.dtype) -> Case:
    """A step of a stage, which is made when it is first asked for; the networks are everybody's."""

    @cache
    def ready() -> tuple[Stage, dict[str, Any]]:
        stage = make().to(device).requires_grad_(False)
        for module in stage.trained_modules().values():
            module.requires_grad_(True)
        return stage, one.batch(device)

    def step() -> None:
        with uncounted():
            stage, batch = ready()
            for module in stage.children() if one.thrifty else ():
                if isinstance(module, ModelMixin) and module._supports_gradient_checkpointing:
                    again = not isinstance(stage, MinimalImpactStage)
                    (module.enable_gradient_checkpointing if again else module.disable_gradient_checkpointing)()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = stage(batch, Draws(0, range(one.samples), device), 0)
        loss.backward()
        for parameter in stage.parameters():
            parameter.grad = None

    return step
