"""A recipe: settings with a name, and the function that turns them into a training job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from counterpoint.training.config import TrainConfig
from counterpoint.training.stage import Job


@dataclass(frozen=True)
class Recipe:
    """``config`` holds the recipe's own defaults, ``make`` turns settings into a job; ``summary`` is one line for
    help."""

    name: str
    summary: str
    config: TrainConfig
    make: Callable[[Any], Job]

    def build(self, config: Any) -> Job:
        """The job of a configuration, with the recipe's name."""
        return replace(self.make(config.resolved()), recipe=self.name)
