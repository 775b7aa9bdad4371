"""How far a control read back from a picture is from the one that was asked for."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


def depth_rmse(depth: Float[Tensor, "b h w"], wanted: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Root mean squared error of each depth map on the 0..255 scale; maps in 0..1 (ControlNet++, arXiv:2404.07987)."""
    return 255 * (depth.double() - wanted.double()).square().flatten(1).mean(1).sqrt()


def mask_iou(mask: Bool[Tensor, "b h w"], wanted: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Intersection over union of each pair of masks; 1 where both are empty."""
    both = (mask & wanted).flatten(1).sum(1).double()
    either = (mask | wanted).flatten(1).sum(1).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def overlap(classes: Int[Tensor, "b h w"], wanted: Int[Tensor, "b h w"], count: int) -> Float[Tensor, "b k 2"]:
    """Intersection and union in pixels of each of ``count`` classes: the rows from which :func:`miou` is made.

    Places whose wanted class is negative are unlabelled and count nowhere.
    """
    rows = []
    for seen, true in zip(classes, wanted, strict=True):
        known = true >= 0
        pairs = torch.bincount(true[known].long() * count + seen[known].long(), minlength=count**2)
        pairs = pairs.reshape(count, count).double()
        both = pairs.diagonal()
        rows.append(torch.stack([both, pairs.sum(0) + pairs.sum(1) - both], -1))
    return torch.stack(rows)


def miou(rows: Float[Tensor, "n k 2"]) -> float:
    """Mean over classes of the set's intersection over union; classes that appear nowhere are left out."""
    both, either = rows.sum(0).unbind(-1)
    return float((both / either)[either > 0].mean())


def nearest_colour(images: UInt8[Tensor, "b h w 3"], palette: UInt8[Tensor, "k 3"]) -> Int[Tensor, "b h w"]:
    """The index of the palette's colour nearest to each pixel: a segmentation image's classes."""
    red, green, blue = images.to(torch.int32).unbind(-1)
    codes = (red << 16) | (green << 8) | blue
    colours, places = torch.unique(codes, return_inverse=True)
    rgb = torch.stack([colours >> 16, (colours >> 8) & 255, colours & 255], -1)
    return torch.cdist(rgb.float(), palette.to(rgb.device).float()).argmin(1)[places]
