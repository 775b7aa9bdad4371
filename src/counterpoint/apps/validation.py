"""How closely a ControlNet follows its control on validation scenes: while it trains, and when it is done."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ControlNetModel

from counterpoint.api import load
from counterpoint.apps.readers import family_readers
from counterpoint.apps.record import write_json
from counterpoint.apps.suites import PipelineMaker, round_trip
from counterpoint.evaluation.suite import KINDS, Method
from counterpoint.evaluation.suites.tiny_quality import TinyQuality
from counterpoint.fusion.minimal_impact import BalancedInjection, trained_injection
from counterpoint.models.strength import strengthen
from counterpoint.recipes.family import STRENGTH
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.trainer import Validate
from counterpoint.types import Image

SCENES = 16
"""That a training run is measured on."""
STEPS = 20
STRENGTHS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
"""Factors that :func:`calibrate` tries for networks that are added."""
EITHER_WAY = (0.4, 0.5, 0.65, 0.8, *STRENGTHS[:4])
"""... and for those with a balanced injection, of which some are heard the better the smaller they are."""
ENOUGH = 0.01
"""Adherence that a stronger control has to bring to be preferred."""


class Adherence:
    """Adherence as ``evaluate tiny-quality`` has it, on the first ``n`` validation scenes.

    Args:
        family: its folder.
        kind: of control.
        n: scenes.
        judge: of the family, that reads.
        fusion: how the control is taken in.
    """

    def __init__(self, family: Path, kind: str, n: int, judge: str, fusion: str = "sum") -> None:
        self.kind, self.n = kind, n
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self._pipe, self._readers = load(str(family), device=device.type), family_readers(family, judge=judge)
        self._suite = TinyQuality(round_trip(self._pipe), "validation")
        self._tasks = [replace(task, method=Method(fusion=fusion)) for task in self._suite.controlled(n, kind)]
        self._finished: dict[str, Image] = {}

    @torch.no_grad()
    def __call__(self, network: ControlNetModel) -> dict[str, float]:
        """``value``, ``floor``, ``ceiling`` and ``adherence``."""
        self._pipe.controls[self.kind] = network.eval().to(self._pipe.device)
        if not self._finished:
            self._make("floor/")
        self._make(f"{self.kind}/")
        metrics = self._suite.adherence(self._finished.__getitem__, self.n, self.kind, self._readers)
        return {metric.name: metric.compute() for metric in metrics}

    def _make(self, prefix: str) -> None:
        wanted = [task for task in self._tasks if task.key.startswith(prefix)]
        pictures = PipelineMaker(self._pipe, STEPS, None)(wanted)
        self._finished.update(zip((task.key for task in wanted), pictures, strict=True))


def adherence(stage: ControlNetStage, family: Path) -> Validate | None:
    """What a training run is measured by while it goes on.

    Returns:
        ``None`` if the family has no judge, or none that reads this control.
    """
    kind = stage.field.removeprefix("control:")
    if kind not in KINDS or not (family / "judges" / "a").is_dir():
        return None
    inject = getattr(stage, "inject", None)
    measure = Adherence(family, kind, SCENES, "a", inject.rule if isinstance(inject, BalancedInjection) else "sum")

    def validate() -> dict[str, float]:
        found = measure(stage.merged())  # never the compiled one
        return {name: found[name] for name in ("value", "adherence")}

    return validate


def calibrate(run: Path, family: Path, kind: str, n: int = 64) -> float:
    """Find out how strong a ControlNet has to be at a conditioning scale of 1, and write it beside the network.

    See :mod:`counterpoint.models.strength`. The factor nearest to 1 is taken that the best does not surpass by
    :data:`ENOUGH`, as read by judge B: judge A only evaluates.
    """
    inject = trained_injection(ControlNetModel.from_pretrained(run, local_files_only=True))
    balanced = isinstance(inject, BalancedInjection)
    measure = Adherence(family, kind, n, "b", inject.rule if balanced else "sum")
    found = {}
    for strength in EITHER_WAY if balanced else STRENGTHS:
        network = ControlNetModel.from_pretrained(run, local_files_only=True)
        strengthen(network, strength)
        found[strength] = measure(network)["adherence"]
        print(f"{kind}: adherence {found[strength]:.3f} at strength {strength}", flush=True)
    enough = max(found.values()) - ENOUGH
    near = sorted(found, key=lambda one: abs(math.log(one)) if one else math.inf)
    strength = next(one for one in near if found[one] >= enough)
    write_json(run / STRENGTH, {"strength": strength, "adherence": found})
    return strength


def main() -> None:
    """``python -m counterpoint.apps.validation RUN FAMILY KIND [OUT]``: calibrate one ControlNet, and save it in
    ``OUT`` as strong as was found."""
    run, family, kind, *out = sys.argv[1:]
    strength = calibrate(Path(run), Path(family), kind)
    for place in out:
        network = ControlNetModel.from_pretrained(run, local_files_only=True)
        strengthen(network, strength)
        network.save_pretrained(place)


if __name__ == "__main__":
    main()
