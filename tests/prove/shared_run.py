"""A short run for several processes: ``python -m tests.prove.shared_run METHOD OUT BATCH FSDP STOP RESUME``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from counterpoint.control.features import widths
from counterpoint.fusion.minimal_impact import BalancedInjection
from counterpoint.models.probe import Probe
from counterpoint.recipes import parts
from counterpoint.training.config import TrainConfig
from counterpoint.training.order import Draws
from counterpoint.training.stage import Batch, Job, Stage
from counterpoint.training.stages.minimal_impact import MinimalImpactStage
from counterpoint.training.stages.probe import AlignmentStage, Target
from counterpoint.training.stages.reward import Reward, RewardStage
from counterpoint.training.trainer import Interrupted, train
from tests.conftest import random_parts


class Noise:
    def __len__(self) -> int:
        return 64

    def batch(self, indices: list[int]) -> Batch:
        made = [torch.Generator().manual_seed(index) for index in indices]
        images = torch.stack([torch.randint(0, 256, (64, 64, 3), generator=g, dtype=torch.uint8) for g in made])
        latents = torch.stack([torch.randn(4, 8, 8, generator=g) for g in made])
        return {"latents": latents, "caption": ["a red ball"] * len(indices), "control:pose": images}


def interrupt_at(last: int, stage: Stage) -> None:
    """The last of the processes hears Ctrl-C before this step."""

    def listen(_: Stage, args: tuple[Batch, Draws, int]) -> None:
        if args[2] == last and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGINT)

    stage.register_forward_pre_hook(listen)


def wanted(batch: Batch) -> Tensor:
    return batch["control:pose"].permute(0, 3, 1, 2)[:, :1] / 255


def stage_of(method: str) -> Stage:
    """Rewards and alignment count in windows that hold another number of samples on each process; the price on what is
    no gradient is estimated on one sample in four."""
    given = random_parts(controls=1)
    network, unet = parts.fast(given["networks"][0]), given["unet"]
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    controlled = (network, "pose", unet, given["text_encoder"], given["tokenizer"], scheduler)
    reward = Reward(lambda pictures: pictures.mean(1, keepdim=True), wanted)
    rewarded = (reward, torch.nn.Identity(), given["vae"], *controlled)
    probe = Probe(widths(unet, "attention"), unet.time_embedding.linear_2.out_features, 32, (16, 8), 1, size=16)
    inject = BalancedInjection("min-norm")
    windows = {"alignment_weight": 0.5, "alignment_window": (200, 900), "weight": 0.3, "window": (0, 400)}
    made = {
        "innercontrol": lambda: AlignmentStage(probe, Target("attention", wanted), *rewarded, **windows),
        "ctrl-u": lambda: RewardStage(*rewarded, weight=0.3, window=(0, 400), uncertainty=0.5),
        "mi-stage2": lambda: MinimalImpactStage(*controlled, inject=inject, weight=0.01),
    }
    return made[method]()


def main(method: str, out: str, batch: str, fsdp: str, stop: str, resume: str) -> None:
    stage = stage_of(method)
    interrupt_at(int(stop), stage)
    config = TrainConfig(
        output_dir=Path(out),
        max_train_steps=8,
        train_batch_size=int(batch),
        learning_rate=1e-3,
        lr_warmup_steps=2,
        mixed_precision="no",
        logging_steps=1,
        checkpointing_steps=4,
        fsdp=fsdp == "fsdp",
        gradient_checkpointing=True,
    )
    try:
        train(Job(stage, Noise()), config, resume=resume == "resume")
    except Interrupted as interrupted:
        print(interrupted)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
