"""AdamW, or its 8-bit form."""

from __future__ import annotations

import torch

from counterpoint.training.config import TrainConfig


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that a configuration asks for; :func:`counterpoint.training.machine.check_machine` has seen to it
    that it can be had."""
    settings = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **settings)
