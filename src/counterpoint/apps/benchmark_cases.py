"""What is timed: rules at the sites of a step, and pictures by models that work together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from counterpoint.api import DTYPES, aggregate, load
from counterpoint.apps.benchmark import Case
from counterpoint.conditions.layout import Instance, Layout, Reference
from counterpoint.control.keys import Lending
from counterpoint.control.sites import fuse
from counterpoint.control.stack import Branch
from counterpoint.fusion import FUSIONS
from counterpoint.models.load import load_components, load_controls
from counterpoint.sampling.denoise import ControlledDenoiser
from counterpoint.sampling.plan import floor
from counterpoint.types import Fusion, Moment, UserError

SHIPPED = "tiny"
"""The size whose whole pictures and training steps take seconds."""
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
"""What Stable Diffusion 1.5 sets beyond the defaults of diffusers' UNet."""


@dataclass(frozen=True)
class Comparison:
    """What is timed, what the others are compared with, the seconds below which a case cannot fall, and the number
    formats whose rates these come from."""

    cases: dict[str, Case]
    baseline: str
    floors: dict[str, float] = field(default_factory=dict)
    floored: tuple[str, ...] = ()


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
        size: one of :data:`SIZES`.
        device: where.
        dtype: of the models.
    """
    models = SIZES[size]()
    unet, *networks = (model.eval().to(device, dtype) for model in (models.unet, *models.controls))
    text, side = models.text, models.side
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    half = torch.zeros(1, 1, side, side, device=device)
    half[..., side // 2 :] = 1
    factor = 8
    branches = [
        Branch(name, network, noise(2, 3, side * factor, side * factor))
        for name, network in zip("ab", networks, strict=True)
    ]
    latents, moment = noise(1, unet.config["in_channels"], side, side), Moment(10, 20, torch.tensor(500, device=device))
    texts = noise(1, text, unet.config["cross_attention_dim"]), noise(1, text, unet.config["cross_attention_dim"])

    def step(rule: Fusion) -> Case:
        lending = Lending({}, {"a": half}) if rule.keys else None
        denoise = ControlledDenoiser(unet, branches, rule, *texts, 7.5, lending)
        return torch.no_grad()(lambda: denoise(latents, moment))

    with torch.no_grad():
        down, mid = networks[0](
            noise(2, *latents.shape[1:]), 500, torch.cat(texts), branches[0].hint, return_dict=False
        )
    said = {branch.name: [noise(*site.shape) for site in (*down, mid)] for branch in branches}

    def operator(rule: Fusion) -> Case:
        return torch.no_grad()(lambda: fuse(rule, said))

    steps = ("sum", "pix+channel", "cross", "minimal-impact", "maxfusion", "cross-authors")
    operators = {f"operator {name}": operator(rule) for name, rule in FUSIONS.items()}
    whole = {f"step {name}": step(FUSIONS[name]) for name in steps}
    floors = {name: floor(case, device, dtype) for name, case in operators.items()}
    return Comparison(whole | operators, "step sum", floors, tuple(name for name in DTYPES if DTYPES[name] == dtype))


@dataclass(frozen=True, eq=False)
class _Models:
    """A UNet, two ControlNets, the length of a prompt and the side of the latents."""

    unet: UNet2DConditionModel
    controls: list[ControlNetModel]
    text: int
    side: int


def _shipped() -> _Models:
    parts = load_components("tiny")
    controls = list(load_controls("tiny", ["pose", "seg"], parts).values())
    return _Models(parts.unet, controls, int(parts.tokenizer.model_max_length), int(parts.unet.config.sample_size))


def outspoken(network: ControlNetModel) -> ControlNetModel:
    """Its convolutions of zeros filled: what says nothing at all would be foretold for nothing."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return network


def random_models() -> _Models:
    """Stable Diffusion 1.5's shapes, with weights of chance."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD15)
    controls = [outspoken(ControlNetModel.from_unet(unet, load_weights_from_unet=False)) for _ in range(2)]
    return _Models(unet, controls, 77, int(SD15["sample_size"]))


SIZES: dict[str, Callable[[], _Models]] = {SHIPPED: _shipped, "sd15": random_models}
"""``tiny``, the shipped family at 128 x 128; ``sd15``, Stable Diffusion 1.5's shapes at 512 x 512, random weights."""


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
