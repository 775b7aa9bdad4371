"""What varies between training runs: a stage computes a loss and knows how to export what it trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterpoint.training.order import Draws
from counterpoint.types import Batch, Samples


class Stage(nn.Module):
    """One training objective. ``forward`` is the step's loss, so that DDP can wrap the whole of it.

    Sub-modules named in :attr:`trained` are optimised, averaged, checkpointed and exported; everything else is frozen.
    :attr:`weighed` names the parts of the loss that have a weight, and the attribute that is it.
    :attr:`reaches_inside` is whether hooks are set inside the networks at every step, which compiled ones do not hear.
    """

    trained: tuple[str, ...] = ()
    reaches_inside: bool = False
    weighed: Mapping[str, str] = MappingProxyType({})

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss of a batch and what else is worth logging."""
        raise NotImplementedError

    def learns(self, parameter: str) -> bool:
        """Whether a parameter of a trained module is optimised, by its name there."""
        return True

    def export(self, folder: Path) -> None:
        """Write the trained modules as users load them, with the averaged weights in place."""
        raise NotImplementedError

    def trained_modules(self) -> dict[str, nn.Module]:
        """Name -> module to train."""
        return {name: self.get_submodule(name) for name in self.trained}


@dataclass(frozen=True)
class Job:
    """A stage and the samples it learns from; the name of their recipe, which a resumed run has to share."""

    stage: Stage
    samples: Samples
    recipe: str = ""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of a batch where they are worked on; the rest as it is."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def mean_over_processes(number: Tensor) -> Tensor:
    """The mean of a number over the processes that share a step; all of them must ask together.

    Gradients are averaged over processes. A sum divided by such a count is, over all of them, the mean of one process.
    """
    number = number.float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(number)
        number /= dist.get_world_size()
    return number
