"""Changes to a model that last as long as a ``with`` block, and not a moment longer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from counterpoint.types import Inject, Residuals


@contextmanager
def taking_in(unet: nn.Module, residuals: Residuals | None, inject: Inject) -> Iterator[dict[str, Any]]:
    """Let the host take control features in, and yield what its call wants besides: ``torch.add`` is diffusers' own
    way, by arguments; any other rule works where the features of the host's encoder are used."""
    if residuals is None:
        yield {}
    elif inject is torch.add:
        yield {"down_block_additional_residuals": residuals.down, "mid_block_additional_residual": residuals.mid}
    else:
        with injecting(unet, residuals, inject):
            yield {}


@contextmanager
def injecting(unet: UNet2DConditionModel, residuals: Residuals, inject: Inject) -> Iterator[None]:
    """Let the host take control features in by a rule of its own, where its encoder's features are used.

    With ``torch.add`` it is diffusers' own ``down_block_additional_residuals``, bit for bit.
    """
    waiting = list(residuals.down)

    def decoder(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        skips = kwargs["res_hidden_states_tuple"]
        mine = waiting[-len(skips) :]
        del waiting[-len(skips) :]
        changed = tuple(inject(e, f) for e, f in zip(skips, mine, strict=True))
        return args, {**kwargs, "res_hidden_states_tuple": changed}

    with ExitStack() as stack:
        for block in unet.up_blocks:
            stack.callback(block.register_forward_pre_hook(decoder, with_kwargs=True).remove)
        stack.callback(unet.mid_block.register_forward_hook(lambda _, __, output: inject(output, residuals.mid)).remove)
        yield


@contextmanager
def injecting_blocks(
    blocks: nn.ModuleList, samples: Sequence[Tensor], inject: Inject, repeated: bool = False
) -> Iterator[None]:
    """Let a FLUX transformer's double or single blocks take control features in by a rule of their own.

    With ``torch.add`` it is diffusers' own ``controlnet_block_samples``, bit for bit: each sample serves a run of
    blocks, or all serve in turns where they are ``repeated``.
    """
    run = math.ceil(len(blocks) / len(samples))

    def after(control: Tensor) -> Any:
        return lambda _, __, output: (output[0], inject(output[1], control))

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            control = samples[number % len(samples) if repeated else number // run]
            stack.callback(block.register_forward_hook(after(control)).remove)
        yield


@contextmanager
def hints_encoded_once(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Let every ControlNet remember what its hint encoder made of the pictures that it saw last."""
    encoders = {network: network.get_submodule("controlnet_cond_embedding") for network in dict.fromkeys(networks)}
    for network, encoder in encoders.items():
        network.controlnet_cond_embedding = _Remembering(encoder)
    try:
        yield
    finally:
        for network, encoder in encoders.items():
            network.controlnet_cond_embedding = encoder


def forget_hints(networks: Iterable[nn.Module]) -> None:
    """Let them remember nothing: the next run has other tensors, be they of the same pictures."""
    for network in networks:
        if isinstance(encoder := getattr(network, "controlnet_cond_embedding", None), _Remembering):
            encoder.seen = []


def part_of(hint: Tensor, rows: slice | list[int], network: nn.Module) -> Tensor:
    """Some rows of a hint; what their network remembers of the whole of it, it knows of them."""
    part, encoder = hint[rows], getattr(network, "controlnet_cond_embedding", None)
    if isinstance(encoder, _Remembering) and (known := encoder.known(hint)) is not None:
        encoder.remember(part, known[rows])
    return part


_REMEMBERED = 7
"""Pictures beside the newest one: parts of a batch are asked for in turns."""


class _Remembering(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.seen: list[tuple[Tensor, int, Tensor]] = []

    def forward(self, hint: Tensor) -> Tensor:
        known = self.known(hint)
        return self.remember(hint, self.encoder(hint)) if known is None else known

    def known(self, hint: Tensor) -> Tensor | None:
        """What was made of this very tensor, if it has not been changed since."""
        return next((made for picture, before, made in self.seen if picture is hint and before == _changes(hint)), None)

    def remember(self, hint: Tensor, made: Tensor) -> Tensor:
        self.seen = [*self.seen[-_REMEMBERED:], (hint, _changes(hint), made)]
        return made


def _changes(hint: Tensor) -> int:
    return 0 if hint.is_inference() else hint._version  # in inference mode nobody counts them
