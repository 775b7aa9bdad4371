"""Speed and memory, measured side by side: everything that is compared runs in one process, in turns."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from counterpoint.control.keys import Lending
from counterpoint.control.stack import Branch, fuse
from counterpoint.evaluation.statistics import bootstrap
from counterpoint.fusion import FUSIONS
from counterpoint.metrics.cost import measuring
from counterpoint.models.load import load_components, load_controls
from counterpoint.sampling.denoise import ControlledDenoiser
from counterpoint.types import Fusion, Moment

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
"""What Stable Diffusion 1.5 sets beyond the defaults of diffusers' UNet."""
Case = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of a case in every round, and the largest memory of the process while it ran, where that can be read."""

    seconds: list[float]
    peak_mb: float | None


def alternate(
    cases: Mapping[str, Case],
    rounds: int,
    device: torch.device,
    listen: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Run every case on a device once a round, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for place, (name, case) in enumerate(cases.items()):
            with measuring(device) as cost:
                case()
            if number:
                taken[name].append(cost.seconds)
            peaks[name].append(cost.peak_mb or 0.0)
            if listen is not None:
                listen(number * len(cases) + place + 1, (rounds + 1) * len(cases))
    return {name: Timing(taken[name], max(peaks[name]) or None) for name in cases}


def compare(timings: Mapping[str, Timing], baseline: str) -> list[dict[str, Any]]:
    """A row a case: median seconds, and the ratio to the baseline of the same round, with 95 % intervals."""

    def centre(rows: torch.Tensor) -> float:
        return float(rows.median())

    rows = []
    for name, timing in timings.items():
        seconds = torch.tensor(timing.seconds, dtype=torch.float64)
        ratio = seconds / torch.tensor(timings[baseline].seconds, dtype=torch.float64)
        rows.append(
            {
                "name": name,
                **{
                    key: {"median": spread.mean, "low": spread.low, "high": spread.high}
                    for key, spread in (("seconds", bootstrap(seconds, centre)), ("ratio", bootstrap(ratio, centre)))
                },
                "peak_mb": timing.peak_mb and round(timing.peak_mb),
            }
        )
    return rows


def fusion_cases(size: str, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Case], str]:
    """Every rule's operator at every site of a guided step with two controls, beside whole steps.

    Args:
        size: one of :data:`SIZES`.
        device: where.
        dtype: of the models.

    Returns:
        The cases, and the name of the baseline: a step under ``sum``.
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
    said = [[noise(*site.shape) for site in (*down, mid)] for _ in branches]

    def operator(rule: Fusion) -> Case:
        return torch.no_grad()(lambda: fuse(rule, said))

    steps = ("sum", "pix+channel", "cross", "minimal-impact", "maxfusion", "cross-authors")
    return {
        **{f"step {name}": step(FUSIONS[name]) for name in steps},
        **{f"operator {name}": operator(rule) for name, rule in FUSIONS.items()},
    }, "step sum"


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


def _random() -> _Models:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD15)
    controls = [ControlNetModel.from_unet(unet, load_weights_from_unet=False) for _ in range(2)]
    return _Models(unet, controls, 77, int(SD15["sample_size"]))


SIZES: dict[str, Callable[[], _Models]] = {"tiny": _shipped, "sd15": _random}
"""``tiny``, the shipped family at 128 x 128; ``sd15``, Stable Diffusion 1.5's shapes at 512 x 512, random weights."""


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def plain(rows: list[dict[str, Any]], baseline: str) -> str:
    """Aligned text for people."""
    width = max(len(row["name"]) for row in rows)
    return "\n".join(
        f"{row['name']:<{width}}  {row['seconds']['median']:10.4f} s  "
        f"{row['ratio']['median']:8.2%} of {baseline} [{row['ratio']['low']:.2%}, {row['ratio']['high']:.2%}]"
        + (f"  {row['peak_mb']} MB" if row["peak_mb"] else "")
        for row in rows
    )
