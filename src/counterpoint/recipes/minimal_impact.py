"""The method that makes a ControlNet give way to others: Minimal Impact ControlNet (ICLR 2025)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from counterpoint.data.balance import check_can_be_silent
from counterpoint.fusion.minimal_impact import BalancedInjection, trained_injection
from counterpoint.recipes.aligned import Kind
from counterpoint.recipes.worlds import TunedFields, World
from counterpoint.training.config import check_window, filled
from counterpoint.training.losses.conservativity import Estimator
from counterpoint.training.stage import Job
from counterpoint.training.stages.minimal_impact import MinimalImpactStage
from counterpoint.types import CONTROL_KINDS, UserError


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MinimalImpactFields(TunedFields):
    """What each part of the method adds; ``balanced`` is left open for all kinds of control that can be silent. The
    second stage goes on with the first one's ``controlnet_model_name_or_path``. The ``literal`` reading of the
    injection is the default because controls are followed better by it (docs/tiny-family.md)."""

    control_type: Kind = "canny"
    balanced: bool | None = None
    injection: Literal["sum", "min-norm", "literal"] = "literal"
    conservativity_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    conservativity_estimator: Estimator = "paired"
    conservativity_of: Literal["eps", "score"] = "eps"
    min_timestep_conservativity: int = Field(0, ge=0, le=999)
    max_timestep_conservativity: int = Field(999, ge=0, le=999)
    conservativity_share: float = Field(0.25, gt=0, le=1)

    def resolved(self) -> Any:
        """Balanced wherever the kind of control can be silent.

        Raises:
            UserError: settings that contradict each other.
        """
        check_window("timestep_conservativity", self.min_timestep_conservativity, self.max_timestep_conservativity)
        if self.balanced:
            check_can_be_silent(self.control_type, "balanced=true")
        twice = self.conservativity_weight and self.conservativity_estimator != "paired"
        for setting in ("gradient_checkpointing", "torch_compile"):
            if twice and getattr(self, setting):
                raise UserError(
                    f"conservativity_estimator={self.conservativity_estimator} takes second derivatives, which "
                    f"{setting} does not have: --set {setting}=false, or the paired estimator"
                )
        return filled(super().resolved(), balanced=CONTROL_KINDS[self.control_type].silent is not None)


def minimal_impact(world: World, config: Any) -> Job:
    """Balanced data, injection in the forward pass, and with a weight the price on what is no gradient.

    Raises:
        UserError: stage 2 is to begin with a network that stage 1 did not train, or a literal injection with one that
            is not trained at all.
    """
    torch.manual_seed(config.seed)
    kind, network = config.control_type, world.controlnet(config, config.control_type)
    inject = torch.add if config.injection == "sum" else BalancedInjection(config.injection)
    if config.injection == "literal" and not any(bool(last.weight.any()) for last in network.controlnet_down_blocks):
        raise UserError(
            "the ControlNet says nothing yet, and by the literal injection it would learn nothing: go on with a "
            "trained one, --set controlnet_model_name_or_path=FOLDER, or --set injection=min-norm"
        )
    if config.conservativity_weight and trained_injection(network) is torch.add is not inject:
        raise UserError(
            f"the ControlNet was trained without the injection {config.injection}: stage 2 goes on with the output of "
            "stage 1, --set controlnet_model_name_or_path=FOLDER"
        )
    stage = MinimalImpactStage(
        network,
        kind,
        world.unet(config),
        inject=inject,
        weight=config.conservativity_weight,
        estimator=config.conservativity_estimator,
        of=config.conservativity_of,
        window=(config.min_timestep_conservativity, config.max_timestep_conservativity),
        share=config.conservativity_share,
        **world.denoising(config),
    )
    return Job(stage, world.samples(config, kind, balanced=config.balanced))
