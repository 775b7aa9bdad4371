"""The networks that draw soft edges and lines, with the names of their published files; differentiable throughout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from counterpoint.models.weights import check_fit, shapes

Pictures = Float[Tensor, "b 3 h w"]
"""Values in 0..1."""
Lines = Float[Tensor, "b 1 h w"]
"""White on black, in 0..1."""


class HedNetwork(nn.Module):
    """Holistically-nested edges (Xie and Tu 2015, arXiv:1504.06375), in the form that ControlNet's annotator uses.

    Five stages of convolutions, each with a map of its own; the mean of the five, squashed. The published file is
    ``ControlNetHED.pth``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        widths = (3, 64, 128, 256, 512, 512)
        for stage, depth in enumerate((2, 2, 3, 3, 3), 1):
            self.add_module(f"block{stage}", _HedBlock(widths[stage - 1], widths[stage], depth))

    def forward(self, pictures: Pictures) -> Lines:
        """Edges of pictures."""
        x, maps = 255 * pictures - self.norm, []
        for stage in range(1, 6):
            x = F.max_pool2d(x, 2, 2) if stage > 1 else x
            x, side = self.get_submodule(f"block{stage}")(x)
            maps.append(F.interpolate(side, pictures.shape[2:], mode="bilinear", align_corners=False))
        return torch.stack(maps).mean(0).sigmoid()


class _HedBlock(nn.Module):
    def __init__(self, inside: int, width: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(inside if i == 0 else width, width, 3, padding=1) for i in range(depth)])
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = conv(x).relu()
        return x, self.projection(x)


class LineNetwork(nn.Module):
    """Line drawings (Chan et al. 2022, arXiv:2203.12691), the generator behind ControlNet's ``lineart``.

    The published files are ``sk_model.pth`` (realistic) and ``sk_model2.pth`` (coarse). Sides are multiples of 4.

    Args:
        depth: residual blocks.
    """

    def __init__(self, depth: int = 3) -> None:
        super().__init__()

        def fresh(*layers: nn.Module, width: int) -> list[nn.Module]:
            return [*layers, nn.InstanceNorm2d(width), nn.ReLU()]

        self.model0 = nn.Sequential(*fresh(nn.ReflectionPad2d(3), nn.Conv2d(3, 64, 7), width=64))
        self.model1 = nn.Sequential(
            *fresh(nn.Conv2d(64, 128, 3, 2, 1), width=128), *fresh(nn.Conv2d(128, 256, 3, 2, 1), width=256)
        )
        self.model2 = nn.Sequential(*[_LineBlock(256) for _ in range(depth)])
        self.model3 = nn.Sequential(
            *fresh(nn.ConvTranspose2d(256, 128, 3, 2, 1, 1), width=128),
            *fresh(nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), width=64),
        )
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())

    def forward(self, pictures: Pictures) -> Lines:
        """Lines of pictures; the network itself draws in black on white."""
        return 1 - self.model4(self.model3(self.model2(self.model1(self.model0(pictures)))))


class _LineBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.conv_block = nn.Sequential(
            *half, nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class AnimeLineNetwork(nn.Module):
    """Line drawings of anime (Anime2Sketch), a U-Net of eight halvings (pix2pix, arXiv:1611.07004).

    The published file is ``netG.pth``. Pictures are stretched to multiples of 256, as ControlNet's annotator does.
    """

    def __init__(self) -> None:
        super().__init__()
        block = _UNetLevel(512, 512, None)
        for outside, inside in ((512, 512),) * 3 + ((256, 512), (128, 256), (64, 128)):
            block = _UNetLevel(outside, inside, block)
        self.model = _UNetLevel(1, 64, block, colours=3)

    def forward(self, pictures: Pictures) -> Lines:
        """Lines of pictures; the network itself draws in black on white."""
        height, width = pictures.shape[2:]
        size = height + -height % 256, width + -width % 256
        drawn = self.model(2 * F.interpolate(pictures, size, mode="bicubic") - 1)
        drawn = F.interpolate(drawn, (height, width), mode="bicubic")
        return ((1 - drawn) / 2).clamp(0, 1)


class _UNetLevel(nn.Module):
    """Halves, goes through the level within, and doubles; all but the outermost keep what came in beside it."""

    def __init__(self, outside: int, inside: int, within: nn.Module | None, colours: int | None = None) -> None:
        super().__init__()
        self.outermost = colours is not None
        down = nn.Conv2d(colours or outside, inside, 4, 2, 1)
        up = nn.ConvTranspose2d(inside if within is None else 2 * inside, outside, 4, 2, 1)
        if within is None:
            layers = [nn.LeakyReLU(0.2), down, nn.ReLU(), up, nn.InstanceNorm2d(outside)]
        elif self.outermost:
            layers = [down, within, nn.ReLU(), up, nn.Tanh()]
        else:
            layers = [nn.LeakyReLU(0.2), down, nn.InstanceNorm2d(inside), within, nn.ReLU(), up]
            layers += [nn.InstanceNorm2d(outside)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.outermost:
            return self.model(x)
        x = self.model[0](x)  # in place in the published network, so that it changes what is kept too
        return torch.cat([x, self.model[1:](x)], 1)


EDGE_NETWORKS: dict[str, type[nn.Module]] = {"hed": HedNetwork, "lineart": LineNetwork}
"""Kind of control -> the network that draws it."""


def load_edge_network(kind: str, file: Path) -> nn.Module:
    """A network from its safetensors file; for ``lineart`` also that of :class:`AnimeLineNetwork`.

    Raises:
        UserError: the file is missing, a pickle, damaged, or of another network.
    """
    found = {name.removeprefix("module."): shape for name, shape in shapes(file).items()}
    anime = kind == "lineart" and "model.model.0.weight" in found
    with torch.device("meta"):
        network = AnimeLineNetwork() if anime else EDGE_NETWORKS[kind]()
    check_fit(network.state_dict(), found, file)
    network.load_state_dict({name.removeprefix("module."): one for name, one in load_file(file).items()}, assign=True)
    return network.float().eval()
