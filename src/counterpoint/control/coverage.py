"""Where a control has something to say (ours): its silent value, black for edges and poses, is no control there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.types import CONTROL_KINDS, ControlKind, Fusion, Notice, UserError, kind_of, meaning

REACH = 1 / 16
"""How far around its lines a control speaks, as a share of the picture's shorter side."""
_UNGATED = ("sum", "minimal-impact")


class UnknownKind(Notice):
    """A control whose name is nearly a kind."""


def coverage(hint: Float[Tensor, "b 3 h w"], kind: ControlKind, reach: float = REACH) -> Float[Tensor, "b 1 h w"]:
    """1 where a condition image shows more than its silent value, falling smoothly to 0 within twice ``reach``.

    Args:
        hint: condition images in 0..1.
        kind: tells the silent value.
        reach: share of the shorter side.

    Raises:
        UserError: every value of the kind means something, as in depth maps: a mask must say where it speaks.
    """
    if kind.silent is None:
        raise UserError(f"{kind.name} has no silent value: say with a mask where it speaks")
    radius = max(1, round(reach * min(hint.shape[2:])))
    active = ((hint.float() - kind.silent / 255).abs().amax(1, keepdim=True) > 0.05).float()
    wide = F.max_pool2d(active, (1, 2 * radius + 1), 1, (0, radius))  # a square's maximum is that of its columns'
    grown = F.max_pool2d(wide, (2 * radius + 1, 1), 1, (radius, 0))
    return _blur(grown, radius / 3).clamp(0, 1).to(hint.dtype)


def is_silenced(name: str) -> bool:
    """Whether a control's name, ``kind`` or ``kind:label``, tells that part of its picture may say nothing."""
    return meaning(name).silent is not None


def gates(asked: bool | None, fusion: Fusion, names: Collection[str]) -> bool:
    """Whether silence is gated: as asked, and by default where several controls meet under any rule but ``sum``, which
    is what every tool does, and ``minimal-impact``, whose networks learn what to make of silence. One control alone has
    nobody to wipe out, and its black means what it was trained to mean.
    """
    if asked is not None:
        return asked
    return len(names) > 1 and _silences(fusion) and any(map(is_silenced, names))


def warn_of_names(fusion: Fusion, names: Collection[str]) -> None:
    """Say so where silence is gated and a control's name is nearly a kind: nobody will know what its silence is."""
    for name in names if len(names) > 1 and _silences(fusion) else ():
        kind = kind_of(name)
        near = [one for one in CONTROL_KINDS if one in kind] or get_close_matches(kind, CONTROL_KINDS, 1)
        if kind not in CONTROL_KINDS and near:
            warnings.warn(
                f"{kind!r} is no kind of control, so its silent value is not known: call it {near[0]!r}, "
                f"or {near[0]}:{kind}",
                UnknownKind,
                stacklevel=5,
            )


def _silences(fusion: Fusion) -> bool:
    return any(rule.name.partition(":")[0] not in _UNGATED for rule in fusion.rules)


def covered(name: str, hint: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"] | None:
    """The coverage of a control by its name; ``None`` if its kind has no silence."""
    return coverage(hint, meaning(name)) if is_silenced(name) else None


def _blur(maps: Float[Tensor, "b 1 h w"], sigma: float) -> Float[Tensor, "b 1 h w"]:
    reach = math.ceil(3 * sigma)
    places = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    maps = F.conv2d(F.pad(maps, (reach, reach, 0, 0), mode="replicate"), kernel[None, None, None])
    return F.conv2d(F.pad(maps, (0, 0, reach, reach), mode="replicate"), kernel[None, None, :, None])
