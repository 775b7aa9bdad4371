"""Diffusers' containers of control networks: how one of their networks is asked, and how all of them answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    FluxControlNetModel,
    FluxMultiControlNetModel,
    MultiAdapter,
    T2IAdapter,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from torch import Tensor, nn

from counterpoint.control.lockstep import Walk, walk
from counterpoint.types import UserError

Forward = Callable[..., Any]
_PER_CONTROL = ("controlnet_cond", "controlnet_mode", "control_type", "control_type_idx", "conditioning_scale")
UNETS = (ControlNetModel, MultiControlNetModel, ControlNetUnionModel, MultiControlNetUnionModel)
FLUX = (FluxControlNetModel, FluxMultiControlNetModel)
WALKED = (ControlNetModel, MultiControlNetModel)
"""Those whose networks can be run side by side."""
ADAPTERS = (MultiAdapter, T2IAdapter)


def find_container(pipeline: DiffusionPipeline) -> nn.Module:
    """What holds a pipeline's control networks.

    Raises:
        UserError: nothing does.
    """
    for name in ("controlnet", "adapter"):
        module: Any = getattr(pipeline, name, None)
        if isinstance(getattr(module, "_orig_mod", module), (*UNETS, *FLUX, *ADAPTERS)):
            return module  # type: ignore[no-any-return]
    raise UserError(f"{type(pipeline).__name__} holds no ControlNets and no T2I-Adapters that can be joined")


def networks_of(container: nn.Module) -> list[nn.Module]:
    """Its networks, itself if it is one."""
    return list(getattr(container, "nets", None) or getattr(container, "adapters", None) or [container])


def shown(call: Mapping[str, Any]) -> Any:
    """What a container's call shows it."""
    return next(call[name] for name in ("xs", "x", "controlnet_cond") if name in call)


def part_of(container: nn.Module, call: Mapping[str, Any], index: int, scales: Sequence[float]) -> dict[str, Any]:
    """A call for one control, from the call for all."""
    if "x" in call:
        return {"x": call["x"]}
    if "xs" in call:
        return {"xs": [call["xs"][index]], "adapter_weights": [scales[index]]}
    part: dict[str, Any] = {
        key: [value[index]] if key in _PER_CONTROL and isinstance(value, (list, tuple)) else value
        for key, value in call.items()
    }
    modes = call.get("controlnet_mode")
    if isinstance(container, FluxMultiControlNetModel) and isinstance(modes, Tensor):  # image-to-image has rows of one
        part["controlnet_mode"] = modes[index : index + 1]
    if isinstance(container, ControlNetUnionModel):
        part["control_type"] = torch.zeros_like(call["control_type"])
        part["control_type"][:, part["control_type_idx"][0]] = 1
    return {**part, "return_dict": False}


@contextmanager
def only(container: nn.Module, index: int) -> Iterator[None]:
    """Let a container hold one network."""
    name = "adapters" if isinstance(container, MultiAdapter) else "nets"
    whole: Any = container._modules.get(name, ())
    if len(whole) < 2:
        yield
        return
    container._modules[name] = nn.ModuleList([whole[index]])
    try:
        yield
    finally:
        container._modules[name] = whole


def walk_of(network: nn.Module, part: Mapping[str, Any], scale: float) -> Walk:
    """A network's walk, from a call for it alone.

    Raises:
        UserError: the call is in guess mode.
    """
    if part["guess_mode"]:
        raise UserError("guess_mode weighs a network's own sites and cannot be walked: leave it out, or fuse by pix")
    timestep = torch.as_tensor(part["timestep"], device=part["sample"].device)
    hint = part["controlnet_cond"]
    return walk(
        network,
        part["sample"],
        timestep,
        part["encoder_hidden_states"],
        hint[0] if isinstance(hint, list) else hint,
        scale,
        part.get("added_cond_kwargs"),
    )


class Layout:
    """How one family of containers answers, as a list of maps from the first site to the deepest, and back."""

    def __init__(self, flatten: Forward, rebuild: Forward, grid: tuple[int, int] | None = None) -> None:
        self.flatten, self.rebuild, self.grid = flatten, rebuild, grid

    def names(self, sizes: tuple[int | None, int | None] | None) -> list[str] | None:
        """What its sites are called, of as many as a branch spoke at; ``None`` is a U-Net's own way."""
        if sizes is None:
            return None
        double, single = (size or 0 for size in sizes)
        return [*(f"double.{i}" for i in range(double)), *(f"single.{i}" for i in range(single))]


def layout_of(container: nn.Module, call: Mapping[str, Any]) -> Layout:
    """How a container answers a call."""
    if isinstance(container, ADAPTERS):
        return Layout(lambda said: (list(said), None), lambda sites, _: sites)
    if isinstance(container, UNETS):
        return Layout(lambda said: ([*said[0], said[1]], None), lambda sites, _: (sites[:-1], sites[-1]))
    height, width = (int(call["img_ids"][:, axis].max()) + 1 for axis in (1, 2))

    def flatten(said: Any) -> tuple[list[Tensor], tuple[int | None, int | None]]:
        tokens = [site for group in said for site in group or ()]
        maps = [site.transpose(1, 2).reshape(len(site), -1, height, width) for site in tokens]
        return maps, (None if said[0] is None else len(said[0]), None if said[1] is None else len(said[1]))

    def rebuild(sites: list[Tensor], sizes: tuple[int | None, int | None]) -> tuple[Any, Any]:
        tokens = [site.flatten(2).transpose(1, 2) for site in sites]
        double = tokens[: sizes[0] or 0]
        return (double if sizes[0] else None), (tokens[len(double) :] if sizes[1] else None)

    return Layout(flatten, rebuild, (height, width))
