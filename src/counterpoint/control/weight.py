"""How strongly a control speaks, over the schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from counterpoint.types import UserError


@dataclass(frozen=True)
class Weight:
    """A control's strength over the schedule: linear between ``(progress, weight)`` knots, constant outside them.

    ``parse("0.8")`` is constant; ``parse("0:1,0.5:0.4")`` falls from 1 at the start to 0.4 halfway and stays there.
    """

    knots: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        places = [place for place, _ in self.knots]
        if not all(math.isfinite(value) for knot in self.knots for value in knot):
            raise UserError(f"a weight must be a finite number, got {self}")
        if any(not 0 <= place <= 1 for place in places) or places != sorted(set(places)):
            raise UserError(f"the places of a weight schedule must rise within 0..1, got {self}")

    @classmethod
    def parse(cls, text: str | float) -> Weight:
        """Read ``0.8`` or ``0:1,0.5:0.4``.

        Raises:
            UserError: it is neither.
        """
        try:
            pairs = [part.split(":") for part in str(text).split(",")]
            if len(pairs) == 1 and len(pairs[0]) == 1:
                return cls(((0.0, float(pairs[0][0])),))
            return cls(tuple((float(place), float(weight)) for place, weight in pairs))
        except UserError:
            raise
        except ValueError:
            raise UserError(
                f"a weight is a number such as 0.8 or a schedule such as 0:1,0.5:0.4, got {text!r}"
            ) from None

    def at(self, progress: float) -> float:
        """The weight at a share of the steps, 0..1."""
        (before, value), *rest = self.knots
        for place, weight in rest:
            if progress < place:
                return (
                    value if progress <= before else value + (weight - value) * (progress - before) / (place - before)
                )
            before, value = place, weight
        return value

    @property
    def speaks(self) -> bool:
        """Whether it is anything but 0 throughout."""
        return any(value for _, value in self.knots)

    def __str__(self) -> str:
        if len(self.knots) == 1 and self.knots[0][0] == 0:
            return f"{self.knots[0][1]:g}"
        return ",".join(f"{place:g}:{weight:g}" for place, weight in self.knots)
