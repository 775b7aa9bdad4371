"""A ComfyUI node: the controls of its own graph, joined by one of our rules. ComfyUI imports this, nothing else does.

ComfyUI chains ControlNets, and each adds what it says to what the one before it said. The node takes such a chain apart
and puts one control in its place that asks each of them alone and lets the rule join the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.controlnet import ControlBase
from torch import Tensor

from counterpoint.apps.export import offerable, offered
from counterpoint.fusion import get_fusion
from counterpoint.types import Fusion, Moment, UserError

_PLACES = ("input", "middle", "output")


class FusedControl(ControlBase):
    """Several controls as one.

    Args:
        chain: the last control of a chain; it is left as it is.
        name: of the rule.

    Raises:
        UserError: the rule reaches into the networks, which ComfyUI does not hand out.
    """

    def __init__(self, chain: Any, name: str) -> None:
        super().__init__()
        self.rule, self.parts = _checked(name), []
        while chain is not None:
            self.parts.insert(0, chain.copy().set_previous_controlnet(None))
            chain = chain.previous_controlnet

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, *more: Any) -> Any:
        """What the host hears at a step: features of each place in ComfyUI's form, ``None`` where nobody speaks."""
        said = [part.get_control(x_noisy, t, cond, batched_number, *more) for part in self.parts]
        said = [one for one in said if one is not None]
        if not said:
            return None
        return _joined(self.rule.during(_progress(self.rule, more)), said)

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Before the first step."""
        for part in self.parts:
            part.pre_run(model, percent_to_timestep_function)

    def cleanup(self) -> None:
        """After the last one."""
        for part in self.parts:
            part.cleanup()

    def copy(self) -> FusedControl:
        """Another one of the same controls."""
        made = FusedControl(None, self.rule.name)
        made.parts = [part.copy() for part in self.parts]
        self.copy_to(made)
        return made

    def get_models(self) -> list[Any]:
        """All networks, for ComfyUI's memory management."""
        return [model for part in self.parts for model in part.get_models()]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """Bytes: one control runs at a time, and what each said waits for the rule."""
        return sum(part.inference_memory_requirements(dtype) for part in self.parts)


class CounterpointFusion:
    """The node: conditioning in, the same with its controls joined out."""

    CATEGORY = "conditioning/controlnet"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "apply"
    DESCRIPTION = "Joins the ControlNets that were applied before by a rule, in place of adding them."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """What the node asks for."""
        rule = (
            "STRING",
            {"default": "pix+channel", "tooltip": f"{', '.join(offered())}; settings as in pix:delta=0.5"},
        )
        return {"required": {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "fusion": rule}}

    def apply(self, positive: Sequence[Any], negative: Sequence[Any], fusion: str) -> tuple[list[Any], list[Any]]:
        """Replace every chain of controls; a chain that both conditionings share stays shared.

        Raises:
            UserError: no such rule, or one that does not work here.
        """
        _checked(fusion)
        made: dict[int, FusedControl] = {}

        def joined(conditioning: Sequence[Any]) -> list[Any]:
            found = []
            for embedding, settings in conditioning:
                chain = settings.get("control")
                if chain is not None:
                    if id(chain) not in made:
                        made[id(chain)] = FusedControl(chain, fusion)
                    settings = {**settings, "control": made[id(chain)]}
                found.append([embedding, settings])
            return found

        return joined(positive), joined(negative)


NODE_CLASS_MAPPINGS = {"CounterpointFusion": CounterpointFusion}
NODE_DISPLAY_NAME_MAPPINGS = {"CounterpointFusion": "Join ControlNets (Counterpoint)"}


def _checked(name: str) -> Fusion:
    fusion = get_fusion(name)
    if any(not offerable(rule) for rule in fusion.rules):
        raise UserError(f"{name} reaches into the networks, which ComfyUI keeps; there are {', '.join(offered())}")
    return fusion


def _progress(rule: Fusion, more: Sequence[Any]) -> float:
    """Share of the steps behind, from ComfyUI's own options; only schedules of rules ask."""
    if not rule.stages:
        return 0.0
    options = more[0] if more else {}
    if "sample_sigmas" not in options or "sigmas" not in options:
        raise UserError(f"{rule.name} changes over the steps, and this ComfyUI does not say where it is: use one rule")
    steps = options["sample_sigmas"][:-1]
    index = int((steps - options["sigmas"].flatten()[0].to(steps)).abs().argmin())
    return Moment(index, len(steps), steps[index]).progress


def _joined(rule: Fusion, said: Sequence[dict[str, list[Tensor | None]]]) -> dict[str, list[Tensor | None]]:
    """At each place those who speak there, by the rule; the deepest place is the last one."""
    out: dict[str, list[Tensor | None]] = {place: [] for place in _PLACES}
    for place in _PLACES:
        for index in range(max(len(one.get(place, [])) for one in said)):
            there = [one[place][index] for one in said if index < len(one.get(place, []))]
            speaking = [feature for feature in there if feature is not None]
            out[place].append(None if not speaking else _at(rule, place, index, speaking))
    return out


def _at(rule: Fusion, place: str, index: int, speaking: Sequence[Tensor]) -> Tensor:
    combine = rule.at("mid" if place == "middle" else f"down.{index}", last=place == "middle")
    return combine(torch.stack(torch.broadcast_tensors(*speaking)))
