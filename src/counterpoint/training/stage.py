"""What varies between training runs: a stage computes a loss and knows how to export what it trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from counterpoint.training.order import Draws
from counterpoint.types import Batch, Samples


class Stage(nn.Module):
    """One training objective. ``forward`` is the step's loss, so that DDP can wrap the whole of it.

    Sub-modules named in :attr:`trained` are optimised, averaged, checkpointed and exported; everything else is frozen.
    """

    trained: tuple[str, ...] = ()

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
    """A stage and the samples it learns from."""

    stage: Stage
    samples: Samples
