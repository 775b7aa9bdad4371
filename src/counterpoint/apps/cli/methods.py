"""What ``evaluate`` compares, from its options."""

from __future__ import annotations

import json
import math
from pathlib import Path

from counterpoint.apps.cli.values import pairs
from counterpoint.evaluation.suite import REFERENCE, Method
from counterpoint.fusion import FUSIONS, get_fusion
from counterpoint.fusion.minimal_impact import INJECTION, BalancedInjection
from counterpoint.sampling.amdm import Aggregation
from counterpoint.sampling.economy import known_quality
from counterpoint.types import UserError


def methods_asked(
    fusion: list[str] | None,
    sweep: str | None,
    weight: list[str] | None,
    gate_silence: bool,
    quality: list[str],
    steer: list[str],
    versus: list[str],
) -> list[Method]:
    """Every rule with every weight, gate, quality, push and set of networks; networks that were trained with an
    injection go with its rule.

    Raises:
        UserError: one makes no sense.
    """
    for level in quality:
        known_quality(level)
    rules = [get_fusion(name).name for name in fusion or (["sum"] if sweep else FUSIONS)]
    fixed = {name: _number("--weight", name, value) for name, value in pairs("--weight", weight).items()}
    gates = [False, True] if gate_silence else [False]
    methods = [
        Method(rule, {**fixed, **swept}, gated, level, push, networks)
        for networks in ((), *map(_networks, versus))
        for rule in dict.fromkeys(_own_rules(networks) or rules)
        for swept in (_weights(sweep) if sweep else [{}])
        for gated in gates
        for level in dict.fromkeys(quality)
        for push in ({}, *map(_pushes, steer))
    ]
    return _unlike(methods, "rename a folder of --versus")


def _networks(text: str) -> tuple[tuple[str, str], ...]:
    """``canny=A,pose=B`` -> the networks that a method has in place of the model's."""
    return tuple(pairs("--versus", text.split(",")).items())


def _pushes(text: str) -> dict[str, float]:
    """``pose=0.05,seg=0.05`` -> how far every step is pushed towards each."""
    return {name: _number("--steer", name, value) for name, value in pairs("--steer", text.split(",")).items()}


def _own_rules(networks: tuple[tuple[str, str], ...]) -> list[str]:
    """The rule by which networks were trained to be taken in, if they were."""
    rules = []
    for _, place in networks:
        try:
            config = json.loads((Path(place) / "config.json").read_text())
            rules += [BalancedInjection(**config[INJECTION]).rule] if INJECTION in config else []
        except (OSError, ValueError, TypeError):
            raise UserError(f"--versus {place}: there is no ControlNet of diffusers' layout") from None
    return rules


def models_asked(names: list[str], settings: list[str], weight: list[str] | None) -> list[Method]:
    """Every list of models with every setting that it can have.

    Raises:
        UserError: a setting makes no sense, or something else is weighed than the reference.
    """
    for one in settings:
        Aggregation.parse(one)
    weights = {name: _number("--weight", name, value) for name, value in pairs("--weight", weight).items()}
    if others := weights.keys() - {REFERENCE}:
        raise UserError(f"--weight {min(others)}: layout and style weigh the reference alone, --weight {REFERENCE}=0.8")
    lists = [tuple(name.strip() for name in one.split(",")) for one in names]
    methods = [Method(models=models, weights=weights, aggregation=how) for models in lists
               for how in (settings if len(models) > 1 else [""])]  # fmt: skip
    return _unlike(methods, "give each once")


def _unlike(methods: list[Method], advice: str) -> list[Method]:
    names = [method.name for method in methods]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two of what is compared would be called {min(twice)!r}: {advice}")
    return methods


def _number(option: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{option} {name} wants a number, got {value!r}")
    return number


def _weights(sweep: str) -> list[dict[str, float]]:
    """``pose=0:1.5:0.25`` -> one weight after the other, both ends included."""
    name, _, values = sweep.partition("=")
    try:
        first, last, step = (float(value) for value in values.split(":"))
    except ValueError:
        raise UserError(f"--sweep wants NAME=FROM:TO:STEP such as pose=0:1.5:0.25, got {sweep!r}") from None
    if not (all(map(math.isfinite, (first, last, step))) and step > 0 and first < last and (last - first) / step < 100):
        raise UserError(f"--sweep {sweep}: FROM is less than TO, STEP is positive and leaves fewer than 100 weights")
    return [{name: round(first + i * step, 6)} for i in range(int((last - first) / step + 1e-9) + 1)]
