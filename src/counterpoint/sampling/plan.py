"""What a call will need, before it is made: memory and seconds (ours).

The networks are run with tensors that have shapes and no values. That tells how much memory intermediate results take
at once, and every operation's arithmetic and traffic; seconds follow from this machine's rates and from how far a small
UNet falls short of them. Nothing of what is planned is allocated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from counterpoint.fusion import get_fusion
from counterpoint.models.pace import quickest
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.residency import RESIDENCIES
from counterpoint.types import DEFAULT_FUSION, Fusion, UserError

FAR = 2**28
"""Bytes that are copied to measure memory: more than a cache holds."""
BLOCKED = ("cpu",)
"""Devices on which a convolution holds copies of its input and output in an order of its own: oneDNN's."""


@dataclass(frozen=True)
class Plan:
    """What one call needs.

    Attributes:
        memory: residency -> bytes of weights and intermediate results at their largest, besides what Python and its
            libraries take.
        weights: network -> bytes.
        seconds: for all pictures, in all, where every network stays.
    """

    memory: Mapping[str, int]
    weights: Mapping[str, int]
    seconds: float

    def fitting(self, limit: int) -> str:
        """The residency that keeps most within so many bytes.

        Raises:
            UserError: none does.
        """
        for level in RESIDENCIES:
            if self.memory[level] <= limit:
                return level
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
    active: Sequence[float] | None = None,
    from_image: bool = False,
) -> Plan:
    """Foretell a call in which everything is computed and nothing is pushed. Rules are taken to cost nothing, as the
    usual ones nearly do; adapters do not count.

    Args:
        pipe: what would be called.
        count: pictures.
        height: in pixels, default the model's own.
        width: likewise.
        num_inference_steps: likewise as in the call.
        guidance_scale: likewise.
        fusion: likewise; a rule that walks through all controls at once keeps them together.
        active: for each control, the share of the steps in which it is run; default all.
        from_image: whether a picture is encoded first.
    """
    size = (height or pipe.native_size, width or pipe.native_size)
    guided = (pipe.guidance_scale if guidance_scale is None else guidance_scale) > 1
    dtype, rows = pipe.unet.dtype, count * (2 if guided else 1)
    home = next(iter(pipe.unet.parameters())).device  # where networks wait, if they do
    shape = (size[0] // pipe.factor, size[1] // pipe.factor)
    shares = dict(zip(pipe.controls, active or [1.0] * len(pipe.controls), strict=True))
    config = pipe.unet.config
    ledger, (slowness, call) = _Ledger(pipe.device, dtype), _pace(pipe.device, dtype)
    peaks: dict[str, int] = {}
    seconds = 0.0
    with ExitStack() as stack:
        for context in (torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), ledger):
            stack.enter_context(context)

        def empty(*sizes: int) -> Tensor:
            return torch.empty(*sizes, dtype=dtype, device=home)

        def entry(name: str, run: Callable[[], Any], times: float) -> Any:
            nonlocal seconds
            ledger.begin()
            out = run()
            peaks[name] = ledger.peak
            seconds += times * (slowness * ledger.ideal + call * ledger.calls)
            return out

        texts = [one for one in (pipe.text_encoder, pipe.text_encoder_2) if one is not None]
        length = pipe.tokenizer.model_max_length
        ids = torch.empty(rows, length, dtype=torch.long, device=home)
        entry("text", lambda: [one(ids) for one in texts], 1)
        latents, text = empty(rows, config.in_channels, *shape), empty(rows, length, config.cross_attention_dim)
        hints, extra = [empty(rows, 3, *size) for _ in pipe.controls], _added(pipe, rows, empty)

        def step() -> None:
            """What it made is gone when the next part begins."""
            total: list[Tensor] | None = None
            for (name, network), hint in zip(pipe.controls.items(), hints, strict=True):
                ask = partial(network, latents, 500, text, hint, added_cond_kwargs=extra, return_dict=False)
                down, mid = entry(f"control {name}", ask, num_inference_steps * shares[name])
                said = [*down, mid]
                total = said if total is None else [one + other for one, other in zip(total, said, strict=True)]
            heard: dict[str, Any] = {}
            if total is not None:
                heard["down_block_additional_residuals"], heard["mid_block_additional_residual"] = total[:-1], total[-1]
            ask = partial(pipe.unet, latents, 500, text, added_cond_kwargs=extra, return_dict=False, **heard)
            entry("denoiser", ask, num_inference_steps)

        step()
        if from_image:
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
    memory = _levels(weights, peaks, {id(one): _bytes(one) for one in pipe.controls.values()})
    if get_fusion(fusion).walks:
        memory["controls"] = memory["stages"]
    return Plan(memory, weights, seconds)


def _levels(weights: Mapping[str, int], peaks: Mapping[str, int], controls: Mapping[int, int]) -> dict[str, int]:
    """Bytes at the largest, for each residency."""
    together, host = sum(controls.values()), weights["denoiser"]
    ends = {"text": weights["text"], "encoder": weights["decoder"], "decoder": weights["decoder"]}
    at_ends = max(ends[name] + peaks[name] for name in ends if name in peaks)
    at_work = [peak for name, peak in peaks.items() if name not in ends]
    alone = [host + peaks["denoiser"]]
    alone += [host + weights[name] + peaks[name] for name in peaks if name.startswith("control ")]
    everything = weights["text"] + weights["decoder"] + host + together
    return {
        "all": everything + max(peaks.values()),
        "stages": max(at_ends, host + together + max(at_work)),
        "controls": max(at_ends, *alone),
    }


def _added(pipe: Pipeline, rows: int, empty: Callable[..., Tensor]) -> dict[str, Tensor] | None:
    """What SDXL reads besides."""
    if pipe.text_encoder_2 is None:
        return None
    return {"text_embeds": empty(rows, pipe.text_encoder_2.config.projection_dim), "time_ids": empty(rows, 6)}


def _bytes(network: nn.Module) -> int:
    return sum(map(_size, (*network.parameters(), *network.buffers())))


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what operations make: bytes that live at once, how many operations there are, and how long they should
    take at this machine's rates."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates, self.live = _rates(device, dtype), 0
        self.blocked = device.type in BLOCKED
        self._known: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """A new part; what is alive stays."""
        self.peak = self.live
        self.ideal = 0.0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        fresh, name = 0, func._overloadpacket.__name__
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    fresh += storage.nbytes()
                    self._known.add(storage._cdata)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.live += fresh
        convolved = "conv" in name
        moved = fresh + sum(_size(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor))
        self.peak = max(self.peak, self.live + (moved if convolved and self.blocked else 0))
        if fresh:
            rates = self.rates
            rate = rates.conv if convolved else rates.attention if "attention" in name else rates.matrix
            self.ideal += max(_flops(func, args, kwargs, made) / rate, moved / rates.bandwidth)
            self.calls += 1
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(func: Any, args: Any, kwargs: Any, made: Any) -> float:
    packet = func._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=made))
    if "scaled_dot_product" in packet.__name__:  # the CPU's own, which torch does not count
        return float(4 * args[0].numel() * args[1].shape[-2])
    return 0.0


@dataclass(frozen=True)
class _Rates:
    """Operations a second of matrix products, convolutions and attention, and bytes a second of copying, at best."""

    matrix: float
    conv: float
    attention: float
    bandwidth: float


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """This machine's best rates, as records have them: operations a second of ``matrix`` products, ``conv`` and
    ``attention``, and bytes a second that are read and written (``bandwidth``)."""
    return asdict(_rates(device, dtype))


@cache
def _rates(device: torch.device, dtype: torch.dtype) -> _Rates:
    """The best at some shapes of a UNet, on an accelerator of a large one."""
    large_batch = 1 if device.type == "cpu" else 8

    def noise(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype)

    def product(side: int) -> float:
        matrix = noise(side, side)
        return 2 * side**3 / quickest(device, lambda: matrix @ matrix)

    def convolution(width: int, side: int, order: torch.memory_format) -> float:
        picture, kernel = noise(2 * large_batch, width, side, side), noise(width, width, 3, 3)
        picture, kernel = picture.to(memory_format=order), kernel.to(memory_format=order)
        return 2 * picture.numel() * width * 9 / quickest(device, lambda: F.conv2d(picture, kernel, padding=1))

    query = noise(2 * large_batch, 8, 1024, 40)
    far = torch.ones(FAR // query.element_size(), device=device, dtype=dtype)
    there = torch.empty_like(far)
    orders = torch.contiguous_format, torch.channels_last
    return _Rates(
        max(product(side * large_batch) for side in (512, 768, 1024)),
        max(convolution(width, side, order) for width, side in ((320, 32), (640, 16)) for order in orders),
        4 * query.numel() * 1024 / quickest(device, lambda: F.scaled_dot_product_attention(query, query, query)),
        2 * _size(far) / quickest(device, lambda: there.copy_(far)),
    )


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
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _Ledger(device, dtype) as ledger:
            network(torch.empty_like(latents), 500, torch.empty_like(text))
        rows.append((ledger.ideal, float(ledger.calls), taken))
    return fit(*rows)


def fit(small: tuple[float, float, float], large: tuple[float, float, float]) -> tuple[float, float]:
    """Two measurements ``(seconds at best, calls, seconds taken)`` -> how many times longer than at best it takes, and
    what every call adds; noise makes neither less than nothing."""
    (ideal, calls, taken), (more, others, longer) = small, large
    slowness = max(1.0, (longer - taken * others / calls) / (more - ideal * others / calls))
    return slowness, max(0.0, (taken - slowness * ideal) / calls)


def floor(run: Callable[[], object], device: torch.device, dtype: torch.dtype) -> float:
    """Seconds below which a call cannot fall here: each operation's arithmetic at this machine's best rate, or its
    bytes at the rate of copying, whichever takes longer."""
    with _Ledger(device, dtype) as ledger:
        run()
    seconds: float = ledger.ideal
    return seconds
