"""The method that makes a ControlNet give way to others: Minimal Impact ControlNet (ICLR 2025)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from counterpoint.fusion.minimal_impact import BalancedInjection
from counterpoint.recipes.worlds import TunedFields, World
from counterpoint.training.losses.conservativity import Estimator
from counterpoint.training.stage import Job
from counterpoint.training.stages.minimal_impact import MinimalImpactStage


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MinimalImpactFields(TunedFields):
    """What each part of the method adds. The second stage goes on with the first one's
    ``controlnet_model_name_or_path``."""

    control_type: Literal["canny", "hed", "pose"] = "canny"
    balanced: bool = True
    injection: Literal["sum", "min-norm", "literal"] = "min-norm"
    conservativity_weight: float = Field(0.0, ge=0)
    conservativity_estimator: Estimator = "paired"
    conservativity_share: float = Field(0.25, gt=0, le=1)


def minimal_impact(world: World, config: Any) -> Job:
    """Balanced data, injection in the forward pass, and with a weight the price on what is no gradient."""
    torch.manual_seed(config.seed)
    kind = config.control_type
    stage = MinimalImpactStage(
        world.controlnet(config, kind),
        kind,
        world.unet(config),
        inject=torch.add if config.injection == "sum" else BalancedInjection(config.injection),
        weight=config.conservativity_weight,
        estimator=config.conservativity_estimator,
        share=config.conservativity_share,
        **world.denoising(config),
    )
    return Job(stage, world.samples(config, kind, balanced=config.balanced))
