"""Which small change makes a picture follow its controls better: a few cheap variants, tried and measured (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.apps.run import Result, run
from counterpoint.control.weight import Weight
from counterpoint.evaluation.suite import stack, unstack
from counterpoint.metrics.agreement import agreement
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import Image, kind_of, meaning

Maps = Mapping[str, Callable[[Tensor], Tensor]]
FEWEST = 6
"""Steps of a trial at least; else a third of the request's."""
NOISE = 0.01
"""A change of agreement below this is none."""


@dataclass(frozen=True)
class Reading:
    """A control read back from a picture, and how well it agrees with the one that was asked for, 0..1."""

    image: PIL.Image.Image
    agreement: float


@dataclass(frozen=True)
class Trial:
    """A variant of a request, as the options that make it (none for the request itself), and what came of it."""

    options: str
    followed: dict[str, float]

    @property
    def worst(self) -> float:
        """Agreement of the control that is followed least."""
        return min(self.followed.values())


@torch.no_grad()
def read_back(result: Result, maps: Maps, image: int = 0) -> dict[str, Reading]:
    """Every control of a result that a reader can read, from one of its pictures."""
    picture = stack([_array(result.images[image])])
    readings = {}
    for label, wanted in result.controls.items():
        kind = kind_of(label)
        if kind in maps:
            found = maps[kind](picture)
            score = float(agreement(kind, found, stack([wanted])))
            readings[label] = Reading(PIL.Image.fromarray(unstack(found)[0]), score)
    return readings


def tune(
    request: GenerateRequest,
    pipe: Pipeline,
    maps: Maps,
    count: int,
    listen: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """Try variants of a request, at few steps and the same seed; the request itself comes first.

    Args:
        request: what to improve.
        pipe: its pipeline.
        maps: what reads controls back.
        count: variants at most.
        listen: hears ``(trials done, trials in all)``.
    """
    cheap = request.model_copy(update={"steps": min(request.steps, max(FEWEST, request.steps // 3)), "n": 1})
    first = run(cheap, pipe, report=True)
    followed = _followed(first, maps)
    assert first.report is not None
    trials = [Trial("", followed)]
    tried = variants(cheap, first.report.shares(), followed)[:count]
    for number, (options, variant) in enumerate(tried):
        trials.append(Trial(options, _followed(run(variant, pipe), maps)))
        if listen is not None:
            listen(number + 1, len(tried))
    return trials


def advice(request: GenerateRequest, heard: Mapping[str, float], readings: Mapping[str, Reading]) -> list[str]:
    """What might help the control that is followed least, untried; nothing where nobody could be read back.

    Args:
        request: what was made.
        heard: control -> its share of what the model heard.
        readings: controls as they were read back.
    """
    if not readings:
        return []
    followed = {label: reading.agreement for label, reading in readings.items()}
    least = min(followed, key=lambda label: followed[label])
    options = ", or ".join(options for options, _ in variants(request, heard, followed))
    return [
        f"{least} is followed least: {followed[least]:.2f} of 1, and {100 * heard[least]:.0f} % of what was heard. "
        f"Worth trying: {options}. --tune {FEWEST} tries them."
    ]


def variants(
    request: GenerateRequest, heard: Mapping[str, float], followed: Mapping[str, float]
) -> list[tuple[str, GenerateRequest]]:
    """What might help, the likeliest first: other rules, gated silence, the least followed control louder, the loudest
    one shorter or softer.

    Args:
        request: what is to be improved.
        heard: control -> its share of what the model heard.
        followed: control -> agreement, of those that can be read.
    """
    made: list[tuple[str, GenerateRequest]] = []
    told = bool(request.subject or request.subject_mask)
    for rule in ("cross", "pix+channel", "mgda") if told else ("pix+channel", "mgda"):
        if len(request.controls) > 1 and rule != request.fusion:
            silent = {} if rule == "cross" else {"foreground": (), "subject": (), "subject_mask": ()}
            options = f"--fusion {rule}" + (" without --subject" if told and silent else "")
            made.append((options, request.model_copy(update={"fusion": rule, **silent})))
    kinds = [meaning(control.kind) for control in request.controls]
    if not request.gated and any(kind.silent is not None for kind in kinds):
        made.append(("--gate-silence", request.model_copy(update={"gate_silence": True})))
    least = min(followed, key=lambda label: followed[label])
    loudest = max((label for label in heard if label != least), key=lambda label: heard[label], default=None)
    made.append(_weighted(request, least, 1.5))
    if loudest is not None:
        start, end = next(control.window for control in request.controls if control.label == loudest)
        end = round(start + 0.6 * (end - start), 3)
        made.append((f"--window {loudest}={start:g}:{end:g}", _changed(request, loudest, window=(start, end))))
        made.append(_weighted(request, loudest, 0.6))
    return made


def verdict(trials: Sequence[Trial]) -> str:
    """One sentence: which options helped the control that is followed least, without harming another as much."""
    base = trials[0]

    def gain(trial: Trial) -> float:
        """What the worst control gains, less what any control loses."""
        loss = max(0.0, *(before - trial.followed[label] for label, before in base.followed.items()))
        return trial.worst - base.worst - loss

    helped = sorted((trial for trial in trials[1:] if gain(trial) > NOISE), key=gain, reverse=True)
    if not helped:
        return f"nothing that was tried helped: the worst control keeps {base.worst:.2f}"
    return "helped: " + "; ".join(f"{trial.options} ({base.worst:.2f} to {trial.worst:.2f})" for trial in helped)


def _followed(result: Result, maps: Maps) -> dict[str, float]:
    return {label: reading.agreement for label, reading in read_back(result, maps).items()}


def _weighted(request: GenerateRequest, label: str, factor: float) -> tuple[str, GenerateRequest]:
    (control,) = (one for one in request.controls if one.label == label)
    weight = Weight(tuple((place, round(value * factor, 3)) for place, value in Weight.parse(control.weight).knots))
    return f"--weight {label}={weight}", _changed(request, label, weight=str(weight))


def _changed(request: GenerateRequest, label: str, **changes: object) -> GenerateRequest:
    def change(control: ControlRequest) -> ControlRequest:
        return control.model_copy(update=changes) if control.label == label else control

    return request.model_copy(update={"controls": tuple(change(control) for control in request.controls)})


def _array(picture: PIL.Image.Image) -> Image:
    return np.array(picture.convert("RGB"))
