"""Networks that torch compiles, and what keeps a network closed to whoever would reach into it."""

from __future__ import annotations

import torch
from torch import nn

from counterpoint.models.openvino import Ported
from counterpoint.types import UserError


def check_compiler(device: torch.device) -> None:
    """On a CPU, compiled networks are C++.

    Raises:
        UserError: there is no compiler.
    """
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError("compiling needs a C++ compiler, and there is none: install g++, or do without") from None


def is_compiled(module: nn.Module) -> bool:
    """Whether torch has compiled a module, in place or into another one. Hooks on it or inside it go unheard then."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def closed_by(network: nn.Module) -> str | None:
    """What keeps a network closed to rules, adapters and readouts that would reach into it; the end of a sentence about
    networks."""
    if isinstance(network, Ported):
        return "which OpenVINO keeps closed: use another device"
    if any(map(is_compiled, network.modules())):
        return "which are compiled: load them without compile"
    return None
