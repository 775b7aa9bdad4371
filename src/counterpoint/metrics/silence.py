"""What happens where a control speaks, and where it is silent (Minimal Impact ControlNet, ICLR 2025, section 5.2)."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

Pictures = Float[Tensor, "b c h w"]
Region = Bool[Tensor, "b h w"]


def l1_cycle(found: Pictures, wanted: Pictures, region: Region) -> Float[Tensor, " b"]:
    """Mean absolute difference of the condition found in a picture and the one asked for, where it speaks.

    Values in 0..1. The paper names neither scale nor region; ours are these. ``nan`` where a region is empty.
    """
    return _mean((found.double() - wanted.double()).abs().mean(1), region)


def total_variance(pictures: Pictures, region: Region) -> Float[Tensor, " b"]:
    """Trace of the covariance of a picture's colours inside a region, on the 0..255 scale; pictures in 0..1.

    More texture, more variance. The paper gives no formula; this one has its table's magnitude (10^4).
    """
    pixels = pictures.double() * 255
    centre = _mean(pixels, region[:, None])[..., None, None]
    return _mean((pixels - centre).square().sum(1), region)


def _mean(values: Tensor, region: Tensor) -> Tensor:
    weight = region.double()
    return (values * weight).flatten(-2).sum(-1) / weight.flatten(-2).sum(-1)
