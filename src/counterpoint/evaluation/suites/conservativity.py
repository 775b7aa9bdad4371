"""Conservativity: is what a ControlNet adds the gradient of something?

Asym and NAsym of the Jacobian that goes through the ControlNet (Chao et al. 2022, arXiv:2209.12753; Minimal Impact
ControlNet, ICLR 2025, section 5.2.1), on noisy real pictures, in units of predicted noise. A network that was trained
with an injection is measured with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from counterpoint.control.influence import influence, trained_injection
from counterpoint.data.pairs import Case
from counterpoint.evaluation.suite import KINDS, Finished, Method, Readers, Row, Task, stack
from counterpoint.evaluation.suites.fusion import Cases
from counterpoint.metrics.conservativity import asym, asymmetry, normalised_asym
from counterpoint.metrics.metric import Metric
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.prompt import PromptEncoder
from counterpoint.sampling.schedulers import make_scheduler

_CHUNK = 8
"""Cases at a time: second derivatives take much memory."""


@dataclass(frozen=True, eq=False)
class Conservativity:
    """A model's ControlNets, and pictures to look at them on. It makes no pictures."""

    pipe: Pipeline
    cases: Cases

    def tasks(self, n: int, _: Sequence[Method] = ()) -> list[Task]:
        """None."""
        del n
        return []

    def score(self, _: Finished, n: int, __: Sequence[Method], ___: Readers) -> list[Row]:
        """A row a control."""
        return [Row(kind, "noisy pictures", self._measure(kind, n)) for kind in KINDS if kind in self.pipe.controls]

    def _measure(self, kind: str, n: int) -> tuple[Metric, ...]:
        metrics = [Metric(name, lambda rows: rows, reduce, higher=False)
                   for name, reduce in (("asym", asym), ("nasym", normalised_asym))]  # fmt: skip
        for start in range(0, n, _CHUNK):
            numbers = range(start, min(start + _CHUNK, n))
            rows = self._rows(kind, [self.cases.alone(number, kind) for number in numbers], numbers)
            for metric in metrics:
                metric.update(rows)
        return tuple(metrics)

    def _rows(self, kind: str, cases: Sequence[Case], seeds: Sequence[int]) -> Tensor:
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
        network = pipe.controls[kind]
        field = influence(pipe.unet, network, hint, text, timestep, latents, trained_injection(network))
        with sdpa_kernel(SDPBackend.MATH):
            return asymmetry(field, latents, probe)
