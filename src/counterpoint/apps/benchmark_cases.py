"""What is timed: rules at the sites of a step, and pictures by models that work together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from counterpoint.api import aggregate, load
from counterpoint.apps.benchmark import Case
from counterpoint.apps.benchmark_models import SHIPPED, added, make_model
from counterpoint.conditions.layout import Instance, Layout, Reference
from counterpoint.control.keys import Lending
from counterpoint.control.sites import fuse
from counterpoint.control.stack import Branch
from counterpoint.fusion import FUSIONS
from counterpoint.sampling.denoise import ControlledDenoiser
from counterpoint.sampling.floor import Operations
from counterpoint.types import Fusion, Moment, UserError


@dataclass(frozen=True)
class Comparison:
    """What is timed, what the others are compared with, and for cases whose operations are not torch's, what these are
    by what the case made."""

    cases: dict[str, Case]
    baseline: str
    unseen: dict[str, Callable[[Any], Operations]] = field(default_factory=dict)


def chosen(cases: Mapping[str, Case], only: Sequence[str], baseline: str) -> dict[str, Case]:
    """The cases of these names, all if there are none, and the baseline.

    Raises:
        UserError: one is not there.
    """
    if unknown := [name for name in only if name not in cases]:
        raise UserError(f"--only {unknown[0]!r}: there are {', '.join(map(repr, cases))}")
    return {name: case for name, case in cases.items() if not only or name in (*only, baseline)}


def fusion_cases(size: str, device: torch.device, dtype: torch.dtype) -> Comparison:
    """Every rule's operator at every site of a guided step with two controls, beside whole steps.

    Args:
        size: of the models.
        device: where.
        dtype: of the models.

    Raises:
        UserError: there is no room for them.
    """
    pipe = make_model(size, device, dtype)
    unet, networks, factor = pipe.unet, list(pipe.controls.values()), pipe.factor
    text, side = int(pipe.tokenizer.model_max_length), pipe.native_size // factor
    more = added(pipe, 2, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    half = torch.zeros(1, 1, side, side, device=device)
    half[..., side // 2 :] = 1
    branches = [
        Branch(name, network, noise(2, 3, side * factor, side * factor))
        for name, network in zip("ab", networks, strict=True)
    ]
    latents, moment = noise(1, unet.config["in_channels"], side, side), Moment(10, 20, torch.tensor(500, device=device))
    texts = noise(1, text, unet.config["cross_attention_dim"]), noise(1, text, unet.config["cross_attention_dim"])

    def step(rule: Fusion) -> Case:
        lending = Lending({}, {"a": half}) if rule.keys else None
        denoise = ControlledDenoiser(unet, branches, rule, *texts, 7.5, lending, added=more)
        return torch.no_grad()(lambda: denoise(latents, moment))

    with torch.no_grad():
        down, mid = networks[0](
            noise(2, *latents.shape[1:]),
            500,
            torch.cat(texts),
            branches[0].hint,
            added_cond_kwargs=more,
            return_dict=False,
        )
    said = {branch.name: [noise(*site.shape) for site in (*down, mid)] for branch in branches}

    def operator(rule: Fusion) -> Case:
        return torch.no_grad()(lambda: fuse(rule, said))

    steps = ("sum", "pix+channel", "cross", "minimal-impact", "maxfusion", "cross-authors")
    operators = {f"operator {name}": operator(rule) for name, rule in FUSIONS.items()}
    whole = {f"step {name}": step(FUSIONS[name]) for name in steps}
    return Comparison(whole | operators, "step sum")


def aggregate_cases(size: str, device: torch.device, dtype: torch.dtype) -> Comparison:
    """A picture in 50 steps by a model alone, and with each helper in the first three of them.

    Raises:
        UserError: another size than tiny, whose pictures take seconds.
    """
    if size != SHIPPED:
        raise UserError("benchmark aggregate makes whole pictures: --size tiny")
    pipe = load("tiny", scheduler="ddim", device=str(device), dtype=dtype)
    models = {name: pipe.adapted(name) for name in ("interact", "migc", "style")}
    things = tuple(
        Instance(phrase, (x, 0.4, x + 0.2, 0.9))
        for phrase, x in (("a person", 0.0), ("a red ball", 0.25), ("a blue box", 0.5), ("a green cone", 0.75))
    )
    layout = Layout(things, reference=Reference(np.zeros((128, 128, 3), np.uint8)))

    def picture(*names: str) -> Case:
        chosen = [models[name] for name in names]
        made = chosen[0] if len(chosen) == 1 else aggregate(chosen, steps=3)
        return lambda: made(
            "a person and a red ball, a blue box and a green cone",
            layout=layout,
            num_inference_steps=50,
            generator=torch.Generator().manual_seed(0),
        )

    several = (("interact",), ("interact", "migc"), ("interact", "style"), tuple(models))
    return Comparison({" + ".join(names): picture(*names) for names in several}, "interact")
