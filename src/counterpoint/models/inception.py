"""The Inception network whose features define FID and KID.

Szegedy et al. 2015 (arXiv:1512.00567) with the changes of the TensorFlow graph of 2015-12-05 on which the published
numbers stand: average pools do not count their padding, the last block pools by maximum, there are 1008 classes. Names
and shapes are those of ``pt_inception-2015-12-05-6726825d``, the field's conversion of that graph; pictures are
enlarged as pytorch-fid does it, without antialiasing.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from counterpoint.models.weights import check_fit, shapes

FEATURES = 2048


class _Conv(nn.Module):
    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _Grid35(nn.Module):
    """5b, 5c, 5d."""

    def __init__(self, inside: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inside, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Conv(inside, 48, 1), _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inside, 64, 1), _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inside, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_pool(x))], 1
        )


class _Shrink35(nn.Module):
    """6a."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = _Conv(288, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(288, 64, 1), _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _Grid17(nn.Module):
    """6b to 6e."""

    def __init__(self, width: int) -> None:
        super().__init__()
        flat, tall = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = _Conv(768, width, 1), _Conv(width, width, **flat)
        self.branch7x7_3 = _Conv(width, 192, **tall)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(768, width, 1), _Conv(width, width, **tall)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(width, width, **flat), _Conv(width, width, **tall)
        self.branch7x7dbl_5 = _Conv(width, 192, **flat)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_pool(x))], 1)


class _Shrink17(nn.Module):
    """7a."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(768, 192, 1), _Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(768, 192, 1), _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, (7, 1), padding=(3, 0)), _Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, 2)], 1)


class _Grid8(nn.Module):
    """7b, and 7c with its maximum pool."""

    def __init__(self, inside: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        flat, tall = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = _Conv(inside, 320, 1)
        self.branch3x3_1 = _Conv(inside, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, **flat), _Conv(384, 384, **tall)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inside, 448, 1), _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, **flat), _Conv(384, 384, **tall)
        self.branch_pool = _Conv(inside, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.maximum else _pool(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """Pictures to the 2048 features before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, 2), _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80, 1), _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _Grid35(192, 32), _Grid35(256, 64), _Grid35(288, 64)
        self.Mixed_6a = _Shrink35()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_Grid17, (128, 160, 160, 192))
        self.Mixed_7a = _Shrink17()
        self.Mixed_7b, self.Mixed_7c = _Grid8(1280, False), _Grid8(2048, True)
        self.fc = nn.Linear(FEATURES, 1008)

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2048"]:
        """Features of pictures in 0..1, which are stretched to 299 pixels."""
        x = F.interpolate(pictures, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for block in (
            *(self.Mixed_5b, self.Mixed_5c, self.Mixed_5d),
            *(self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e),
            *(self.Mixed_7a, self.Mixed_7b, self.Mixed_7c),
        ):
            x = block(x)
        return x.mean((2, 3))


def load_inception(file: Path) -> Inception:
    """The network from a safetensors file with the published names.

    Raises:
        UserError: it is missing, a pickle, damaged, or of another network.
    """
    with torch.device("meta"):
        network = Inception()
    counters = [name for name in network.state_dict() if name.endswith(".num_batches_tracked")]
    found = {**dict.fromkeys(counters, ()), **shapes(file)}  # the published file has no counters, and none is needed
    check_fit(network.state_dict(), found, file)
    state = {**{name: torch.tensor(0) for name in counters}, **load_file(file)}
    network.load_state_dict(state, assign=True)
    return network.float().eval()
