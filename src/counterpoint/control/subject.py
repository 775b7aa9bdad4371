"""Where the host paints a word: its cross-attention to the word's tokens (Cross-ControlNet, section 3.3)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.control.keys import Lending, refuse_fused

THRESHOLD = 0.5
"""Of the map, stretched to 0..1: above it is foreground. The paper names no value."""
_SIDE = 16
"""Side of the maps that the paper averages; the level that comes nearest is watched."""


class SubjectMap:
    """What a host's cross-attention says about one subject, over one forward pass.

    Args:
        places: for each sample the positions of the subject's tokens among the text embeddings.
        size: rows and columns of the latents.
        level: how often they are halved where the host is watched.
    """

    def __init__(self, places: Sequence[Sequence[int]], size: tuple[int, int], level: int) -> None:
        self.places = places
        self.grid = (math.ceil(size[0] / 2**level), math.ceil(size[1] / 2**level))
        self.total: Tensor | None = None
        self.weights: Tensor | None = None

    def add(self, query: Float[Tensor, "b t c"], key: Float[Tensor, "b s c"], layer: Attention) -> None:
        """Take in one layer; of a guided batch the conditional half, which comes last, serves both."""
        n = len(self.places)
        q, k = (x[-n:].reshape(n, x.shape[1], layer.heads, -1).transpose(1, 2).float() for x in (query, key))
        attention = (q @ k.transpose(2, 3) * layer.scale).softmax(-1).mean(1)
        if self.weights is None:
            self.weights = torch.zeros(n, key.shape[1])
            for row, places in zip(self.weights, self.places, strict=True):
                row[list(places)] = 1 / len(places)
            self.weights = self.weights.to(attention.device)
        found = torch.einsum("bts,bs->bt", attention, self.weights)
        self.total = found if self.total is None else self.total + found

    def mask(self, threshold: float = THRESHOLD) -> Float[Tensor, "b 1 h w"]:
        """1 where the subject is: where the smoothed map, stretched to 0..1 in each sample, exceeds a threshold."""
        assert self.total is not None
        maps = self.total.reshape(-1, 1, *self.grid)
        kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], device=maps.device)[None, None] / 16
        smooth = F.conv2d(F.pad(maps, (1,) * 4, mode="replicate"), kernel)
        low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
        stretched = torch.where(high > low, (smooth - low) / (high - low), 0.0)
        return (stretched > threshold).float()


@contextmanager
def watching(unet: nn.Module, places: Sequence[Sequence[int]], size: tuple[int, int]) -> Iterator[SubjectMap]:
    """Watch where the host's next forward pass paints a subject; what it computes does not change."""
    refuse_fused(unet)
    levels = _levels(unet)
    level = min(levels, key=lambda one: abs(math.log2(math.sqrt(size[0] * size[1]) / 2**one / _SIDE)))
    found = SubjectMap(places, size, level)
    with ExitStack() as stack:
        for layer in levels[level]:
            queries: list[Tensor] = []

            def ask(_: nn.Module, __: Any, output: Tensor, queries: list[Tensor] = queries) -> None:
                queries.append(output)

            def answer(
                _: nn.Module, __: Any, output: Tensor, queries: list[Tensor] = queries, layer: Attention = layer
            ) -> None:
                found.add(queries.pop(), output, layer)

            stack.callback(layer.to_q.register_forward_hook(ask).remove)
            stack.callback(layer.to_k.register_forward_hook(answer).remove)
        yield found


@contextmanager
def finding_subjects(unet: nn.Module, lending: Lending | None, size: tuple[int, int]) -> Iterator[None]:
    """Let the host's next forward pass tell where the foregrounds are whose subjects were named."""
    places = {} if lending is None else lending.places
    with ExitStack() as stack:
        seen = {name: stack.enter_context(watching(unet, one, size)) for name, one in places.items()}
        yield
    if lending is not None:
        lending.masks.update({name: found.mask() for name, found in seen.items()})


def _levels(unet: Any) -> dict[int, list[Attention]]:
    """Halvings of the latents -> the host's cross-attention layers there."""
    levels: dict[int, list[Attention]] = {}
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            place = re.match(r"(down|up)_blocks\.(\d+)|mid_block", name)
            assert place is not None
            last = len(unet.down_blocks) - 1
            side = {"down": int(place[2] or 0), "up": last - int(place[2] or 0)}.get(place[1], last)
            levels.setdefault(side, []).append(module)
    return levels
