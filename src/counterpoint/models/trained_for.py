"""Which control a network was trained for, in its configuration, where stock diffusers takes no notice of it."""

from __future__ import annotations

from pathlib import Path

from diffusers import ConfigMixin

from counterpoint.types import UserError

_KIND = "_control_type"


def remember_kind(network: ConfigMixin, kind: str) -> None:
    """Let a network say what it was trained for, wherever it goes."""
    network.register_to_config(**{_KIND: kind})


def check_kind(network: ConfigMixin, kind: str, place: str | Path) -> None:
    """Hold a network from some place against the kind of control that it is to serve; one that says nothing will do.

    Raises:
        UserError: it was trained for another one.
    """
    told = network.config.get(_KIND, kind)
    if told != kind:
        raise UserError(f"{place} was trained for {told}, and is asked for {kind}")
