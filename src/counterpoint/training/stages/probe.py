"""Training probes, and ControlNets aligned through them: InnerControl (2025, sections 4.2 and 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.control.features import Layers, collecting, embed_time, read_by
from counterpoint.models.probe import Probe, reversed_time
from counterpoint.training.losses import alignment
from counterpoint.training.losses.reward import Window, logged, masked_mean, within
from counterpoint.training.order import Draws
from counterpoint.training.stage import mean_over_processes
from counterpoint.training.stages.diffusion import DiffusionStage, Noisy
from counterpoint.training.stages.reward import RewardStage
from counterpoint.types import Batch


@dataclass(frozen=True)
class Target:
    """What a probe should read.

    Attributes:
        layers: the features that it reads; a probe that fits the denoiser's other sort reads those.
        wanted: batch -> maps ``(b, 1, h, w)``, or in colour ``(b, 3, h, w)``, in 0..1, or classes ``(b, h, w)``.
        kind: ``"map"``, ``"sparse"`` for maps that are mostly black, or ``"classes"``.
        span: what the probe says for black and for white.
        reverse: whether the probe is told timesteps that count from the noisiest one, as the published heads were in
            their training.
    """

    layers: Layers
    wanted: Callable[[Batch], Tensor]
    kind: str = "map"
    span: Sequence[float] = (-1.0, 1.0)
    reverse: bool = False

    def losses(self, read: Tensor, batch: Batch) -> Tensor:
        """Of each sample; the target is brought to the size of what was read."""
        wanted = self.wanted(batch)
        if self.kind == "classes":
            small = F.interpolate(wanted[:, None].float(), read.shape[2:], mode="nearest-exact")
            return alignment.cross_entropy(read, small[:, 0].long())
        small = F.interpolate(wanted, read.shape[2:], mode="area")
        black, white = self.span
        picture = (read - black) / (white - black)
        picture = picture.mean(1, keepdim=True) if small.shape[1] == 1 else picture
        return (alignment.sparse_mse if self.kind == "sparse" else alignment.mse)(picture, small)


class ProbeStage(DiffusionStage):
    """A probe learns to read a control from the features of a frozen denoiser.

    Args:
        probe: what is trained.
        target: what it reads, and from where.
    """

    trained = ("probe",)
    reaches_inside = True

    def __init__(self, probe: Probe, target: Target, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.probe, self.target = probe, target

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = self._noisy(batch, draws)
        with torch.no_grad(), collecting(self.unet, self.target.layers) as features:
            self._denoise(noisy, batch)
        read = self.probe(features, embed_time(self.unet, noisy.t)).float()
        losses = self.target.losses(read, batch)
        noisiest = noisy.t >= self.scheduler.config.num_train_timesteps // 2
        halves = (("noisy", noisiest), ("clean", ~noisiest))
        return losses.mean(), {name: logged(masked_mean(losses, rows), rows.sum()) for name, rows in halves}

    def export(self, folder: Path) -> None:
        self.probe.save_pretrained(folder)


class AlignmentStage(RewardStage):
    """Diffusion loss, reward, and alignment: a frozen probe reads the control at every timestep of a window.

    Args:
        probe: reads; frozen.
        target: what it should read.
        alignment_weight: of its loss.
        alignment_window: timesteps at which it counts.

    Raises:
        UserError: the probe is for another denoiser.
    """

    weighed = MappingProxyType({**RewardStage.weighed, "alignment": "alignment_weight"})
    reaches_inside = True

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
        self.layers = read_by(probe, self.unet, target.layers)

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.aligned: list[tuple[Tensor, Tensor]] = []
        total, extra = super().forward(batch, draws, step)
        prices, counts = zip(*self.aligned, strict=True)
        price = torch.stack(prices).mean()
        return total + self.alignment_weight * price, {**extra, "alignment": logged(price, torch.stack(counts).sum())}

    def _denoise(self, noisy: Noisy, batch: Batch) -> Tensor:
        with collecting(self.unet, self.layers) as features:
            prediction = super()._denoise(noisy, batch)
            total = self.scheduler.config.num_train_timesteps
            t = reversed_time(noisy.t, total) if self.target.reverse else noisy.t
            read = self.probe(features, embed_time(self.unet, t)).float()
        inside = within(noisy.t, self.alignment_window)
        count = mean_over_processes(inside.sum())
        self.aligned.append((masked_mean(self.target.losses(read, batch), inside, count), count))
        return prediction
