"""What networks said, foretold from step to step while that is true enough (ours).

Along the schedule a ControlNet's residuals change smoothly, so a line through its last two answers foretells the next
one. What a line misses grows as ``C |t - t_1| |t - t_0|`` with the distance to both; ``C`` is measured whenever a
foretold answer is computed after all, and so tells in advance at which step that has to happen again. Schedulers of
second order ask twice at one time, of other latents: what those two answers differ by is measured too. It is an
estimate, no guarantee: how often the truth lies above it is measured in ``docs/speed.md``. Nothing of this costs a
network call, and every row of a batch decides for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

_CAUTION = 2.0
"""What ``C`` is multiplied by: it was measured behind and holds ahead, where about half of all answers bend more."""
_MEMORY = 0.5
"""What is kept of an earlier, larger ``C``: one lucky guess does not make a line trusted."""


class Line:
    """Answers of one network along the schedule, for rows of a batch that were each computed at times of their own.

    Args:
        rows: of the batch.
    """

    def __init__(self, rows: int) -> None:
        self.times = torch.full((2, rows), torch.nan, dtype=torch.float64)
        self.curve = torch.full((rows,), torch.inf, dtype=torch.float64)
        self.gap = torch.zeros(rows, dtype=torch.float64)
        self.older: list[Tensor] = []
        self.newer: list[Tensor] = []

    def error(self, time: float, rows: Sequence[int]) -> Tensor:
        """What foretelling rows at a time is estimated to miss, as a share of their length, ``(len(rows),)``; infinite
        where it is not known yet."""
        distance = (time - self.times[:, rows]).abs().prod(0)
        missed = (self.curve[rows] * distance).nan_to_num(torch.inf, posinf=torch.inf)
        again = self.times[1, rows] == time
        return _CAUTION * torch.where(again, torch.maximum(missed, self.gap[rows]), missed)

    def foretell(self, time: float, rows: Sequence[int]) -> list[Tensor]:
        """The answers for some rows at a time; at the time of their last computation, that one."""
        before, last = self.times[:, rows]
        step = ((time - last) / (last - before)).nan_to_num(0.0)
        found = []
        for old, new in zip(self.older, self.newer, strict=True):
            ratio = step.to(new).reshape(-1, *[1] * (new.ndim - 1))
            found.append(new[rows] + ratio * (new[rows] - old[rows]))
        return found

    def learn(self, time: float, rows: Sequence[int], answers: Sequence[Tensor]) -> None:
        """Take in what was computed for some rows at a time; at the time of the last computation, in its place."""
        if not self.newer:
            size = self.times.shape[1]
            self.older = [answer.new_zeros(size, *answer.shape[1:]) for answer in answers]
            self.newer = [answer.new_zeros(size, *answer.shape[1:]) for answer in answers]
        moved = [place for place, row in enumerate(rows) if self.times[1, row] != time]
        again = [place for place in range(len(rows)) if place not in moved]
        fresh, same = [rows[place] for place in moved], [rows[place] for place in again]
        gap = relative([one[same] for one in self.newer], [answer[again] for answer in answers]).cpu().double()
        self.gap[same] = torch.maximum(gap, _MEMORY * self.gap[same])
        distance = (time - self.times[:, fresh]).abs().prod(0)
        missed = relative(self.foretell(time, fresh), [answer[moved] for answer in answers]).cpu().double()
        curve = torch.maximum(missed / distance, _MEMORY * self.curve[fresh].nan_to_num(posinf=0.0))
        self.curve[fresh] = torch.where(distance.isfinite(), curve, torch.inf)
        self.times[0, fresh], self.times[1, fresh] = self.times[1, fresh], time
        for old, new, answer in zip(self.older, self.newer, answers, strict=True):
            old[fresh] = new[fresh]
            new[rows] = answer


@dataclass
class Thrift:
    """How often a network was asked in a run, and what was missed where it was not.

    Attributes:
        asked: rows that were computed.
        wanted: rows that were needed.
        error: the largest share that an answer is estimated to be wrong by.
    """

    asked: int = 0
    wanted: int = 0
    error: float = 0.0

    @property
    def share(self) -> float:
        """Of the answers, those that were computed."""
        return self.asked / self.wanted if self.wanted else 1.0


@dataclass(eq=False)
class Reuse:
    """What networks say in a sampling run, each asked again when its estimated error passes a bound.

    Attributes:
        bound: of the estimated relative error of an answer, all its tensors together; less than nothing asks always.
        rows: of the whole batch, both halves if it is guided.
        thrift: network -> what was saved.
    """

    bound: float
    rows: int
    thrift: dict[str, Thrift] = field(default_factory=dict)
    _lines: dict[str, Line] = field(default_factory=dict)

    def within(self, bound: float) -> Reuse:
        """The same networks and answers under another bound."""
        return replace(self, bound=bound)

    def ask(
        self, name: str, time: float, rows: Sequence[int], compute: Callable[[list[int]], list[Tensor]]
    ) -> list[Tensor]:
        """A network's answers for rows of the batch.

        Args:
            name: of the network.
            time: where the schedule stands.
            rows: of the whole batch.
            compute: asks the network for some of ``rows``, by their places in it.
        """
        line, thrift = self._lines.setdefault(name, Line(self.rows)), self.thrift.setdefault(name, Thrift())
        error = line.error(time, rows).tolist()
        open_ = [place for place, one in enumerate(error) if one > self.bound]
        thrift.asked, thrift.wanted = thrift.asked + len(open_), thrift.wanted + len(rows)
        thrift.error = max([thrift.error, *(one for one in error if one <= self.bound)])
        if open_:
            answers = compute(open_)
            line.learn(time, [rows[place] for place in open_], answers)
            if len(open_) == len(rows):
                return answers
        return line.foretell(time, rows)


def relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """``|found - wanted| / |wanted|`` of each row, over all tensors; 0 where both are 0."""
    miss = sum((a.float() - b.float()).flatten(1).square().sum(1) for a, b in zip(found, wanted, strict=True))
    size = sum(b.float().flatten(1).square().sum(1) for b in wanted)
    assert isinstance(miss, Tensor)
    assert isinstance(size, Tensor)
    return torch.where(miss == 0, 0.0, miss / size).sqrt()
