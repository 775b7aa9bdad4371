"""A recipe: settings with a name, and the function that turns them into a training job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from counterpoint.training.config import TrainConfig
from counterpoint.training.stage import Job


@dataclass(frozen=True)
class Recipe:
    """``build(config)`` makes the job; ``config`` holds the recipe's own defaults; ``summary`` is one line for help."""

    name: str
    summary: str
    config: TrainConfig
    build: Callable[[Any], Job]
