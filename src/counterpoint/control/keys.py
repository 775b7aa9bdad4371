"""KV-injection: the foreground branch lends its keys and values to the background's (Cross-ControlNet, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.types import Moment, UserError

KeyValues = dict[str, tuple[Tensor, Tensor]]
"""Layer -> its keys and values, ``(b, tokens, channels)`` each, before they are split into heads."""
Masks = Float[Tensor, "k b 1 h w"]
"""Where each of k foregrounds is, in 0..1, at the latents' resolution."""


@dataclass(eq=False)
class Lending:
    """KV-injection over a sampling run: whose keys go to everybody else, where, and from when on.

    Attributes:
        places: foreground's name -> for each sample, the positions of its subject's tokens; its mask is read from the
            host at the step before.
        masks: foreground's name -> where it is, one a sample: given, or filled as the host is watched.
        start: share of the steps after which keys are lent (5 of 50 in the paper).
        first: first self-attention layer that takes part.
    """

    places: Mapping[str, Sequence[Sequence[int]]]
    masks: dict[str, Float[Tensor, "b 1 h w"]] = field(default_factory=dict)
    start: float = 0.1
    first: int = 0

    @property
    def foregrounds(self) -> set[str]:
        """Their names."""
        return {*self.places, *self.masks}

    def active(self, moment: Moment) -> bool:
        """Whether keys are lent at a step: not before every foreground has a mask."""
        return moment.progress >= self.start and self.foregrounds == set(self.masks)


def self_attention(network: nn.Module, first: int = 0) -> dict[str, Attention]:
    """A ControlNet's self-attention layers by name, in the order in which they run, from layer ``first`` on."""
    layers = {name: module for name, module in network.named_modules() if name.endswith(".attn1")}
    return dict(list(layers.items())[first:])


def refuse_fused(network: nn.Module) -> None:
    """Hooks on keys and values see nothing where queries, keys and values are one projection.

    Raises:
        UserError: some are.
    """
    if any(getattr(module, "fused_projections", False) for module in network.modules()):
        raise UserError(f"fused projections hide a {type(network).__name__}'s keys: call unfuse_qkv_projections()")


def keeping_keys(network: nn.Module, kept: KeyValues, first: int = 0) -> AbstractContextManager[None]:
    """Let a foreground branch leave its keys and values in ``kept``; what it computes does not change."""
    sources = {name: (layer.to_k, layer.to_v) for name, layer in self_attention(network, first).items()}
    return keeping(network, sources, kept)


@contextmanager
def keeping(network: nn.Module, sources: Mapping[str, tuple[nn.Module, nn.Module]], kept: KeyValues) -> Iterator[None]:
    """Keep what a network's layers compute.

    Args:
        network: refused if its projections are fused.
        sources: layer -> the modules whose outputs are its keys and its values.
        kept: where they go.
    """
    refuse_fused(network)
    halves: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, place: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            halves[name, place] = output
            if (name, 1 - place) in halves:
                kept[name] = (halves.pop((name, 0)), halves.pop((name, 1)))

        return hook

    with ExitStack() as stack:
        for name, modules in sources.items():
            for place, module in enumerate(modules):
                stack.callback(module.register_forward_hook(keep(name, place)).remove)
        yield


def injecting_keys(
    network: nn.Module, foregrounds: Sequence[KeyValues], masks: Masks, first: int = 0
) -> AbstractContextManager[None]:
    """Let a background branch attend to what foreground branches left, inside and outside their masks.

    Args:
        network: of the background.
        foregrounds: what each foreground left at this step.
        masks: where each is; with classifier-free guidance for both halves.
        first: first layer that takes part.
    """
    shares = masks / masks.sum(0).clamp(min=1)
    return attending(self_attention(network, first), lambda name: _Injected(name, foregrounds, shares))


@contextmanager
def attending(layers: Mapping[str, Any], processor: Callable[[str], Any]) -> Iterator[None]:
    """Give attention layers other processors, one made for each name."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.set_processor, layer.processor)
            layer.set_processor(processor(name))
        yield


def inject(
    query: Float[Tensor, "b n t d"],
    own: tuple[Tensor, Tensor],
    foregrounds: Sequence[tuple[Tensor, Tensor]],
    shares: Float[Tensor, "k b t"],
    always: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "b n t d"]:
    """Attention of a background branch with k foregrounds' keys and values (Eq. 9, for any k).

    ``sum_k M_k Attn_k + M_b Attn_b``, where ``Attn_k`` sees foreground k inside its mask and ``Attn_b`` the background
    everywhere and every foreground outside all masks, ``M_b = 1 - sum_k M_k``. In the logits a mask belongs to the
    keys, outside to the queries.

    Args:
        query: of the background, n heads.
        own: its keys and values, ``(b, n, t, d)``.
        foregrounds: theirs.
        shares: their masks, which sum to at most 1.
        always: keys and values that every query sees everywhere, such as a text's.
    """
    outside = (1 - shares.sum(0)).clamp(min=0)  # rounding may leave less than nothing
    first = [] if always is None else [always]
    ones = torch.ones(len(outside), always[0].shape[2] if always else 0, device=outside.device, dtype=outside.dtype)

    def attend(pairs: Sequence[tuple[Tensor, Tensor]], seen: Sequence[Tensor]) -> Tensor:
        keys, values = (torch.cat([pair[i] for pair in (*first, *pairs)], 2) for i in (0, 1))
        return _attend(query, keys, values, torch.cat([ones, *seen], 1))

    everywhere = torch.ones_like(outside)
    background = attend([own, *foregrounds], [everywhere, *[outside] * len(foregrounds)])
    result = _column(outside, query) * background
    for share, pair in zip(shares, foregrounds, strict=True):
        result = result + _column(share, query) * attend([pair], [share])
    return result


class _Injected:
    """An attention processor for one layer."""

    def __init__(self, name: str, foregrounds: Sequence[KeyValues], shares: Masks) -> None:
        self.name, self.foregrounds, self.shares = name, foregrounds, shares

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        own = heads(attn.to_k(hidden_states)), heads(attn.to_v(hidden_states))
        kept = [foreground[self.name] for foreground in self.foregrounds]
        theirs = [(heads(key), heads(value)) for key, value in kept]
        shares = at_tokens(self.shares, hidden_states.shape[1]).to(hidden_states.dtype)
        mixed = inject(heads(attn.to_q(hidden_states)), own, theirs, shares)
        out: Tensor = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return out


def at_tokens(masks: Masks, tokens: int) -> Float[Tensor, "k b t"]:
    """Masks of the latents' size at a layer that has ``tokens`` places: that size, halved and rounded up so often."""
    height, width = masks.shape[-2:]
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != tokens:
        raise ValueError(f"masks of {tuple(masks.shape[-2:])} have no level with {tokens} places")
    return F.interpolate(masks.flatten(0, 1), size=(height, width), mode="area").reshape(*masks.shape[:2], tokens)


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Float[Tensor, "b t"]) -> Tensor:
    """Attention to keys as far as they are seen; where a sample sees none, to all (its result has no weight then)."""
    seen = torch.where(seen.any(1, keepdim=True), seen, 1.0)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen.log()[:, None, None].to(query.dtype))


def _column(share: Float[Tensor, "b t"], query: Tensor) -> Tensor:
    return share[:, None, :, None].to(query.dtype)
