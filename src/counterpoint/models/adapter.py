"""Adapters of every kind, told apart by what is in their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers import UNet2DConditionModel

from counterpoint.models.gligen import load_gligen
from counterpoint.models.interact import load_interaction
from counterpoint.models.ip_adapter import load_ip_adapter
from counterpoint.models.migc import load_instances
from counterpoint.models.weights import shapes, weight_files
from counterpoint.types import UserError

Load = Callable[[UNet2DConditionModel, Path], UNet2DConditionModel]
KINDS: dict[str, tuple[str, Load]] = {
    "interact": ("position_net.interaction_embedding", load_interaction),
    "gligen": ("position_net.linears", load_gligen),
    "migc": (".migc.", load_instances),
    "ip-adapter": ("ip_adapter.", load_ip_adapter),
}
"""Kind -> what only its files hold, and what loads them; the first that fits is it."""


def load_adapter(unet: UNet2DConditionModel, source: Path) -> tuple[str, UNet2DConditionModel]:
    """An adapter's kind, and a UNet that has it and shares all other weights.

    Args:
        unet: stays as it is.
        source: a safetensors file, or a folder that holds one.

    Raises:
        UserError: the file is missing, a pickle, damaged, of another UNet, or holds no adapter; or the folder holds
            several.
    """
    kind, file = _found(source)
    return kind, KINDS[kind][1](unet, file)


def adapter_kind(source: Path) -> str:
    """An adapter's kind.

    Args:
        source: a safetensors file, or a folder that holds one.

    Raises:
        UserError: the file is missing, a pickle, damaged, or holds no adapter.
    """
    return _found(source)[0]


def check_told(kinds: Sequence[str], layout: bool, instances: bool, reference: bool) -> None:
    """Hold what a picture is told against what its adapters read.

    Args:
        kinds: of the adapters.
        layout: whether there is one.
        instances: whether it has any.
        reference: whether it has one.

    Raises:
        UserError: they read something that is not there, or nothing reads what is.
    """
    if not layout:
        if kinds:
            raise UserError(f"{kinds[0]} reads a layout, and there is none: give one with layout= or --layout")
        return
    if not kinds:
        raise UserError(
            f"nothing here reads a layout: load an adapter ({', '.join(KINDS)}), with adapted() or --aggregate"
        )
    if "ip-adapter" in kinds and not reference:
        raise UserError("ip-adapter reads a layout's reference picture, and there is none: give the layout one")
    if set(kinds) - {"ip-adapter"} and not instances:
        raise UserError(f"{kinds[0]} reads a layout's instances, and there are none: give it some")


def _found(source: Path) -> tuple[str, Path]:
    files = weight_files(source) if source.is_dir() else [source]
    if len(files) > 1:
        raise UserError(f"{source} holds several weight files: name one of {', '.join(one.name for one in files)}")
    (file,) = files
    names = shapes(file)
    for kind, (mark, _) in KINDS.items():
        if any(mark in name for name in names):
            return kind, file
    raise UserError(f"{file} holds no adapter that is known here: {', '.join(KINDS)}")
