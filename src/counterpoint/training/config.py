"""The settings of a training run, named as in diffusers' own training scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from difflib import SequenceMatcher
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import torch
from accelerate.utils import is_bf16_available
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from counterpoint.models.pace import bf16_pays
from counterpoint.types import UserError


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TrainConfig:
    """Everything that decides the result of a run, and where it goes.

    ``cache_dir`` holds rendered scenes and what is computed from them. ``train_batch_size`` is samples a process and
    a forward pass; one optimizer step sees that times ``gradient_accumulation_steps`` times the number of processes.
    ``fsdp`` splits the trained networks among the processes. ``mixed_precision="auto"`` is half precision where the
    hardware has it and is quicker in it.
    """

    output_dir: Path = Path("counterpoint-train")
    cache_dir: Path = Path.home() / ".cache" / "counterpoint"
    max_train_samples: int = Field(49152, gt=0)
    max_train_steps: int = Field(1000, gt=0)
    train_batch_size: int = Field(16, gt=0)
    gradient_accumulation_steps: int = Field(1, gt=0)
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    lr_warmup_steps: int = Field(100, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.99, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0, allow_inf_nan=False)
    adam_epsilon: float = Field(1e-8, gt=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
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

    def resolved(self) -> Any:
        """With every setting that was left open as it will be used, on this machine.

        Raises:
            UserError: settings contradict each other.
        """
        return replace(self, mixed_precision=_precision()) if self.mixed_precision == "auto" else self


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
    """Apply ``key=value`` settings, of which ``none`` is no value, and resolve what stays open.

    Raises:
        UserError: an unknown key (the message lists the known ones, near ones first), a value of the wrong type or
            out of its range, no ``=``, or settings that contradict each other.
    """
    hints = get_type_hints(type(config))
    known = [field.name for field in fields(config)]
    changes: dict[str, str | None] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set wants key=value, got {setting!r}")
        if key not in known:
            raise UserError(f"unknown setting {key!r}; known: {', '.join(nearest_first(key, known))}")
        changes[key] = None if value.lower() == "none" and NoneType in get_args(hints[key]) else value
    return _valid(type(config), {**asdict(config), **changes}).resolved()


def _precision() -> str:
    if not torch.accelerator.is_available():
        return "bf16" if bf16_pays() else "no"
    return "bf16" if is_bf16_available(ignore_tpu=True) else "fp16"


def filled(config: Any, **otherwise: object) -> Any:
    """A configuration whose settings that are ``None`` are these."""
    return replace(config, **{key: value for key, value in otherwise.items() if getattr(config, key) is None})


def check_window(what: str, first: int, last: int) -> None:
    """Hold the two ends of a window of timesteps, the settings ``min_WHAT`` and ``max_WHAT``, against each other.

    Raises:
        UserError: it ends before it begins.
    """
    if first > last:
        raise UserError(f"min_{what}={first} lies above max_{what}={last}: no timestep is in between")


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Known names, those that are spelt most like ``name`` first."""
    return sorted(known, key=lambda one: -SequenceMatcher(None, name, one).ratio())


def differences(old: dict[str, Any], new: TrainConfig, recipe: str = "") -> list[str]:
    """Settings that would make a resumed run differ from the one it continues, as ``key: old -> new``.

    A run may be older than a setting, than the resolving of those that were left open, or than the name of its recipe.
    One whose learning rate does not depend on its end may be made longer.
    """
    adapter = TypeAdapter(type(new))
    current = adapter.dump_python(new, mode="json")
    given = {key: value for key, value in old.items() if key in current}
    before = adapter.dump_python(_valid(type(new), given).resolved(), mode="json")
    endless = new.lr_scheduler.startswith("constant") and before["max_train_steps"] < new.max_train_steps
    free = FREE | {"max_train_steps"} if endless else FREE
    first = old.get("recipe", recipe)
    return [f"recipe: {first} -> {recipe}"] * bool(recipe and first != recipe) + [
        f"{key}: {before[key]} -> {value}" for key, value in current.items() if key not in free and before[key] != value
    ]


def as_json(config: TrainConfig, recipe: str = "") -> str:
    """All settings and the name of the recipe, as ``train.json`` holds them."""
    settings = TypeAdapter(type(config)).dump_python(config, mode="json")
    return json.dumps(({"recipe": recipe} if recipe else {}) | settings, indent=1)


def _valid(kind: type[TrainConfig], values: dict[str, Any]) -> TrainConfig:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        says = first["msg"].removeprefix("Value error, ")
        raise UserError(f"--set {first['loc'][0]}={first['input']}: {says}") from None
