"""Measures that are ready to use: of each name, what makes a fresh one of the networks that it needs.

>>> metric = METRICS["ssim"]()
>>> metric.update(pictures, references)
>>> metric.compute()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.metrics.boundary import boundary_f, outlines
from counterpoint.metrics.distribution import frechet_from, kernel_from
from counterpoint.metrics.lpips import lpips
from counterpoint.metrics.maps import depth_rmse, mask_iou, miou, overlap
from counterpoint.metrics.metric import Metric, Reduce
from counterpoint.metrics.niqe import ENLARGED, Pristine, enlarged, is_small, luma, niqe
from counterpoint.metrics.similarity import ms_ssim, mse, psnr, ssim
from counterpoint.metrics.text import clip_score
from counterpoint.types import UserError

Pictures = Float[Tensor, "b 3 h w"]
"""Values in 0..1."""
Embed = Callable[[Tensor], Tensor]
"""Pictures -> features ``(b, d)``."""
MOST_COLOURS = 512
"""Colours of a pair of segmentation images above which one of them is none."""


def _pairs(name: str, measure: Callable[..., Tensor], *, higher: bool = True) -> Callable[[], Metric]:
    """``update(pictures, references)``, no network."""
    return lambda: Metric(name, measure, higher=higher)


def _sets(name: str, distance_from: Callable[[Tensor], Reduce]) -> Callable[[Embed, Tensor], Metric]:
    """``update(pictures)``, of an embedding and the features ``(m, d)`` of the set that they are compared with."""
    return lambda embed, references: Metric(name, embed, distance_from(references), higher=False, distinct=True)


def _natural(pristine: Pristine) -> Metric:
    """NIQE, ``update(pictures)``; the note tells of pictures that were enlarged first."""

    def measure(pictures: Pictures) -> Tensor:
        metric.note = ENLARGED if is_small(pictures) else ""
        return niqe(luma(enlarged(pictures)), pristine)

    metric = Metric("niqe", measure, higher=False)
    return metric


def _likeness(embed_pictures: Embed, embed_texts: Callable[[Sequence[str]], Tensor]) -> Metric:
    """CLIP score, ``update(pictures, texts)``."""
    return Metric("clip", lambda pictures, texts: clip_score(embed_pictures(pictures), embed_texts(texts)))


def _perceptual(features: Callable[[Tensor], Sequence[Tensor]], weights: Sequence[Tensor]) -> Metric:
    """LPIPS, ``update(pictures, references)``, of a backbone and its heads."""
    return Metric("lpips", lambda one, other: lpips(features(one), features(other), weights), higher=False)


def _grey(pictures: Pictures) -> Float[Tensor, "b h w"]:
    return pictures.mean(1)


def _mask(pictures: Pictures) -> Tensor:
    """Whatever is bright in some colour."""
    return pictures.amax(1) > 0.5


def _classes(pictures: Pictures, references: Pictures) -> tuple[Int[Tensor, "b h w"], Int[Tensor, "b h w"], int]:
    """Every colour of either is a class."""
    both = (torch.stack([pictures, references]) * 255).round().int()
    codes = both[:, :, 0] << 16 | both[:, :, 1] << 8 | both[:, :, 2]
    colours, classes = torch.unique(codes, return_inverse=True)
    if len(colours) > MOST_COLOURS:
        raise UserError(
            f"segmentation images have few colours, these two have {len(colours)}: one is a photograph or a JPEG"
        )
    return classes[0], classes[1], len(colours)


def _pair_miou(pictures: Pictures, references: Pictures) -> Tensor:
    """Each pair has its own classes, so the mean is over pairs."""
    pairs = zip(pictures[:, None].unbind(), references[:, None].unbind(), strict=True)
    return torch.tensor([miou(overlap(*_classes(*pair))) for pair in pairs], dtype=torch.float64)


def _boundary(pictures: Pictures, references: Pictures) -> Tensor:
    found, wanted, _ = _classes(pictures, references)
    return boundary_f(outlines(found), outlines(wanted))


METRICS: dict[str, Callable[..., Metric]] = {
    "niqe": _natural,
    "clip": _likeness,
    "psnr": _pairs("psnr", psnr),
    "mse": _pairs("mse", mse, higher=False),
    "ssim": _pairs("ssim", ssim),
    "ms_ssim": _pairs("ms_ssim", ms_ssim),
    "lpips": _perceptual,
    "depth_rmse": _pairs("depth_rmse", lambda a, b: depth_rmse(_grey(a), _grey(b)), higher=False),
    "mask_iou": _pairs("mask_iou", lambda a, b: mask_iou(_mask(a), _mask(b))),
    "miou": _pairs("miou", _pair_miou),
    "boundary_f": _pairs("boundary_f", _boundary),
    "fid": _sets("fid", frechet_from),
    "kid": _sets("kid", kernel_from),
    "tower_fid": _sets("tower_fid", frechet_from),
    "tower_kid": _sets("tower_kid", kernel_from),
}
"""Name -> measure. ``fid`` and ``kid`` are for Inception's features; on a CLIP's image tower it is ``tower_fid`` and
``tower_kid``, so that nobody confuses them."""
