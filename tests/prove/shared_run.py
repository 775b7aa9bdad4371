"""A short run for several processes: ``shared_run.py OUT BATCH FSDP STOP RESUME``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from counterpoint.models.perception import PerceptionModel
from counterpoint.training.config import TrainConfig
from counterpoint.training.order import Draws
from counterpoint.training.stage import Batch, Job
from counterpoint.training.stages.judge import JudgeStage
from counterpoint.training.trainer import Interrupted, train


class Noise:
    def __len__(self) -> int:
        return 64

    def batch(self, indices: list[int]) -> Batch:
        made = [torch.Generator().manual_seed(index) for index in indices]
        images = torch.stack([torch.randint(0, 256, (32, 32, 3), generator=g, dtype=torch.uint8) for g in made])
        return {"image": images, "segments": (images[..., 0] > 128).long()}


class Stopping(JudgeStage):
    """The last of the processes hears Ctrl-C."""

    stop = -1

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == self.stop and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(batch, draws, step)


def main(out: str, batch: str, fsdp: str, stop: str, resume: str) -> None:
    torch.manual_seed(0)
    stage = Stopping(PerceptionModel(2, widths=(16, 16), depth=1))
    stage.stop = int(stop)
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
