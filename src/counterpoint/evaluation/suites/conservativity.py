"""Conservativity: is what a ControlNet adds the gradient of something?

Asym and NAsym of the Jacobian that goes through the ControlNet (Chao et al. 2022, arXiv:2209.12753; Minimal Impact
ControlNet, ICLR 2025, section 5.2.1), on noisy real pictures, in units of predicted noise. A network that was trained
with an injection is measured with it. All of them are measured as strong as they were trained: Asym grows with the
square of a strength and more, so that strengthened networks could not be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from counterpoint.control.influence import influence
from counterpoint.data.pairs import Case
from counterpoint.evaluation.suite import KINDS, Finished, Method, Readers, Row, Task, stack
from counterpoint.evaluation.suites.fusion import Cases
from counterpoint.fusion.minimal_impact import trained_injection
from counterpoint.metrics.conservativity import asym, asymmetry, normalised_asym
from counterpoint.metrics.metric import Metric
from counterpoint.models.strength import strength_of, strengthen
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.prompt import PromptEncoder
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.types import UserError

_CHUNK = 8
"""Cases at a time: second derivatives take much memory."""


@dataclass(frozen=True, eq=False)
class Conservativity:
    """A model's ControlNets, and pictures to look at them on. It makes no pictures.

    ``network`` loads the networks that methods have in place of the model's.

    Raises:
        UserError: the model predicts something else than the noise, whose Jacobian has other units.
    """

    pipe: Pipeline
    cases: Cases
    network: Callable[[str], ControlNetModel]

    def __post_init__(self) -> None:
        if (predicted := self.pipe.scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
            raise UserError(f"conservativity wants a model that predicts the noise; this one predicts {predicted}")

    def tasks(self, n: int, _: Sequence[Method] = ()) -> list[Task]:
        """None."""
        del n
        return []

    def score(self, _: Finished, n: int, methods: Sequence[Method], __: Readers) -> list[Row]:
        """A row a control of the model, or a network that a method has in its place."""
        own = {kind: (kind, self.pipe.controls[kind]) for kind in KINDS if kind in self.pipe.controls}
        others = {
            f"{kind} of {Path(place).name}": (kind, self.network(place))
            for kind, place in (one for method in methods for one in method.networks)
        }
        asked = {kind for kind, _ in others.values()}
        own = {kind: one for kind, one in own.items() if kind in asked or not asked}
        return [Row(name, "noisy pictures", self._measure(*one, n)) for name, one in {**own, **others}.items()]

    def _measure(self, kind: str, network: ControlNetModel, n: int) -> tuple[Metric, ...]:
        if (strength := strength_of(network)) != 1:
            strengthen(network := copy.deepcopy(network), 1 / strength)
        metrics = [Metric(name, lambda rows: rows, reduce, higher=False)
                   for name, reduce in (("asym", asym), ("nasym", normalised_asym))]  # fmt: skip
        for start in range(0, n, _CHUNK):
            numbers = range(start, min(start + _CHUNK, n))
            rows = self._rows(kind, network, [self.cases.alone(number, kind) for number in numbers], numbers)
            for metric in metrics:
                metric.update(rows)
        return tuple(metrics)

    def _rows(self, kind: str, network: ControlNetModel, cases: Sequence[Case], seeds: Sequence[int]) -> Tensor:
        """Noise, its level and the probe are each case's own, drawn with its seed."""
        pipe = self.pipe
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        clean = pipe.encode(stack([case.photos[kind] for case in cases]) * 2 - 1, generators)
        process = make_scheduler("ddpm", pipe.scheduler.config)
        levels = int(process.config["num_train_timesteps"])
        timestep = torch.cat([torch.randint(levels, (1,), generator=one) for one in generators]).to(clean.device)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=one) for one in generators]).to(clean)
        probe = torch.stack([torch.randint(2, clean.shape[1:], generator=one) for one in generators]).to(clean) * 2 - 1
        latents = process.add_noise(clean, noise, timestep)
        text = PromptEncoder([pipe.tokenizer], [pipe.text_encoder])([case.prompt for case in cases]).embeddings
        hint = stack([case.images[kind] for case in cases]).to(clean)
        field = influence(pipe.unet, network, hint, text, timestep, latents, trained_injection(network))
        with sdpa_kernel(SDPBackend.MATH):
            return asymmetry(field, latents, probe)
