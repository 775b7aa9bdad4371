"""Networks too large for one process: their parameters are split among all of them (FSDP2), checkpoints are whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module) -> None:
    """Split a network among the processes, block by block, so that only one block is whole at a time.

    Blocks are the members of its module lists: the levels of a UNet, the layers of a transformer. Inner lists come
    first.
    """
    network.to(memory_format=torch.contiguous_format)  # nothing else can be split
    for module in reversed(list(network.modules())):
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(network)


def whole(state: Any, keep: bool = True) -> Any:
    """A state with every tensor gathered, one after the other, in the memory of the host; all processes must ask for it
    together, and those that do not ``keep`` it get nothing."""
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    return [whole(value, keep) for value in state] if isinstance(state, list) else state


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor where a parameter is, and split as it is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def load_whole(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state into a network that may be split."""
    mine = network.state_dict()
    network.load_state_dict({key: like(mine[key], value) if key in mine else value for key, value in state.items()})


def split_optimizer(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """A whole optimizer's state, split as the parameters are; numbers such as its step count stay."""
    moments = {
        number: {
            name: like(parameters[number], value) if isinstance(value, Tensor) and value.ndim else value
            for name, value in one.items()
        }
        for number, one in state["state"].items()
    }
    return {**state, "state": moments}
