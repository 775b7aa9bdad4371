"""A small network that reads the controls of a scene back from its picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn


class Reading(NamedTuple):
    """What the network sees, at the picture's size.

    ``seg`` class logits; ``depth`` and ``edge`` in 0..1; ``joints`` logits that a pixel is each of the eighteen
    keypoints.
    """

    seg: Float[Tensor, "b k h w"]
    depth: Float[Tensor, "b 1 h w"]
    edge: Float[Tensor, "b 1 h w"]
    joints: Float[Tensor, "b 18 h w"]


def heat_of(
    keypoints: Float[Tensor, "b people 18 2"], size: int, sigma: float = 2.0
) -> Float[Tensor, "b 18 {size} {size}"]:
    """Where each joint is, as such a network should see it: Gaussians of a height of 1 around keypoints in pixels,
    the nearest person's counting; nothing around those that are ``nan``, because they are hidden."""
    grid = torch.arange(size, device=keypoints.device, dtype=torch.float32) + 0.5
    x = torch.exp(-((keypoints[..., 0, None] - grid) ** 2) / (2 * sigma**2)).nan_to_num()
    y = torch.exp(-((keypoints[..., 1, None] - grid) ** 2) / (2 * sigma**2)).nan_to_num()
    return (y[..., :, None] * x[..., None, :]).amax(1)


class PerceptionModel(ModelMixin, ConfigMixin):
    """A U-Net of depthwise-separable residual blocks on 2 x 2 patches; differentiable throughout.

    Args:
        classes: segmentation classes.
        widths: channels a level, finest (half the picture's size) first.
        depth: blocks a level.
    """

    @register_to_config
    def __init__(self, classes: int, widths: Sequence[int] = (32, 64, 96, 128), depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(12, widths[0], 3, padding=1)
        self.down = nn.ModuleList([_level(width, depth) for width in widths])
        self.shrink = nn.ModuleList([nn.Conv2d(a, b, 2, 2) for a, b in itertools.pairwise(widths)])
        self.grow = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(widths)])
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.up = nn.ModuleList([_level(width, depth) for width in widths[:-1]])
        self.head = nn.Conv2d(widths[0], 4 * (classes + 1 + 1 + 18), 3, padding=1)

    def forward(self, picture: Float[Tensor, "b 3 h w"]) -> Reading:
        """Read a picture in -1..1; height and width are multiples of 16."""
        x = self.stem(F.pixel_unshuffle(picture, 2))
        skips = []
        for index, level in enumerate(self.down):
            x = level(x)
            if index < len(self.shrink):
                skips.append(x)
                x = self.shrink[index](x)
        for index in reversed(range(len(self.up))):
            x = self.up[index](self.enlarge(self.grow[index](x)) + skips[index])
        classes = self.config["classes"]
        seg, depth, edge, joints = F.pixel_shuffle(self.head(x), 2).split([classes, 1, 1, 18], 1)
        return Reading(seg, depth.sigmoid(), edge.sigmoid(), joints)


def _level(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*[_Block(width) for _ in range(depth)])


class _Block(nn.Module):
    """Depthwise 5 x 5 mixing in space, then mixing across channels (the order of ConvNeXt, arXiv:2201.03545)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.gelu(self.expand(self.norm(self.space(x)))))
