"""What every measure has in common: each sample contributes a row, and rows become one number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.types import UserError

Rows = Float[Tensor, "n ..."]
Reduce = Callable[[Rows], float]
"""``(n, ...) -> number``: how the rows of n samples become the measure of their set."""


def mean(rows: Rows) -> float:
    """The average of all samples."""
    return float(rows.mean())


class Metric:
    """A measure over a set of samples; ``note`` says what readers of the number must know.

    Rows are kept rather than sums, so that intervals and paired comparisons can be had from one and the same pass.

    Args:
        name: how reports call it.
        measure: ``(*batch) -> (b, ...)``, one row a sample, independent of the samples beside it.
        reduce: how rows become a number.
        higher: whether more is better.
        distinct: whether a sample that counts twice would spoil the number, as in a distance between sets.
    """

    def __init__(
        self,
        name: str,
        measure: Callable[..., Tensor],
        reduce: Reduce = mean,
        *,
        higher: bool = True,
        distinct: bool = False,
    ) -> None:
        self.name, self.measure, self.reduce, self.higher, self.distinct = name, measure, reduce, higher, distinct
        self.note = ""
        self._rows: list[Tensor] = []

    def update(self, *batch: object) -> None:
        """Take in a batch.

        Raises:
            UserError: a tensor of it holds NaN.
        """
        if any(isinstance(part, Tensor) and part.is_floating_point() and part.isnan().any() for part in batch):
            raise UserError(f"{self.name}: a picture or map holds values that are not numbers")
        self.add(self.measure(*batch))

    def add(self, rows: Tensor) -> None:
        """Take in rows that were measured elsewhere; a sample that has no number is ``nan`` in them."""
        self._rows.append(rows.detach().to("cpu", torch.float64))

    @property
    def rows(self) -> Rows:
        """One row a sample, float64."""
        if not self._rows:
            raise ValueError(f"{self.name} has seen no sample")
        return torch.cat(self._rows)

    def compute(self) -> float:
        """The measure of everything seen so far."""
        return self.reduce(self.rows)
