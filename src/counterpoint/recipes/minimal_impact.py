"""A recipe that tunes a ControlNet of the tiny family to make way for others: Minimal Impact ControlNet (ICLR 2025)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from counterpoint.data.balance import Balanced
from counterpoint.fusion.minimal_impact import balanced_injection
from counterpoint.recipes import parts
from counterpoint.recipes.recipe import Recipe
from counterpoint.training.losses.conservativity import Estimator
from counterpoint.training.stage import Job
from counterpoint.training.stages.minimal_impact import MinimalImpactStage


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MinimalImpactConfig(parts.TunedConfig):
    """What each part of the method adds: ``balanced`` data, an ``injection`` that balances, and with
    ``conservativity_weight`` 0.01 the paper's second stage, which goes on with ``controlnet_model_name_or_path``."""

    control_type: Literal["canny", "hed", "pose"] = "canny"
    balanced: bool = True
    injection: Literal["sum", "min-norm", "literal"] = "min-norm"
    conservativity_weight: float = Field(0.0, ge=0)
    conservativity_estimator: Estimator = "paired"
    conservativity_share: float = Field(0.25, gt=0, le=1)


def minimal_impact(config: MinimalImpactConfig) -> Job:
    """Goes on with a trained ControlNet, the family's own unless told.

    Raises:
        UserError: there is none.
    """
    torch.manual_seed(config.seed)
    kind = config.control_type
    stage = MinimalImpactStage(
        parts.tuned_controlnet(config, kind),
        kind,
        parts.unet(config),
        inject=torch.add if config.injection == "sum" else balanced_injection(config.injection),
        weight=config.conservativity_weight,
        estimator=config.conservativity_estimator,
        share=config.conservativity_share,
        **parts.denoising(config),
    )
    if not config.balanced:
        return Job(stage, parts.latents(config, f"control:{kind}"))
    scenes = parts.latents(config, f"control:{kind}", "seg").rename("seg", "segments")
    return Job(stage, Balanced(scenes, kind, config.seed))


MINIMAL_IMPACT = Recipe(
    "tiny-minimal-impact",
    "a ControlNet that makes way for others (stage 2: conservativity_weight=0.01)",
    MinimalImpactConfig(
        max_train_steps=1200,
        train_batch_size=32,
        learning_rate=2e-4,
        lr_scheduler="constant",
        lr_warmup_steps=10,
        checkpointing_steps=250,
        logging_steps=50,
        max_train_samples=98304,
    ),
    minimal_impact,
)
