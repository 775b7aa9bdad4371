"""What a run's operations cost at least: each one's arithmetic at this machine's best rate, or its bytes at the rate of
copying, whichever takes longer (ours)."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from counterpoint.models.pace import quickest

FAR = 2**28
"""Bytes that are copied to measure memory: more than a cache holds."""
PICKED = ("index", "index_select", "gather", "embedding")
"""Operations that read no more than they make, however large what they read from is."""


uncounted = _disable_current_modes
"""A context in which nothing is counted: for what is only made ready."""


@dataclass(frozen=True)
class Operation:
    """What one operation needs.

    Attributes:
        kind: which of a machine's rates holds: ``matrix``, ``conv`` or ``attention``.
        dtype: in which it counts.
        flops: of its arithmetic; 0 where torch knows no formula.
        moved: bytes that it reads and writes.
    """

    kind: str
    dtype: torch.dtype
    flops: float
    moved: int


Operations = Mapping[Operation, float]
"""Operations, and how often each is done."""


@dataclass(frozen=True)
class Work:
    """Arithmetic operations, bytes that are read and written, and the seconds below which both cannot fall here."""

    flops: float
    moved: float
    seconds: float


def work(operations: Operations, device: torch.device) -> Work:
    """What operations come to on a device."""
    flops = moved = seconds = 0.0
    for one, times in operations.items():
        best = rates(device, one.dtype if one.flops else torch.float32)
        flops, moved = flops + times * one.flops, moved + times * one.moved
        seconds += times * max(one.flops / getattr(best, one.kind), one.moved / best.bandwidth)
    return Work(flops, moved, seconds)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what operations make: bytes that live at once, and every operation. What makes nothing new, such as a
    view or what works in place, does not count.

    Args:
        blocked: whether a convolution holds copies of its input and output in an order of its own.
    """

    def __init__(self, blocked: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.blocked, self.live = blocked, 0
        self._known: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """A new part; what is alive stays."""
        self.peak = self.live
        self.operations: Counter[Operation] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func.is_view:  # of a weight, say, which nobody has seen made
            return made
        fresh, dtype, name = 0, torch.float32, func._overloadpacket.__name__
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        old = {one.untyped_storage()._cdata for one in given}  # what works in place makes nothing
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in old:
                    fresh += storage.nbytes()
                    self._known.add(storage._cdata)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                dtype = tensor.dtype if tensor.is_floating_point() else dtype
        self.live += fresh
        convolved = "conv" in name
        read = sum(map(_read, given))
        self.peak = max(self.peak, self.live + (fresh + read if convolved and self.blocked else 0))
        if fresh and not name.startswith(("empty", "new_empty")):
            kind = "conv" if convolved else "attention" if "attention" in name else "matrix"
            moved = fresh + (fresh if name in PICKED else read)
            self.operations[Operation(kind, dtype, _flops(func, args, kwargs, made), moved)] += 1
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _read(tensor: Tensor) -> int:
    """Bytes behind a tensor, of which an expanded one has fewer than numbers."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(func: Any, args: Any, kwargs: Any, made: Any) -> float:
    packet = func._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=made))
    if "scaled_dot_product" in packet.__name__:  # the CPU's own, which torch does not count
        query, key = args[1:3] if "backward" in packet.__name__ else args[:2]
        products = 5 if "backward" in packet.__name__ else 2  # of matrices: gradients of three, and the scores again
        return float(2 * products * query.numel() * key.shape[-2])
    return 0.0


@dataclass(frozen=True)
class Rates:
    """Operations a second of matrix products, convolutions and attention, and bytes a second that are read and
    written, at best."""

    matrix: float
    conv: float
    attention: float
    bandwidth: float


@cache
def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """This machine's best at some shapes of a UNet, on an accelerator of a large one."""
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
    return Rates(
        max(product(side * large_batch) for side in (512, 768, 1024)),
        max(convolution(width, side, order) for width, side in ((320, 32), (640, 16)) for order in orders),
        4 * query.numel() * 1024 / quickest(device, lambda: F.scaled_dot_product_attention(query, query, query)),
        2 * FAR / quickest(device, lambda: there.copy_(far)),
    )
