"""Which sample comes when, and which random numbers it meets: pure functions of the seed and a sample's ordinal.

Nothing here has state, so a resumed run, another number of processes or another split of the batch sees the same
samples with the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64((seed, epoch))).permutation(length)


def sample_index(ordinal: int, length: int, seed: int) -> int:
    """Position in the data set of the run's ``ordinal``-th sample (from 0): every epoch is shuffled anew."""
    epoch, position = divmod(ordinal, length)
    return int(_permutation(seed, epoch, length)[position])


class Order:
    """Batch sampler over ``(ordinal, index)`` pairs of one process, from optimizer step ``start`` to ``stop``.

    A step's samples have the ordinals ``step * total .. (step + 1) * total``; process ``rank`` of ``world`` takes its
    share of them in ``accumulation`` batches.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        batch_size: int,
        accumulation: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.length, self.seed, self.batch_size, self.accumulation = length, seed, batch_size, accumulation
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size * self.accumulation
        for step in range(self.start, self.stop):
            first = (step * self.world + self.rank) * share
            for batch in range(self.accumulation):
                ordinals = range(first + batch * self.batch_size, first + (batch + 1) * self.batch_size)
                yield [(ordinal, sample_index(ordinal, self.length, self.seed)) for ordinal in ordinals]


class Draws:
    """Random numbers for a batch, one generator a sample: sample ``k`` draws the same whoever sits beside it."""

    def __init__(self, seed: int, ordinals: Sequence[int], device: torch.device | str = "cpu") -> None:
        states = [
            int(np.random.SeedSequence((seed, 1, ordinal)).generate_state(1, np.uint64)[0] >> 1) for ordinal in ordinals
        ]
        self.generators = [torch.Generator().manual_seed(state) for state in states]
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal ``(b, *shape)``."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), ``(b, *shape)``."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in ``0 .. high - 1``, ``(b, *shape)``."""
        return torch.stack([torch.randint(high, shape, generator=g) for g in self.generators]).to(self.device)
