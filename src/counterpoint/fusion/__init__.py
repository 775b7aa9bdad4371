"""Fusion rules: pure tensor operators, one paper a file, and the one table of them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from counterpoint.fusion.add import add, largest, mean
from counterpoint.fusion.cross import authors_exchange, channel_fusion, pix_fusion
from counterpoint.fusion.maxfusion import maxfusion, maxfusion_exchange
from counterpoint.fusion.minimal_impact import CAP, BalancedInjection, Granularity, Reading, balanced_combination
from counterpoint.types import Combine, Fusion, Keys, UserError


def _mgda(reading: Reading = "min-norm", granularity: Granularity = "sample") -> Fusion:
    """Min-norm by default: it is what MGDA means, and opposes no branch. Where a branch is silent it wipes out the
    others, and ``literal`` keeps them."""
    combine = balanced_combination(reading, granularity=granularity)
    return Fusion(
        "mgda",
        "the convex combination that opposes no branch, at a sum's scale",
        combine,
        cite=("minimal-impact", "mgda"),
    )


def _minimal_impact(
    combination: Reading = "literal",
    injection: Reading = "literal",
    granularity: Granularity = "sample",
    cap: float = CAP,
) -> Fusion:
    """Literal by default, the equations as the paper prints them: a silent branch takes nothing from the others."""
    return Fusion(
        "minimal-impact",
        "balanced combination and injection, for ControlNets that were trained with it",
        balanced_combination(combination, total_scale=1, granularity=granularity),
        inject=BalancedInjection(injection, cap, granularity),
        cite=("minimal-impact", "mgda"),
    )


def _pix(delta: float = 0.7) -> Fusion:
    return Fusion("pix", "at each place the branch that varies most", pix_fusion(delta), cite=("cross-controlnet",))


def _channel(delta: float = 0.7) -> Fusion:
    return Fusion("channel", "of each channel the stronger branch", channel_fusion(delta), cite=("cross-controlnet",))


def _pix_channel(delta: float = 0.7, delta2: float = 0.7) -> Fusion:
    summary = "pix, and channel at the last site"
    return Fusion(
        "pix+channel", summary, pix_fusion(delta), {"last": channel_fusion(delta2)}, cite=("cross-controlnet",)
    )


def _cross(
    delta: float = 0.7, delta2: float = 0.7, start: float = 0.1, layer: int = 0, sigma: float = math.inf
) -> Fusion:
    return Fusion(
        "cross",
        "pix+channel, and the foreground lends its keys and values",
        pix_fusion(delta),
        {"last": channel_fusion(delta2)},
        keys=Keys(start, layer, sigma),
        cite=("cross-controlnet",),
    )


def _cross_authors(
    delta: float = 0.7, delta2: float = 0.7, start: float = 0.1, layer: int = 0, sigma: float = math.inf
) -> Fusion:
    return Fusion(
        "cross-authors",
        "cross as its authors' code joins features, with an exchange between the branches",
        pix_fusion(delta, authors=True),
        {"last": channel_fusion(delta2, authors=True)},
        exchange=authors_exchange(delta),
        exchange_skips=False,
        keys=Keys(start, layer, sigma),
        cite=("cross-controlnet", "maxfusion"),
    )


RULES: dict[str, Callable[..., Fusion]] = {
    "sum": lambda: Fusion("sum", "add the branches, as every tool does", add, cite=("controlnet",)),
    "mean": lambda: Fusion("mean", "average the branches", mean, cite=("controlnet",)),
    "max": lambda: Fusion("max", "of every number the largest", largest, cite=("controlnet",)),
    "mgda": _mgda,
    "minimal-impact": _minimal_impact,
    "maxfusion": lambda: Fusion(
        "maxfusion",
        "at each place the branch of larger variance, also between the branches",
        maxfusion,
        exchange=maxfusion_exchange,
        cite=("maxfusion",),
    ),
    "pix": _pix,
    "channel": _channel,
    "pix+channel": _pix_channel,
    "cross": _cross,
    "cross-authors": _cross_authors,
}
"""Name -> what builds the rule from its settings."""
FUSIONS = {name: build() for name, build in RULES.items()}
"""Name -> rule at its defaults. Command line, studio, tests, citations and docs follow from this table."""


FLUX_DELTA = 0.5
"""The paper's threshold of the correlation in FLUX (Cross-ControlNet, appendix A.5)."""
_CORRELATING = ("pix", "pix+channel", "cross", "cross-authors")


def get_fusion(name: str | Fusion | Combine, delta: float | None = None) -> Fusion:
    """The rule of a name: ``cross``, with settings ``cross:delta=0.5``, over the schedule ``0:cross,0.5:sum``; a rule
    as it is; or one of your own from any function ``(n, b, c, h, w) -> (b, c, h, w)``.

    Args:
        name: of the rule.
        delta: threshold of PixFusion's correlation where the name sets none; default the rule's own.

    Raises:
        UserError: there is none, or it has no such setting or value; the message lists those there are.
    """
    if isinstance(name, Fusion):
        return name
    if callable(name):
        return Fusion(getattr(name, "__name__", "custom"), "a function of the caller's", name)
    if not isinstance(name, str):
        raise UserError(f"a fusion is the name of a rule, a rule or a function; got {name!r}")
    if not _STAGE.match(name):
        return _rule(name, delta)
    _, *parts = _STAGE.split(name)
    starts, rules = [float(start) for start in parts[::2]], [_rule(part, delta) for part in parts[1::2]]
    if starts[0] != 0 or starts[-1] >= 1 or starts != sorted(set(starts)):
        raise UserError(f"the starts of a schedule of fusions rise from 0 and stay below 1, got {name}")
    return replace(
        rules[0],
        name=name,
        summary="; then ".join(rule.summary for rule in rules),
        keys=next((rule.keys for rule in rules if rule.keys), None),
        cite=tuple(dict.fromkeys(key for rule in rules for key in rule.cite)),
        stages=tuple(zip(starts, rules, strict=True)),
    )


_STAGE = re.compile(r"(?:^|,)(\d*\.?\d+):")


def _rule(name: str, delta: float | None) -> Fusion:
    base, _, text = name.partition(":")
    if base not in RULES:
        raise UserError(f"unknown fusion {base!r}; there are {', '.join(RULES)}")
    settings = {} if delta is None or base not in _CORRELATING else {"delta": delta}
    if not text and not settings:
        return FUSIONS[base]
    settings |= dict(_setting(base, part) for part in text.split(",") if text)
    return replace(RULES[base](**settings), name=name)


def _setting(rule: str, text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    hints = {k: v for k, v in get_type_hints(RULES[rule]).items() if k in inspect.signature(RULES[rule]).parameters}
    if key not in hints:
        raise UserError(f"the fusion {rule} has no setting {key!r}; it has {', '.join(hints) or 'none'}")
    if choices := get_args(hints[key]):
        if value in choices:
            return key, value
        raise UserError(f"the setting {key} of {rule} is one of {', '.join(choices)}, got {value!r}")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (hints[key] is int and not number.is_integer()):
        kind = "a whole number" if hints[key] is int else "a number"
        raise UserError(f"the setting {key} of {rule} is {kind}, got {value!r}")
    return key, hints[key](number)
