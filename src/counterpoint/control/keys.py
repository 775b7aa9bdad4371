"""KV-injection: the foreground branch lends its keys and values to the background's (Cross-ControlNet, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.types import Keys, Moment, UserError

KeyValues = dict[str, tuple[Tensor, Tensor]]
"""Layer -> its keys and values, ``(b, tokens, channels)`` each, before they are split into heads."""
Masks = Float[Tensor, "k b 1 h w"]
"""Where each of k foregrounds is, in 0..1, at the latents' resolution."""


@dataclass(eq=False)
class Lending:
    """KV-injection over a sampling run: whose keys go to everybody else, and where.

    Attributes:
        places: foreground's name -> for each sample, the positions of its subject's tokens; its mask is read from the
            host at the step before.
        masks: foreground's name -> where it is, one a sample: given, or filled as the host is watched.
    """

    places: Mapping[str, Sequence[Sequence[int]]]
    masks: dict[str, Float[Tensor, "b 1 h w"]] = field(default_factory=dict)

    @property
    def foregrounds(self) -> set[str]:
        """Their names."""
        return {*self.places, *self.masks}

    def active(self, keys: Keys | None, moment: Moment) -> bool:
        """Whether a rule lends keys at a step: not before every foreground has a mask."""
        if keys is None or self.foregrounds != set(self.masks):
            return False
        return moment.progress >= keys.start and moment.sigma <= keys.sigma


def self_attention(network: nn.Module, first: int = 0) -> dict[str, Attention]:
    """A ControlNet's self-attention layers by name, in the order in which they run, from layer ``first`` on."""
    layers = {name: module for name, module in network.named_modules() if name.endswith(".attn1")}
    return from_layer(network, layers, first)


def from_layer(network: nn.Module, layers: Mapping[str, Any], first: int) -> dict[str, Any]:
    """A network's attention layers from one on.

    Raises:
        UserError: it has fewer.
    """
    if first >= len(layers) > 0:
        raise UserError(
            f"{type(network).__name__} has {len(layers)} self-attention layers, so layer={first} is too many"
        )
    return dict(list(layers.items())[first:])


def refuse_fused(network: nn.Module) -> None:
    """Hooks on keys and values see nothing where queries, keys and values are one projection.

    Raises:
        UserError: some are.
    """
    if any(map(_is_fused, network.modules())):
        raise UserError(f"fused projections hide a {type(network).__name__}'s keys: call unfuse_qkv_projections()")


def _is_fused(module: nn.Module) -> bool:
    """diffusers' ``unfuse_qkv_projections`` puts the processors back and leaves the mark."""
    if isinstance(module, Attention):
        return type(module.processor).__name__.startswith("Fused")
    return bool(getattr(module, "fused_projections", False))


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
    levels = split_levels(masks)
    return attending(self_attention(network, first), lambda name: _Injected(name, foregrounds, levels))


@contextmanager
def attending(layers: Mapping[str, Any], processor: Callable[[str], Any]) -> Iterator[None]:
    """Give attention layers other processors, one made for each name."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.set_processor, layer.processor)
            layer.set_processor(processor(name))
        yield


@dataclass(frozen=True, eq=False)
class Part:
    """The tokens that a mask leaves anything of: what it throws away is neither asked nor heard.

    Attributes:
        index: their places, ``(b, m)``; m is the largest number in a sample, others are filled up with any.
        share: how much of each there is, ``(b, m)``; 0 for those that fill up.
        whole: whether all of it is 1.
    """

    index: Tensor
    share: Tensor
    whole: bool

    @classmethod
    def of(cls, mask: Float[Tensor, "b t"]) -> Part:
        """The part of a mask."""
        left = (mask > 0).int()
        index = left.argsort(dim=1, descending=True, stable=True)[:, : int(left.sum(1).max())]
        share = mask.gather(1, index)
        return cls(index, share, bool((share == 1).all()))

    def take(self, x: Float[Tensor, "b n t d"]) -> Float[Tensor, "b n m d"]:
        """These tokens of all."""
        if self.index.shape[1] == x.shape[2] and self.whole:
            return x
        return x.gather(2, self._places(x))

    def add(self, total: Float[Tensor, "b n t d"], x: Float[Tensor, "b n m d"]) -> Tensor:
        """Put what was made for these tokens, as far as there is anything of them, on top of a total."""
        return total.scatter_add(2, self._places(x), self.share[:, None, :, None].to(x.dtype) * x)

    def _places(self, x: Tensor) -> Tensor:
        return self.index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def split(shares: Float[Tensor, "k b t"]) -> tuple[Part, ...]:
    """The part of each foreground's mask, then that of what no mask covers. Masks sum to at most 1."""
    outside = (1 - shares.sum(0)).clamp(min=0)  # rounding may leave less than nothing
    return tuple(map(Part.of, (*shares, outside)))


def split_levels(masks: Masks) -> Callable[[int], tuple[Part, ...]]:
    """Number of tokens -> the parts of masks where a layer has so many."""
    shares = masks / masks.sum(0).clamp(min=1)
    return cache(lambda tokens: split(at_tokens(shares, tokens)))


def inject(
    query: Float[Tensor, "b n t d"],
    own: tuple[Tensor, Tensor],
    foregrounds: Sequence[tuple[Tensor, Tensor]],
    parts: Sequence[Part],
    always: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "b n t d"]:
    """Attention of a background branch with k foregrounds' keys and values (Eq. 9, for any k).

    ``sum_k M_k Attn_k + M_b Attn_b``, where ``Attn_k`` sees foreground k inside its mask and ``Attn_b`` the background
    everywhere and every foreground outside all masks, ``M_b = 1 - sum_k M_k``. In the logits a mask belongs to the
    keys, outside to the queries. With hard masks this costs at most 1 + k attentions, less the more the masks cover.

    Args:
        query: of the background, n heads.
        own: its keys and values, ``(b, n, t, d)``.
        foregrounds: theirs.
        parts: of their masks, from :func:`split`.
        always: keys and values that every query sees everywhere, such as a text's.
    """
    *insides, outside = parts
    result = torch.zeros_like(query)
    for part, pair in zip(insides, foregrounds, strict=True):
        result = _attend(result, query, part, [] if always is None else [always], [pair])
    return _attend(result, query, outside, [own] if always is None else [always, own], foregrounds)


def _attend(
    total: Tensor,
    query: Tensor,
    part: Part,
    everywhere: Sequence[tuple[Tensor, Tensor]],
    within: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Add the attention of a part's queries to pairs of keys and values, to some everywhere, to others within it."""
    if part.index.shape[1] == 0:
        return total
    keys, values = (
        torch.cat([*(pair[i] for pair in everywhere), *(part.take(pair[i]) for pair in within)], 2) for i in (0, 1)
    )
    mask = None
    if not part.whole:
        ones = part.share.new_ones(len(query), keys.shape[2] - len(within) * part.share.shape[1])
        seen = torch.cat([ones, *[part.share] * len(within)], 1)
        seen = torch.where(seen.any(1, keepdim=True), seen, 1.0)  # who sees nothing has no weight in the total either
        mask = seen.log()[:, None, None].to(query.dtype)
    said = F.scaled_dot_product_attention(part.take(query), keys, values, attn_mask=mask)
    return part.add(total, said)


class _Injected:
    """An attention processor for one layer."""

    def __init__(self, name: str, foregrounds: Sequence[KeyValues], levels: Callable[[int], tuple[Part, ...]]) -> None:
        self.name, self.foregrounds, self.levels = name, foregrounds, levels

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        own = heads(attn.to_k(hidden_states)), heads(attn.to_v(hidden_states))
        kept = [foreground[self.name] for foreground in self.foregrounds]
        theirs = [(heads(key), heads(value)) for key, value in kept]
        mixed = inject(heads(attn.to_q(hidden_states)), own, theirs, self.levels(hidden_states.shape[1]))
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
