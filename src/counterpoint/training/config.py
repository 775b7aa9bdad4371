"""The settings of a training run, named as in diffusers' own training scripts."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from counterpoint.types import UserError


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TrainConfig:
    """Everything that decides the result of a run, and where it goes.

    ``cache_dir`` holds rendered scenes and what is computed from them. ``train_batch_size`` is samples a process and
    a forward pass; one optimizer step sees that times ``gradient_accumulation_steps`` times the number of processes.
    ``fsdp`` splits the trained networks among the processes.
    """

    output_dir: Path = Path("counterpoint-train")
    cache_dir: Path = Path.home() / ".cache" / "counterpoint"
    max_train_samples: int = Field(49152, gt=0)
    max_train_steps: int = Field(1000, gt=0)
    train_batch_size: int = Field(16, gt=0)
    gradient_accumulation_steps: int = Field(1, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    lr_warmup_steps: int = Field(100, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.99, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    torch_compile: bool = False
    gradient_checkpointing: bool = False
    use_8bit_adam: bool = False
    fsdp: bool = False
    use_ema: bool = True
    ema_decay: float = Field(0.999, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    dataloader_num_workers: int = Field(0, ge=0)
    checkpointing_steps: int = Field(1000, gt=0)
    checkpoints_total_limit: int = Field(2, gt=0)
    logging_steps: int = Field(50, gt=0)
    validation_steps: int = Field(0, ge=0)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"


FREE = frozenset(
    {
        "output_dir",
        "cache_dir",
        "dataloader_num_workers",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "logging_steps",
        "validation_steps",
        "report_to",
    }
)
"""Settings that may differ when a run is resumed: they do not change its weights."""


def override(config: TrainConfig, settings: list[str]) -> TrainConfig:
    """Apply ``key=value`` settings.

    Raises:
        UserError: an unknown key (the message lists the known ones), a value of the wrong type, or no ``=``.
    """
    known = {field.name: field for field in fields(config)}
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set wants key=value, got {setting!r}")
        if key not in known:
            raise UserError(f"unknown setting {key!r}; known: {', '.join(known)}")
        changes[key] = value
    try:
        return TypeAdapter(type(config)).validate_python({**asdict(config), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--set {first['loc'][0]}={first['input']}: {first['msg']}") from None


def differences(old: dict[str, object], new: TrainConfig) -> list[str]:
    """Settings that would make a resumed run differ from the one it continues, as ``key: old -> new``."""
    adapter = TypeAdapter(type(new))
    current = adapter.dump_python(new, mode="json")
    before = adapter.dump_python(type(new)(), mode="json") | old  # a run may be older than a setting
    return [
        f"{key}: {before[key]} -> {value}" for key, value in current.items() if key not in FREE and before[key] != value
    ]


def as_json(config: TrainConfig) -> str:
    """All settings, as ``train.json`` holds them."""
    return TypeAdapter(type(config)).dump_json(config, indent=1).decode()
