"""What a call will need, before it is made: memory and seconds (ours).

The networks are run with tensors that have shapes and no values. That tells how much memory intermediate results take
at once, and every operation's arithmetic and traffic; seconds follow from this machine's rates and from how far a small
UNet falls short of them. Nothing of what is planned is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from counterpoint.control.attach import hints_encoded_once, part_of
from counterpoint.fusion import get_fusion
from counterpoint.models.halves import encode
from counterpoint.models.pace import quickest
from counterpoint.sampling.economy import ENCODER, known_quality
from counterpoint.sampling.floor import Ledger, Operation, Operations, work
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import DEFAULT_FUSION, Fusion, UserError

BLOCKED = ("cpu",)
"""Devices on which a convolution holds copies of its input and output in an order of its own: oneDNN's."""


@dataclass(frozen=True)
class Plan:
    """What one call needs.

    Attributes:
        memory: residency -> bytes of weights and intermediate results at their largest, besides what Python and its
            libraries take.
        weights: network -> bytes.
        operations: of all pictures, in all.
        parts: network, ``hint`` of a control, ``decoder``, or the encoder of the UNet, if it may be foretold -> the
            operations of one call, of the whole guided batch.
        device: where the call would be made.
        dtype: of the networks.
        turns: controls that come and go within every step while the others stay, from few to all -> bytes likewise;
            none where a rule walks through all controls at once.
    """

    memory: Mapping[str, int]
    weights: Mapping[str, int]
    operations: Operations
    parts: Mapping[str, Operations]
    device: torch.device
    dtype: torch.dtype
    turns: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    @cached_property
    def seconds(self) -> float:
        """For all pictures, in all, where every network stays; the machine is measured first."""
        slowness, call = _pace(self.device, self.dtype)
        return slowness * work(self.operations, self.device).seconds + call * sum(self.operations.values())

    def fitting(self, limit: int) -> tuple[str, tuple[str, ...]]:
        """The residency that keeps most within so many bytes, and the controls that come and go within every step.

        Raises:
            UserError: none does.
        """
        whole = (((level, ()), self.memory[level]) for level in ("all", "stages"))
        for found, size in (*whole, *((("controls", going), size) for going, size in self.turns.items())):
            if size <= limit:
                return found
        least = min(self.memory.values())
        raise UserError(
            f"this needs {least / 2**30:.3g} GiB where only what is at work is in memory, and {limit / 2**30:.3g} are "
            "allowed: make fewer or smaller pictures at once, or use another dtype"
        )


def plan(
    pipe: Pipeline,
    count: int = 1,
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float | None = None,
    fusion: str | Fusion = DEFAULT_FUSION,
    quality: str = "exact",
    active: Sequence[float] | None = None,
    strength: float | None = None,
    device: torch.device | None = None,
) -> Plan:
    """Foretell a call in which every control is computed and nothing is pushed. Rules are taken to cost nothing, as the
    usual ones nearly do; adapters do not count.

    Args:
        pipe: what would be called.
        count: pictures.
        height: in pixels, default the model's own.
        width: likewise.
        num_inference_steps: likewise as in the call.
        guidance_scale: likewise.
        fusion: likewise; a rule that walks through all controls at once keeps them together.
        quality: likewise; the steps that hold guidance are known, those at which a control is foretold are not.
        active: for each control, the share of the steps in which it is run; default all.
        strength: how far a picture to start from is noised; without, there is none.
        device: where the call would be made; default where the networks are.
    """
    size = (height or pipe.native_size, width or pipe.native_size)
    guided = (pipe.guidance_scale if guidance_scale is None else guidance_scale) > 1
    device, dtype, rows = device or pipe.device, pipe.unet.dtype, count * (2 if guided else 1)
    home = next(iter(pipe.unet.parameters())).device  # where networks wait, if they do
    shape = (size[0] // pipe.factor, size[1] // pipe.factor)
    shares = dict(zip(pipe.controls, active or [1.0] * len(pipe.controls), strict=True))
    taken = num_inference_steps if strength is None else max(1, int(num_inference_steps * strength))
    asks = pipe.scheduler.order * taken
    level = known_quality(quality)
    held = sum(level.holds_guidance(index, asks, index) for index in range(asks)) if guided else 0
    config = pipe.unet.config
    ledger = Ledger(blocked=device.type in BLOCKED)
    peaks: dict[str, int] = {}
    parts: dict[str, Operations] = {}
    needed: dict[Operation, float] = {}
    with ExitStack() as stack:
        for context in (torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), ledger):
            stack.enter_context(context)

        def empty(*sizes: int) -> Tensor:
            return torch.empty(*sizes, dtype=dtype, device=home)

        def entry(name: str, run: Callable[[], Any], times: float, within: str | None = None) -> Any:
            ledger.begin()
            out = run()
            peaks[within or name] = max(peaks.get(within or name, 0), ledger.peak)
            parts.setdefault(name, ledger.operations)
            for one, often in ledger.operations.items():
                needed[one] = needed.get(one, 0.0) + times * often
            return out

        texts = [one for one in (pipe.text_encoder, pipe.text_encoder_2) if one is not None]
        length = pipe.tokenizer.model_max_length
        ids = torch.empty(rows, length, dtype=torch.long, device=home)
        entry("text", lambda: [one(ids) for one in texts], 1)
        hints, kept = [empty(rows, 3, *size) for _ in pipe.controls], list[Tensor]()

        def keep(said: Sequence[Tensor], some: int) -> None:
            """Two answers, from which the others are foretold."""
            if level.bound is not None and some == rows:
                kept.extend(torch.empty_like(one) for one in said for _ in range(2))

        def step(some: int, times: int) -> None:
            """So many rows of the batch. What it made is gone when the next part begins."""
            latents, text = empty(some, config.in_channels, *shape), empty(some, length, config.cross_attention_dim)
            extra, total = _added(pipe, some, empty), None
            for (name, network), whole in zip(pipe.controls.items(), hints, strict=True):
                hint = whole if some == rows else part_of(whole, slice(some), network)
                often, control = times * shares[name], f"control {name}"
                entry(f"hint {name}", partial(network.controlnet_cond_embedding, hint), min(often, 1), control)
                ask = partial(network, latents, 500, text, hint, added_cond_kwargs=extra, return_dict=False)
                down, mid = entry(control, ask, often)
                said = [*down, mid]
                keep(said, some)
                total = said if total is None else [one + other for one, other in zip(total, said, strict=True)]
            if level.bound is not None:
                ask = partial(encode, pipe.unet, latents, 500, text, extra)
                keep(entry(ENCODER, ask, 0, "denoiser"), some)  # a part of it
            heard: dict[str, Any] = {}
            if total is not None:
                heard["down_block_additional_residuals"], heard["mid_block_additional_residual"] = total[:-1], total[-1]
            ask = partial(pipe.unet, latents, 500, text, added_cond_kwargs=extra, return_dict=False, **heard)
            entry("denoiser", ask, times)

        with hints_encoded_once(list(pipe.controls.values())):
            step(rows, asks - held)
            if held:
                step(count, held)
        if strength is not None:
            picture = empty(count, 3, *size).to(pipe.vae.dtype)
            entry("encoder", lambda: pipe.vae.encode(picture), 1)
        finished = empty(count, config.in_channels, *shape).to(pipe.vae.dtype)
        entry("decoder", lambda: pipe.vae.decode(finished, return_dict=False), 1)
    weights = {
        "text": sum(map(_bytes, texts)),
        **{f"control {name}": _bytes(one) for name, one in pipe.controls.items()},
        "denoiser": _bytes(pipe.unet),
        "decoder": _bytes(pipe.vae),
    }
    if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast", False):  # it works in float32
        for sizes in (weights, peaks):
            sizes.update({name: 2 * sizes[name] for name in ("encoder", "decoder") if name in sizes})
    first: dict[nn.Module, str] = {}
    for label, network in pipe.controls.items():
        first.setdefault(network, label)
    memory, turns = _levels(weights, peaks, list(first.values()))
    if get_fusion(fusion).walks:
        memory["controls"], turns = memory["stages"], {}
    return Plan(memory, weights, needed, parts, device, dtype, turns)


def _levels(
    weights: Mapping[str, int], peaks: Mapping[str, int], labels: Sequence[str]
) -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    """Bytes at the largest, for each residency, and for the controls that come and go while the others stay; ``labels``
    names every control's network once."""
    host, sizes = weights["denoiser"], [weights[f"control {label}"] for label in labels]
    ends = {"text": weights["text"], "encoder": weights["decoder"], "decoder": weights["decoder"]}
    at_ends = max(ends[name] + peaks[name] for name in ends if name in peaks)
    at_work = max(peak for name, peak in peaks.items() if name not in ends)
    turns = {}
    for number in reversed(range(len(labels))):
        coming = max(weights[f"control {label}"] + peaks[f"control {label}"] for label in labels[number:])
        turns[tuple(labels[number:])] = max(at_ends, host + sum(sizes[:number]) + max(at_work, coming))
    everything = weights["text"] + weights["decoder"] + host + sum(sizes)
    stages = max(at_ends, host + sum(sizes) + at_work)
    levels = {"all": everything + max(peaks.values()), "stages": stages, "controls": min([stages, *turns.values()])}
    return levels, turns


def _added(pipe: Pipeline, rows: int, empty: Callable[..., Tensor]) -> dict[str, Tensor] | None:
    """What SDXL reads besides."""
    if pipe.text_encoder_2 is None:
        return None
    return {"text_embeds": empty(rows, pipe.text_encoder_2.config.projection_dim), "time_ids": empty(rows, 6)}


def _bytes(network: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in (*network.parameters(), *network.buffers()))


@cache
def _pace(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """How many times longer than at best this machine takes, and the seconds that every call adds: from a small UNet,
    run at two sizes."""
    network = UNet2DConditionModel(
        block_out_channels=(160, 320),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
    )
    for parameter in network.eval().parameters():
        parameter.data = parameter.data.to(device, dtype)
    rows = []
    for side in (8, 32):
        latents = torch.randn(2, 4, side, side, device=device, dtype=dtype)
        text = torch.randn(2, 77, 64, device=device, dtype=dtype)
        taken = quickest(device, partial(network, latents, 500, text), 3)
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
            network(torch.empty_like(latents), 500, torch.empty_like(text))
        rows.append((work(ledger.operations, device).seconds, float(ledger.operations.total()), taken))
    return fit(*rows)


def fit(small: tuple[float, float, float], large: tuple[float, float, float]) -> tuple[float, float]:
    """Two measurements ``(seconds at best, calls, seconds taken)`` -> how many times longer than at best it takes, and
    what every call adds; noise makes neither less than nothing."""
    (ideal, calls, taken), (more, others, longer) = small, large
    slowness = max(1.0, (longer - taken * others / calls) / (more - ideal * others / calls))
    return slowness, max(0.0, (taken - slowness * ideal) / calls)
