"""The backbones on which LPIPS stands, with the names of their published files.

Zhang et al. 2018 (arXiv:1801.03924). One safetensors file holds torchvision's ``features.*`` of AlexNet or VGG16
and the paper's ``lin<layer>.model.1.weight``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from counterpoint.models.weights import check_fit, shapes

_PLANS = {
    "alex": [(64, 11, 4, 2), "tap", "pool3", (192, 5, 1, 2), "tap", "pool3", (384, 3, 1, 1), "tap", (256, 3, 1, 1),
             "tap", (256, 3, 1, 1), "tap"],
    "vgg": [64, 64, "tap", "pool2", 128, 128, "tap", "pool2", 256, 256, 256, "tap", "pool2", 512, 512, 512, "tap",
            "pool2", 512, 512, 512, "tap"],
}  # fmt: skip
"""Convolutions as ``(width, kernel, stride, padding)``, or a width alone for 3 x 3; every one is followed by a ReLU."""


class LpipsNetwork(nn.Module):
    """Pictures to the feature maps that LPIPS compares.

    Args:
        backbone: ``"alex"`` or ``"vgg"``.
    """

    def __init__(self, backbone: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        widths, inside = [], 3
        for step in _PLANS[backbone]:
            if step == "tap":
                self.taps.append(len(layers) - 1)
                widths.append(inside)
            elif isinstance(step, str):
                layers.append(nn.MaxPool2d(int(step[-1]), 2))
            else:
                width, kernel, stride, padding = (step, 3, 1, 1) if isinstance(step, int) else step
                layers += [nn.Conv2d(inside, width, kernel, stride, padding), nn.ReLU()]
                inside = width
        self.features = nn.Sequential(*layers)
        for place, width in enumerate(widths):
            head = nn.Module()
            head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{place}", head)

    @property
    def weights(self) -> list[Float[Tensor, " _"]]:
        """One weight a channel of each map."""
        return [self.get_submodule(f"lin{place}.model.1").weight.flatten() for place in range(len(self.taps))]

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Maps of pictures in 0..1."""
        mean = torch.tensor([0.485, 0.456, 0.406], device=pictures.device)[:, None, None]
        deviation = torch.tensor([0.229, 0.224, 0.225], device=pictures.device)[:, None, None]
        x, maps = (pictures - mean) / deviation, []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.taps:
                maps.append(x)
        return maps


def load_lpips(file: Path) -> LpipsNetwork:
    """The network that a safetensors file is of.

    Raises:
        UserError: it is missing, a pickle, damaged, or of neither network.
    """
    found = shapes(file)
    with torch.device("meta"):
        network = LpipsNetwork("alex" if found.get("features.0.weight") == (64, 3, 11, 11) else "vgg")
    check_fit(network.state_dict(), found, file)
    network.load_state_dict(load_file(file), assign=True)
    return network.float().eval()
