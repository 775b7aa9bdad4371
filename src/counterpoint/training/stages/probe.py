"""Training probes, and ControlNets aligned through them: InnerControl (2025, sections 4.2 and 5.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from counterpoint.control.features import Layers, collecting
from counterpoint.models.probe import Probe
from counterpoint.training.losses import alignment
from counterpoint.training.losses.reward import Window, masked_mean, within
from counterpoint.training.order import Draws
from counterpoint.training.stages.diffusion import DiffusionStage, Noisy
from counterpoint.training.stages.reward import RewardStage
from counterpoint.types import Batch


@dataclass(frozen=True)
class Target:
    """What a probe should read.

    Attributes:
        layers: the features that it reads.
        wanted: batch -> maps ``(b, 1, h, w)`` in 0..1, or classes ``(b, h, w)``.
        kind: ``"map"``, ``"sparse"`` for maps that are mostly black, or ``"classes"``.
    """

    layers: Layers
    wanted: Callable[[Batch], Tensor]
    kind: str = "map"

    def losses(self, read: Tensor, batch: Batch) -> Tensor:
        """Of each sample; the target is brought to the size of what was read."""
        wanted = self.wanted(batch)
        if self.kind == "classes":
            small = F.interpolate(wanted[:, None].float(), read.shape[2:], mode="nearest-exact")
            return alignment.cross_entropy(read, small[:, 0].long())
        small = F.interpolate(wanted, read.shape[2:], mode="area")
        picture = (read.mean(1, keepdim=True) + 1) / 2
        return (alignment.sparse_mse if self.kind == "sparse" else alignment.mse)(picture, small)


class ProbeStage(DiffusionStage):
    """A probe learns to read a control from the features of a frozen denoiser.

    Args:
        probe: what is trained.
        target: what it reads, and from where.
    """

    trained = ("probe",)

    def __init__(self, probe: Probe, target: Target, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.probe, self.target = probe, target

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = self._noisy(batch, draws)
        with torch.no_grad(), collecting(self.unet, self.target.layers) as features:
            self._denoise(noisy, batch)
        losses = self.target.losses(self.probe(features, embed_time(self.unet, noisy.t)).float(), batch)
        noisiest = noisy.t >= self.scheduler.config.num_train_timesteps // 2
        extra = {"noisy": masked_mean(losses.detach(), noisiest), "clean": masked_mean(losses.detach(), ~noisiest)}
        return losses.mean(), extra

    def export(self, folder: Path) -> None:
        self.probe.save_pretrained(folder)


class AlignmentStage(RewardStage):
    """Diffusion loss, reward, and alignment: a frozen probe reads the control at every timestep of a window.

    Args:
        probe: reads; frozen.
        target: what it should read.
        alignment_weight: of its loss.
        alignment_window: timesteps at which it counts.
    """

    def __init__(
        self,
        probe: Probe,
        target: Target,
        *args: object,
        alignment_weight: float,
        alignment_window: Window,
        **settings: object,
    ) -> None:
        super().__init__(*args, **settings)
        self.probe, self.target = probe, target
        self.alignment_weight, self.alignment_window = alignment_weight, alignment_window

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.aligned: list[Tensor] = []
        total, extra = super().forward(batch, draws, step)
        price = torch.stack(self.aligned).mean()
        return total + self.alignment_weight * price, {**extra, "alignment": price.detach()}

    def _denoise(self, noisy: Noisy, batch: Batch) -> Tensor:
        with collecting(self.unet, self.target.layers) as features:
            prediction = super()._denoise(noisy, batch)
            read = self.probe(features, embed_time(self.unet, noisy.t)).float()
        inside = within(noisy.t, self.alignment_window)
        self.aligned.append(masked_mean(self.target.losses(read, batch), inside))
        return prediction


@torch.no_grad()
def embed_time(unet: UNet2DConditionModel, t: Tensor) -> Tensor:
    """The denoiser's own embedding of its timesteps."""
    embedded: Tensor = unet.time_embedding(unet.time_proj(t).to(unet.dtype))
    return embedded
