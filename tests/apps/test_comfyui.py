"""The ComfyUI node, against controls that speak ComfyUI's language: chained, each adding to the one before."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from counterpoint.apps.export import offered
from counterpoint.fusion import FUSIONS, get_fusion
from counterpoint.types import UserError


class ControlBase:
    """As much of ComfyUI's as a chain needs."""

    def __init__(self) -> None:
        self.previous_controlnet: Any = None
        self.strength = 1.0
        self.began = False

    def set_previous_controlnet(self, control: Any) -> Any:
        self.previous_controlnet = control
        return self

    def copy_to(self, other: Any) -> None:
        other.strength = self.strength


class Speaker(ControlBase):
    """Says what it was given; adds itself to the one before."""

    def __init__(self, said: dict[str, list[Tensor | None]] | None) -> None:
        super().__init__()
        self.said = said

    def copy(self) -> Speaker:
        made = Speaker(self.said)
        self.copy_to(made)
        return made

    def pre_run(self, model: object, to_timestep: object) -> None:
        self.began = True

    def cleanup(self) -> None:
        self.began = False

    def get_models(self) -> list[object]:
        return [self]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        return 7

    def get_control(self, x: Tensor, t: Tensor, cond: object, batched: int, options: dict) -> Any:
        before = None
        if self.previous_controlnet is not None:
            before = self.previous_controlnet.get_control(x, t, cond, batched, options)
        if self.said is None:
            return before
        mine = {
            place: [None if one is None else one * self.strength for one in self.said[place]] for place in self.said
        }
        if before is None:
            return mine
        return {
            place: [
                b if a is None else a if b is None else a + b for a, b in zip(mine[place], before[place], strict=True)
            ]
            for place in mine
        }


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    comfy, controlnet = ModuleType("comfy"), ModuleType("comfy.controlnet")
    controlnet.ControlBase = ControlBase  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.controlnet", controlnet)
    monkeypatch.delitem(sys.modules, "counterpoint.apps.comfyui", raising=False)
    yield importlib.import_module("counterpoint.apps.comfyui")
    sys.modules.pop("counterpoint.apps.comfyui", None)


def speech(seed: int) -> dict[str, list[Tensor | None]]:
    draw = torch.Generator().manual_seed(seed)
    sizes = [(2, 8, 8, 8), (2, 8, 4, 4)]
    return {
        "input": [],
        "middle": [torch.randn(2, 16, 2, 2, generator=draw)],
        "output": [torch.randn(size, generator=draw) for size in sizes],
    }


def chain(*said: dict[str, list[Tensor | None]] | None) -> Speaker:
    last = None
    for one in said:
        last = Speaker(one).set_previous_controlnet(last)
    assert last is not None
    return last


def ask(control: Any, **options: Any) -> Any:
    return control.get_control(torch.zeros(2, 4, 8, 8), torch.tensor([1.0]), {}, 2, options)


def joined(node: Any, control: Any, fusion: str) -> Any:
    conditioning = [["prompt", {"control": control, "pooled": 1}]]
    ((_, settings),), _ = node.CounterpointFusion().apply(conditioning, [], fusion)
    assert settings["pooled"] == 1
    return settings["control"]


def test_a_sum_is_the_chain(node: Any) -> None:
    made = chain(speech(0), speech(1), speech(2))
    made.strength = 0.5
    wanted, found = ask(made), ask(joined(node, made, "sum"))
    for place in wanted:
        for one, other in zip(wanted[place], found[place], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", offered())
def test_every_rule_is_itself_at_every_place(node: Any, name: str) -> None:
    said = [speech(0), speech(1)]
    found, rule = ask(joined(node, chain(*said), name)), get_fusion(name)
    for index in range(2):
        wanted = rule.at(f"down.{index}")(torch.stack([one["output"][index] for one in said]))
        torch.testing.assert_close(found["output"][index], wanted)
    wanted = rule.at("mid", last=True)(torch.stack([one["middle"][0] for one in said]))
    torch.testing.assert_close(found["middle"][0], wanted)


def test_who_is_silent_is_not_heard(node: Any) -> None:
    alone, partly = speech(0), speech(1)
    partly["output"][0] = None
    found = ask(joined(node, chain(None, alone), "pix"))
    assert torch.equal(found["output"][1], alone["output"][1])
    assert torch.equal(ask(joined(node, chain(alone, partly), "pix"))["output"][0], alone["output"][0])
    assert ask(joined(node, chain(None, None), "pix")) is None


def test_a_chain_is_left_as_it_is_and_stays_shared(node: Any) -> None:
    made = chain(speech(0), speech(1))
    both = [["positive", {"control": made}]], [["negative", {"control": made}], ["other", {}]]
    ((_, front),), ((_, back), (_, none)) = node.CounterpointFusion().apply(*both, "mgda")
    assert front["control"] is back["control"]
    assert "control" not in none
    assert made.previous_controlnet is not None
    control = front["control"]
    assert len(control.get_models()) == 2
    assert control.inference_memory_requirements(torch.float16) == 14
    control.pre_run(None, None)
    assert all(part.began for part in control.parts)
    assert not made.began
    control.cleanup()
    assert not any(part.began for part in control.parts)
    twin = control.copy()
    assert twin is not control
    assert torch.equal(ask(twin)["middle"][0], ask(control)["middle"][0])


def test_rules_over_the_steps_follow_comfyuis_sigmas(node: Any) -> None:
    said = [speech(0), speech(1)]
    control = joined(node, chain(*said), "0:sum,0.5:mean")
    sigmas = torch.tensor([14.0, 7.0, 3.0, 1.0, 0.0])
    first = ask(control, sample_sigmas=sigmas, sigmas=torch.tensor([14.0, 14.0]))
    last = ask(control, sample_sigmas=sigmas, sigmas=torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(first["middle"][0], 2 * last["middle"][0])
    with pytest.raises(UserError, match="does not say where it is"):
        ask(control)


@pytest.mark.parametrize("name", sorted(set(FUSIONS) - set(offered())))
def test_what_reaches_into_networks_is_refused(node: Any, name: str) -> None:
    with pytest.raises(UserError, match="reaches into the networks"):
        node.CounterpointFusion().apply([], [], name)


def test_the_node_is_registered(node: Any) -> None:
    kind = node.NODE_CLASS_MAPPINGS["CounterpointFusion"]
    wanted = kind.INPUT_TYPES()["required"]
    assert list(wanted) == ["positive", "negative", "fusion"]
    assert get_fusion(wanted["fusion"][1]["default"])
    assert hasattr(kind, kind.FUNCTION)
