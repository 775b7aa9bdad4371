"""What a machine must have for a configuration, asked before any data is prepared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import is_bf16_available

from counterpoint.models.compiling import check_compiler
from counterpoint.training.config import TrainConfig
from counterpoint.types import UserError


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Let numbers too small for full precision be zero, which processors are quicker in, until the run is over."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def check_machine(config: TrainConfig) -> None:
    """Hold a configuration against this machine.

    Raises:
        UserError: a precision that it does not have, a package or compiler that is not installed, or networks that
            cannot be split.
    """
    if config.use_8bit_adam and find_spec("bitsandbytes") is None:
        raise UserError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes")
    if config.fsdp:
        _check_shardable(config, int(os.environ.get("WORLD_SIZE", "1")))
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("mixed_precision=fp16 needs an accelerator, and here is a CPU: take bf16 or no")
    if config.mixed_precision == "bf16" and not is_bf16_available(ignore_tpu=True):
        raise UserError("mixed_precision=bf16: this accelerator does not have it: take fp16 or no")
    if config.torch_compile:
        check_compiler(torch.accelerator.current_accelerator() or torch.device("cpu"))
    tracker = config.report_to
    if tracker != "none" and tracker not in map(str, get_available_trackers()):
        raise UserError(f"report_to={tracker}: the package {tracker} is not installed; install it, or report nowhere")


def _check_shardable(config: TrainConfig, processes: int) -> None:
    if processes == 1:
        raise UserError("fsdp splits networks among several processes: start it with torchrun")
    refused = {
        "torch_compile=true": config.torch_compile,
        "use_8bit_adam=true": config.use_8bit_adam,
        "mixed_precision=fp16": config.mixed_precision == "fp16",
    }
    if wrong := [setting for setting, there in refused.items() if there]:
        raise UserError(f"fsdp takes no {wrong[0]}")
