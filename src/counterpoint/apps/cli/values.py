"""Options that give a value to each of several names."""

from __future__ import annotations

from counterpoint.types import UserError, kind_of


def pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """``NAME=VALUE`` arguments as a dictionary.

    Raises:
        UserError: one has no ``=``, or a name comes twice.
    """
    result: dict[str, str] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} wants NAME=VALUE, got {text!r}")
        if name in result:
            raise UserError(f"{option} {name}=... is given twice; name the second one {kind_of(name)}:SOMETHING")
        result[name] = value
    return result


def window_of(name: str, text: str | None) -> tuple[float, float]:
    """``START:END``; ``None`` is the whole schedule.

    Raises:
        UserError: it is not of that form.
    """
    try:
        start, end = (text or "0:1").split(":")
        return float(start), float(end)
    except ValueError:
        raise UserError(f"--window {name}={text}: a window is START:END such as 0:0.6") from None
