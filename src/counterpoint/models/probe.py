"""Probes: small networks that read a control from a denoiser's inner features, at any timestep.

The aggregation network of Readout Guidance (Luo et al. 2024, arXiv:2312.02150), as InnerControl (2025, section 4.2)
uses it: a bottleneck for every layer, told the timestep, their softmax-weighted sum, and a small head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from counterpoint.models.trained_for import check_kind
from counterpoint.models.weights import check_fit, shapes
from counterpoint.types import UserError

_GROUPS = 32


class Probe(ModelMixin, ConfigMixin):
    """Features of several layers to one map.

    Args:
        dims: channels of each layer's features.
        time_width: of the denoiser's timestep embedding.
        width: channels to which every layer is brought.
        head: channels of the two layers of the head.
        out: channels of the map: 3 for images, or the number of classes.
        bounded: whether the map is squashed into -1..1, as images are.
        size: side to which features are brought, and of the map.
        upsample: whether the head makes the map twice as large, by a transposed convolution: for thin lines
            (InnerControl, appendix A.1).
        span: what it says for black and for white; of a published head :func:`span_of` knows it.
    """

    @register_to_config
    def __init__(
        self,
        dims: Sequence[int],
        time_width: int = 1280,
        width: int = 384,
        head: Sequence[int] = (128, 32),
        out: int = 3,
        *,
        bounded: bool = True,
        size: int = 64,
        upsample: bool = False,
        span: Sequence[float] | None = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        self.size = size
        self.bottleneck_layers = nn.ModuleList([_Bottleneck(channels, time_width, width) for channels in dims])
        self.mixing_weights = nn.Parameter(torch.ones(len(dims)))
        self.output_head = nn.Sequential(
            nn.Conv2d(width, head[0], 3, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(*head, 4, 2, 1) if upsample else nn.Conv2d(*head, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(head[1], out, 1),
            nn.Tanh() if bounded else nn.Identity(),
        )
        if bounded:
            # Maps are mostly black: from grey, the first steps would drive the last layer to where nothing moves.
            nn.init.constant_(self.output_head[-2].bias, -1.5)
            nn.init.normal_(self.output_head[-2].weight, std=0.01)

    def forward(
        self, features: Sequence[Float[Tensor, "b _ _ _"]], time: Float[Tensor, "b t"]
    ) -> Float[Tensor, "b o s s"]:
        """Read a map.

        Args:
            features: one a layer, in the order of ``dims``, of any resolution.
            time: the denoiser's embedding of the timestep.

        Raises:
            ValueError: the number of layers differs.
        """
        shares = self.mixing_weights.softmax(0)
        total: Tensor | float = 0.0
        for share, layer, feature in zip(shares, self.bottleneck_layers, features, strict=True):
            total = total + share * layer(_sized(feature, self.size), time)
        read: Tensor = self.output_head(total)
        return read


def _sized(feature: Tensor, size: int) -> Tensor:
    return F.interpolate(feature, (size, size), mode="bilinear", align_corners=False)


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, time_width: int, width: int) -> None:
        super().__init__()
        narrow = width // 4
        self.shortcut = _Normed(channels, width, 1)
        self.conv1, self.conv2 = _Normed(channels, narrow, 1), _Normed(narrow, narrow, 3)
        self.conv3 = _Normed(narrow, width, 1)
        self.emb_layers = nn.Linear(time_width, narrow)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(x).relu()
        h = h + self.emb_layers(time).relu()[:, :, None, None]
        return (self.conv3(self.conv2(h).relu()) + self.shortcut(x)).relu()


class _Normed(nn.Conv2d):
    """A convolution without bias and the norm that belongs to it, under one name."""

    def __init__(self, inside: int, outside: int, side: int) -> None:
        super().__init__(inside, outside, side, padding=side // 2, bias=False)
        self.norm = nn.GroupNorm(math.gcd(_GROUPS, outside), outside)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))  # type: ignore[no-any-return]


def load_probe(place: Path) -> Probe:
    """A trained probe from its folder, or a published head from its file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if place.suffix == ".safetensors":
        return load_readout_head(place)
    try:
        named = json.loads((place / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        named = None
    if named != Probe.__name__:
        raise UserError(f"there is no probe in {place}: give its folder, or a published head as a safetensors file")
    probe: Probe = Probe.from_pretrained(place, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32)
    return probe


def span_of(probe: Probe, kind: str, layers: str) -> tuple[float, float]:
    """What a probe says for black and for white.

    Of the published heads, Readout Guidance's (arXiv:2312.02150), which read convolutions, say -0.5 and 0.5 for lines
    and poses; InnerControl's, which read self-attention, say -1 and 1 for everything.
    """
    if probe.config["span"] is not None:
        black, white = probe.config["span"]
        return black, white
    narrow = layers == "convolution" and kind in {"canny", "hed", "lineart", "pose"}
    return (-0.5, 0.5) if narrow else (-1.0, 1.0)


def check_reads(probe: Probe, kind: str, classes: int, place: str | Path = "the probe") -> None:
    """Hold what a probe from some place makes against a kind of control.

    Raises:
        UserError: it was trained for another one.
    """
    check_kind(probe, kind, place)
    made = probe.config["out"]
    if made not in {"seg": {classes}, "pose": {3}}.get(kind, {1, 3}):
        raise UserError(f"{place} is for another control than {kind}: it makes {made} maps")


REVERSED = "@reversed"
"""Behind a probe's place: it is told timesteps that count from the noisiest one, as in :func:`reversed_time`."""
_NETWORK = "aggregation_network."
"""Before the network's names in a published checkpoint, which holds its optimizer as well."""


def load_readout_head(file: Path) -> Probe:
    """A published head (``readout_sdv15_spatial_depth`` and so on, InnerControl's) as ``models convert`` leaves it.

    Its sizes are read off its tensors. They were trained with the timestep counted from the noisiest step on, and are
    used with the true one: give either, see :func:`reversed_time`.

    Raises:
        UserError: the file is missing, a pickle, damaged, or of another network.
    """
    found = shapes(file)
    prefix = _NETWORK if any(name.startswith(_NETWORK) for name in found) else ""
    found = {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}
    try:
        layers = [f"bottleneck_layers.{number}" for number in range(found["mixing_weights"][0])]
        sizes = {
            "dims": [found[f"{layer}.shortcut.weight"][1] for layer in layers],
            "time_width": found[f"{layers[0]}.emb_layers.weight"][1],
            "width": found[f"{layers[0]}.shortcut.weight"][0],
            "head": (found["output_head.0.weight"][0], found["output_head.2.weight"][0]),
            "out": found["output_head.4.weight"][0],
        }
    except (KeyError, IndexError) as error:
        raise UserError(f"{file} is no readout head: {error} is not in it") from None
    with torch.device("meta"):
        probe = Probe(**sizes, span=None)
    check_fit(probe.state_dict(), found, file)
    state = load_file(file)
    probe.load_state_dict({name: state[f"{prefix}{name}"] for name in found}, assign=True)
    return probe.float().eval()


def reversed_time(t: Tensor, total: int = 1000) -> Tensor:
    """The timestep as the published heads saw it in training: 0 is the noisiest."""
    return total - 1 - t
