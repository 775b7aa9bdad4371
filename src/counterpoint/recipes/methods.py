"""Every method on the tiny family: one recipe a row of the papers' tables."""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from counterpoint.recipes import aligned, minimal_impact
from counterpoint.recipes.parts import FamilyConfig
from counterpoint.recipes.recipe import Recipe
from counterpoint.recipes.worlds import SCENES, World

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ProbeConfig(aligned.ProbeFields, FamilyConfig):
    """A probe on scenes."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PlainConfig(aligned.PlainFields, FamilyConfig):
    """A ControlNet tuned without them."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AlignedConfig(aligned.AlignedFields, FamilyConfig):
    """A ControlNet tuned with rewards on scenes."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MinimalImpactConfig(minimal_impact.MinimalImpactFields, FamilyConfig):
    """A ControlNet that makes way, on scenes."""


def recipes(world: World, probe: Any, plain: Any, tuned: Any, way: Any, second: dict[str, Any]) -> list[Recipe]:
    """The methods on a world.

    Args:
        world: what they stand on.
        probe: configuration of a probe.
        plain: of a ControlNet tuned with the diffusion loss alone.
        tuned: of one tuned with rewards.
        way: of one that makes way for others, stage 1.
        second: what stage 2 changes of it.
    """
    last = type(way)(**{**vars(way), "conservativity_weight": 0.01, **second})
    rows = (
        ("probe", "a probe that reads a control from inner features", probe, aligned.probe),
        ("tuned", "a ControlNet tuned with the diffusion loss alone, to compare", plain, aligned.plain),
        ("controlnet++", "a ControlNet tuned with rewards", tuned, aligned.controlnet_plus_plus),
        ("ctrl-u", "a ControlNet tuned with rewards weighed by doubt", tuned, aligned.ctrl_u),
        ("innercontrol", "a ControlNet tuned with rewards and a probe", tuned, aligned.innercontrol),
        ("mi-stage1", "a ControlNet that makes way for others", way, minimal_impact.minimal_impact),
        ("mi-stage2", "the same, with a price on what is no gradient", last, minimal_impact.minimal_impact),
    )
    return [Recipe(f"{world.name}-{name}", says, config, partial(build, world)) for name, says, config, build in rows]


_TUNED = {
    "train_batch_size": 32,
    "learning_rate": 2e-4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 10,
    "max_train_steps": 1200,
    "checkpointing_steps": 250,
    "logging_steps": 50,
    "max_train_samples": 98304,
}
TINY = recipes(
    SCENES,
    ProbeConfig(
        train_batch_size=8,
        learning_rate=1e-3,
        adam_weight_decay=0,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        checkpointing_steps=500,
        logging_steps=250,
        max_train_samples=98304,
    ),
    PlainConfig(**_TUNED),
    AlignedConfig(**_TUNED),
    MinimalImpactConfig(**_TUNED),
    {},
)
"""On the tiny family."""
