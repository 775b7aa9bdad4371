"""Many controls, one image: diffusion under several simultaneous controls, on Hugging Face diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from counterpoint.api import aggregate as aggregate
    from counterpoint.api import attach as attach
    from counterpoint.api import load as load
    from counterpoint.conditions.layout import Instance as Instance
    from counterpoint.conditions.layout import Interaction as Interaction
    from counterpoint.conditions.layout import Layout as Layout
    from counterpoint.conditions.layout import Reference as Reference
    from counterpoint.conditions.layout import draw_layout as draw_layout
    from counterpoint.conditions.layout import read_layout as read_layout
    from counterpoint.fusion import FUSIONS as FUSIONS
    from counterpoint.sampling.pipeline import Output as Output
    from counterpoint.sampling.pipeline import Pipeline as Pipeline
    from counterpoint.types import Fusion as Fusion
    from counterpoint.types import UserError as UserError

__version__ = "0.1.0"

_WHERE = {
    "aggregate": "counterpoint.api",
    "attach": "counterpoint.api",
    "draw_layout": "counterpoint.conditions.layout",
    "load": "counterpoint.api",
    "read_layout": "counterpoint.conditions.layout",
    "FUSIONS": "counterpoint.fusion",
    "Instance": "counterpoint.conditions.layout",
    "Interaction": "counterpoint.conditions.layout",
    "Layout": "counterpoint.conditions.layout",
    "Reference": "counterpoint.conditions.layout",
    "Output": "counterpoint.sampling.pipeline",
    "Pipeline": "counterpoint.sampling.pipeline",
    "Fusion": "counterpoint.types",
    "UserError": "counterpoint.types",
}
"""Public name -> the module it comes from; it is imported when it is first used."""

__all__ = [
    "FUSIONS",
    "Fusion",
    "Instance",
    "Interaction",
    "Layout",
    "Output",
    "Pipeline",
    "Reference",
    "UserError",
    "aggregate",
    "attach",
    "draw_layout",
    "load",
    "read_layout",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'counterpoint' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
