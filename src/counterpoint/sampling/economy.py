"""Quality levels: what a run may foretell in place of computing it (ours).

``exact`` computes everything. The others foretell the residuals of ControlNets within a bound of their estimated error,
and at fixed steps hold the difference that guidance amplifies (Ho and Salimans 2022, arXiv:2207.12598), so that the
host runs on half of the batch there. That difference changes too much from step to step for a bound; a line through
its last two values misses more than the last one does. Where it is held nothing multiplies an error: there the bound is
wider, and the host's encoder is foretold too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from counterpoint.control.reuse import Reuse, Thrift, relative
from counterpoint.types import Moment, UserError


@dataclass(frozen=True)
class Quality:
    """A level.

    Attributes:
        summary: one line for help and menus.
        bound: estimated relative error up to which a control's residuals are foretold, and the encoder's features in a
            run without guidance; ``None`` computes everything.
        guidance_every: the difference between the guided batch's halves is computed at every so many steps.
    """

    summary: str
    bound: float | None = None
    guidance_every: int = 1

    def holds_guidance(self, index: int, total: int, known: int) -> bool:
        """Whether a step holds the difference, where it was computed at so many times before; never the last one."""
        return known >= _FIRST and index != total - 1 and (index - _FIRST) % self.guidance_every != 0


LOOSER = 2.0
"""Times the bound is where guidance is held."""
_ALWAYS = -1.0
_FIRST = 3
"""Times at which guidance is always computed, the first ones. Some schedulers ask twice at one time."""
QUALITIES = {
    "exact": Quality("everything is computed"),
    "balanced": Quality("controls foretold to an estimated 20 %, guidance computed at every other step", 0.2, 2),
    "fast": Quality("controls foretold to an estimated 40 %, guidance computed at every third step", 0.4, 3),
}
GUIDANCE, ENCODER = "guidance", "encoder of the UNet"


def known_quality(name: str) -> Quality:
    """The level of a name.

    Raises:
        UserError: there is none.
    """
    if name not in QUALITIES:
        raise UserError(f"unknown quality {name!r}; there are {', '.join(QUALITIES)}")
    return QUALITIES[name]


class Economy:
    """What one run keeps to foretell from.

    Args:
        quality: the level.
        count: pictures.
        guided: whether every step has an unconditional half.

    Attributes:
        controls: whether guidance is held -> what foretells the controls.
        encoder: likewise the host's encoder.
    """

    def __init__(self, quality: Quality, count: int, guided: bool) -> None:
        assert quality.bound is not None
        self.quality, self.count = quality, count
        bound, rows = quality.bound, count * (2 if guided else 1)
        self._answers = Reuse(bound, rows)
        self.controls = {False: self._answers, True: self._answers.within(LOOSER * bound)}
        self.encoder = {False: self._answers.within(_ALWAYS if guided else bound), True: self.controls[True]}
        self._guidance = Thrift()
        self._held: Tensor | None = None
        self._change = 0.0
        self._known: set[float] = set()

    @property
    def thrift(self) -> dict[str, Thrift]:
        """Control, encoder or ``guidance`` -> what was saved."""
        guidance = {GUIDANCE: self._guidance} if self._guidance.wanted else {}
        return {**self._answers.thrift, **guidance}

    def skips_guidance(self, moment: Moment) -> bool:
        """Whether a step's guidance is held; the same steps for every picture."""
        return self.quality.holds_guidance(moment.index, moment.total, len(self._known))

    def difference(self) -> Tensor:
        """The difference between conditional and unconditional prediction, as it was computed last. Its error is
        estimated as what the last two that were computed differ by."""
        assert self._held is not None
        self._guidance.wanted += self.count
        self._guidance.error = max(self._guidance.error, self._change)
        return self._held

    def learn(self, moment: Moment, difference: Tensor) -> None:
        """Take in a computed difference."""
        self._guidance.asked += self.count
        self._guidance.wanted += self.count
        if self._held is not None and moment.time not in self._known:
            self._change = float(relative([self._held], [difference]).max())
        self._known.add(moment.time)
        self._held = difference
