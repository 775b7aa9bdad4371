"""Networks that OpenVINO runs on a CPU: the same to rounding in float32, or its bfloat16.

A network, of a UNet either half, is traced once, kept on disk under what decides it, and compiled for every new shape
of its input. Batches are run in parts of 1, 2, 4, 8 ... rows, no larger than pays, so that there are few shapes however
many rows are asked for. What it is made of cannot be reached any more.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from counterpoint.models.halves import decoding, encode
from counterpoint.models.winograd import Filters, quicken
from counterpoint.types import UserError

CACHE = Path.home() / ".cache" / "counterpoint" / "openvino"
_SIDE = 15
"""Of what networks are traced with. Odd, so that diffusers' UNet asks each level for its size on the way up: traced
where every level halves evenly it takes for granted that all sizes do."""
_PIXELS = 64 * 64
"""Of latents in a batch, from which on a larger one is no faster, and its shape takes the memory of a network."""
_KEPT = 8
"""Shapes for which a network stays compiled, the last ones: each takes memory of its own."""


class Ported(nn.Module):
    """What all kinds of network share: configuration, place and precision, and how OpenVINO is called.

    Args:
        config: of the network.
        inside: the network, in float32 on a CPU, as a function of tensors alone, and of none that is missing; it is let
            go when it has been traced.
        bf16: whether sums are made in bfloat16; inputs and outputs are float32 either way.
        cache: folder of traced networks; default :data:`CACHE`.
    """

    def __init__(self, config: Any, inside: _Inside, bf16: bool, cache: Path | None = None) -> None:
        super().__init__()
        import openvino

        self.openvino, self.config, self.bf16 = openvino, config, bf16
        self.cache = cache or CACHE
        self._inside: list[_Inside] = [inside]  # no sub-module: its weights are to be let go
        self._compiled: dict[tuple[tuple[int, ...], ...], Any] = {}
        self._traced: Any = None
        self._filters: Filters = {}

    config: Any
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> list[Tensor]:
        """Outputs for inputs; of all of them the first dimension is the batch."""
        count, pixels = len(inputs[0]), max(prod(one.shape[2:]) for one in inputs if one.ndim == 4)
        most = min(count, max(1, _PIXELS // pixels)).bit_length() - 1
        sizes = [1 << most] * (count >> most)
        sizes += [1 << bit for bit in reversed(range(most)) if count >> bit & 1]
        found = [self._run(part) for part in zip(*(one.float().split(sizes) for one in inputs), strict=True)]
        return found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        shapes = tuple(tuple(one.shape) for one in inputs)
        network = self._compiled.pop(shapes) if shapes in self._compiled else self._compile(inputs)
        if len(self._compiled) == _KEPT:
            del self._compiled[next(iter(self._compiled))]
        self._compiled[shapes] = network  # the last one is the newest
        found = network([one.contiguous().numpy() for one in inputs])
        return [torch.from_numpy(found[place].copy()) for place in range(len(found))]

    def example(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What a network is traced with: inputs of a call, those that are maps with sides of :data:`_SIDE`."""
        return [one if one.ndim < 4 else torch.zeros(*one.shape[:2], _SIDE, _SIDE) for one in inputs]

    def _compile(self, inputs: Sequence[Tensor]) -> Any:
        core = self.openvino.Core()
        model = self._trace(core, inputs).clone()
        model.reshape({place: list(one.shape) for place, one in enumerate(inputs)})
        if not self.bf16:  # whose few digits the transforms would use up
            quicken(model, self._filters)
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.bf16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        with _own_signal_stack():
            return core.compile_model(model, "CPU", settings)

    def _trace(self, core: Any, inputs: Sequence[Tensor]) -> Any:
        if self._traced is None:
            (inside,) = self._inside
            said = (type(inside).__name__, self.openvino.__version__, diffusers.__version__, str(_SIDE))
            path = self.cache / f"{_key(inside, self.config, *said)}.xml"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent) as half:
                    with inside.as_traced():
                        made = _traced(inside.eval(), tuple(self.example(inputs)))
                    self.openvino.save_model(made, Path(half) / path.name, compress_to_fp16=False)
                    for suffix in (".bin", ".xml"):  # who finds the second finds both
                        (Path(half) / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))
            self._traced = core.read_model(path)
            self._inside.clear()
        return self._traced


class PortedUNet(Ported):
    """A UNet in two halves (:mod:`counterpoint.models.halves`); called as diffusers' is, of which it knows what our
    denoiser asks."""

    def __init__(self, unet: UNet2DConditionModel, bf16: bool, cache: Path | None = None) -> None:
        super().__init__(unet.config, _Encoder(unet), bf16, cache)
        self.decoder = _PortedDecoder(unet.config, _Decoder(unet), bf16, cache)
        self._said: Sequence[Tensor] | None = None

    def encode(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """As :func:`counterpoint.models.halves.encode`."""
        return self.run(*_given(sample, timestep, encoder_hidden_states, added_cond_kwargs))

    @contextmanager
    def decoding(self, said: Sequence[Tensor]) -> Iterator[None]:
        """As :func:`counterpoint.models.halves.decoding`."""
        self._said = said
        try:
            yield
        finally:
            self._said = None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The prediction."""
        said = self._said or self.encode(sample, timestep, encoder_hidden_states, added_cond_kwargs)
        if down_block_additional_residuals is not None and mid_block_additional_residual is not None:
            residuals = (*down_block_additional_residuals, mid_block_additional_residual)
            said = [one + other for one, other in zip(said, residuals, strict=True)]
        _, *given = _given(sample, timestep, encoder_hidden_states, added_cond_kwargs)
        (found,) = self.decoder.run(*given, *said)
        return (found,)


class _PortedDecoder(Ported):
    def example(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """With features as they are at that size."""
        sites = site_shapes(self.config, (len(inputs[0]), 0, _SIDE, _SIDE))
        return [*inputs[: -len(sites)], *map(torch.zeros, sites)]


class PortedControlNet(Ported):
    """A ControlNet; its hint encoder stays a torch module, because a hint is encoded once."""

    def __init__(self, network: ControlNetModel, bf16: bool, cache: Path | None = None) -> None:
        super().__init__(network.config, _ControlNet(network), bf16, cache)
        self.controlnet_cond_embedding = network.controlnet_cond_embedding

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float | Tensor = 1.0,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = False,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """One feature a site."""
        hint = self.controlnet_cond_embedding(controlnet_cond)
        found = self.run(*_given(sample, timestep, encoder_hidden_states, added_cond_kwargs), hint)
        *down, mid = (one * conditioning_scale for one in found)
        return tuple(down), mid


class PortedPixels(Ported):
    """The decoder of a codec, which takes its place there. It counts in float32, whatever the others do: it is asked
    once, and what it says is seen."""

    def __init__(self, codec: AutoencoderKL | AutoencoderTiny, cache: Path | None = None) -> None:
        super().__init__(codec.config, _Pixels(codec.decoder), False, cache)

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures ``(b, 3, h, w)``."""
        return self.run(latents)[0]


def port(unet: UNet2DConditionModel, controls: Mapping[str, ControlNetModel], bf16: bool) -> tuple[PortedUNet, dict]:
    """A model's networks on OpenVINO; labels that share a network go on sharing it.

    Raises:
        UserError: OpenVINO is not installed, or would silently take float32 for bfloat16.
    """
    try:
        import openvino
    except ImportError:
        raise UserError("the openvino backend needs OpenVINO: pip install 'counterpoint[openvino]'") from None
    if bf16 and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UserError("OpenVINO counts in bf16 where the processor does, and this one does not: take fp32 as dtype")
    ported = {id(one): PortedControlNet(one, bf16) for one in controls.values()}
    return PortedUNet(unet, bf16), {label: ported[id(one)] for label, one in controls.items()}


def site_shapes(config: Mapping[str, Any], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of what a UNet's encoder says, and a control to it, at each site; for latents of ``shape``
    ``(b, c, h, w)``."""
    batch, _, height, width = shape
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    found = [(batch, widths[0], height, width)]
    for place, channels in enumerate(widths):
        count = layers if isinstance(layers, int) else layers[place]
        found += [(batch, channels, height, width)] * count
        if place < len(widths) - 1:
            height, width = (height + 1) // 2, (width + 1) // 2
            found.append((batch, channels, height, width))
    return [*found, (batch, widths[-1], height, width)]


class _Inside(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def as_traced(self) -> AbstractContextManager[None]:
        """While it is traced."""
        return nullcontext()

    def _called(self, given: Sequence[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """What every network reads besides latents, and the inputs that are left."""
        timestep, text, *rest = given
        named = {"timestep": timestep, "encoder_hidden_states": text}
        if self.network.config.get("addition_embed_type") == "text_time":
            named["added_cond_kwargs"] = {"text_embeds": rest[0], "time_ids": rest[1]}
            rest = rest[2:]
        return named, rest


class _Encoder(_Inside):
    def forward(self, sample: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        named, _ = self._called(given)
        return tuple(encode(self.network, sample, **named))


class _Decoder(_Inside):
    def forward(self, *given: Tensor) -> Tensor:
        named, said = self._called(given)
        with decoding(self.network, said):
            found: Tensor = self.network(said[0], **named, return_dict=False)[0]  # it asks for the latents' size only
        return found


class _Pixels(_Inside):
    def forward(self, latents: Tensor) -> Tensor:
        found: Tensor = self.network(latents)
        return found


class _ControlNet(_Inside):
    @contextmanager
    def as_traced(self) -> Iterator[None]:
        """Without its hint encoder."""
        encoder = self.network.controlnet_cond_embedding
        self.network.controlnet_cond_embedding = nn.Identity()
        try:
            yield
        finally:
            self.network.controlnet_cond_embedding = encoder

    def forward(self, sample: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        named, (hint,) = self._called(given)
        down, mid = self.network(sample, **named, controlnet_cond=hint, return_dict=False)
        return (*down, mid)


def _traced(inside: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """By the front end itself: ``openvino.convert_model`` would report to its makers that it was called."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    reader = FrontEndManager().load_by_framework("pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tracing: which branches are taken depends on the configuration alone
        decoder = TorchScriptPythonDecoder(inside, example_input=inputs)  # to be kept: the reader does not hold it
    return reader.convert(reader.load(decoder))


class _Stack(ctypes.Structure):
    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Compiling leaves the thread a signal stack that is unmapped with the compiled network (2026.4): the next signal,
    such as Ctrl+C, would crash the process. The one that was there before is put back."""
    exchange = getattr(ctypes.CDLL(None), "sigaltstack", None) if sys.platform == "linux" else None
    before = _Stack()
    if exchange is not None:
        exchange(None, ctypes.byref(before))
    try:
        yield
    finally:
        if exchange is not None:
            exchange(ctypes.byref(before), None)


def _given(sample: Tensor, timestep: Tensor, text: Tensor, added: Mapping[str, Tensor] | None) -> tuple[Tensor, ...]:
    times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1).expand(len(sample))
    extra = () if not added else (added["text_embeds"], added["time_ids"])
    return (sample, times, text, *extra)


def _key(inside: nn.Module, config: Any, *more: str) -> str:
    """What decides a traced network: weights, configuration, versions."""
    found = hashlib.blake2b(json.dumps([*more, torch.__version__, dict(config)], default=str).encode())
    for name, tensor in inside.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:32]
