"""Training ControlNets with rewards: ControlNet++ (arXiv:2404.07987) and Ctrl-U (arXiv:2410.11236)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from counterpoint.training.losses.reward import (
    Window,
    class_error,
    estimate_x0,
    logged,
    map_error,
    valid_mean,
    within,
)
from counterpoint.training.losses.uncertainty import (
    disagreement,
    divergence,
    uncertain_class_error,
    uncertain_error,
)
from counterpoint.training.order import Draws
from counterpoint.training.stage import mean_over_processes
from counterpoint.training.stages.diffusion import ControlNetStage, Noisy
from counterpoint.types import Batch


@dataclass(frozen=True)
class Reward:
    """How a control is read back from pictures, with gradients, and what counts against it.

    Attributes:
        read: pictures ``(b, 3, h, w)`` in -1..1 -> readings ``(b, c, h, w)``: maps, or logits of classes.
        wanted: batch -> what they should be: maps like the readings, or classes ``(b, h, w)``.
        classes: whether readings are logits of classes.
    """

    read: Callable[[Tensor], Tensor]
    wanted: Callable[[Batch], Tensor]
    classes: bool = False

    def error(self, reading: Tensor, wanted: Tensor) -> Tensor:
        """At each place, ``(b, h, w)``."""
        return class_error(reading, wanted) if self.classes else map_error(reading, wanted)

    def price(self, reading: Tensor, wanted: Tensor) -> Tensor:
        """Of each sample, the mean error; places of class -1 do not count."""
        error = self.error(reading, wanted)
        return valid_mean(error, wanted) if self.classes else error.flatten(1).mean(1)

    def doubted(self, reading: Tensor, second: Tensor, wanted: Tensor, scale: float) -> Tensor:
        """Of each sample, the error where two readings agree, and the price of their disagreement; places of class -1
        do not count."""
        error = self.error(reading, wanted)
        if self.classes:
            return uncertain_class_error(error, divergence(reading, second), wanted, scale)
        return uncertain_error(error, disagreement(reading, second), scale)


class RewardStage(ControlNetStage):
    """The diffusion loss plus a reward at timesteps where one step shows the picture.

    Only samples inside the window are decoded and read.

    Args:
        reward: how the control is read back; its networks are frozen. Without one nothing is decoded.
        readers: the networks that it reads with, so that they move with the stage.
        vae: decodes the estimates; frozen.
        weight: of the reward.
        window: timesteps at which it counts.
        uncertainty: scale of Ctrl-U's uncertainty, which asks for a second prediction from the next noisier timestep;
            without one, ControlNet++'s plain reward.
        ramp: optimizer steps over which the weight grows from 0, as in Ctrl-U's code for depth and seg.
    """

    weighed = MappingProxyType({"reward": "weight"})

    def __init__(
        self,
        reward: Reward | None,
        readers: nn.Module | None,
        vae: AutoencoderKL | AutoencoderTiny | None,
        *args: object,
        weight: float,
        window: Window = (0, 200),
        uncertainty: float | None = None,
        ramp: int = 0,
        **settings: object,
    ) -> None:
        super().__init__(*args, **settings)
        self.reward, self.readers, self.vae = reward, readers, vae
        self.weight, self.window, self.uncertainty, self.ramp = weight, window, uncertainty, ramp

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = self._noisy(batch, draws)
        prediction = self._denoise(noisy, batch)
        losses = self._losses(noisy, prediction)
        total = self._weighted(noisy, losses)
        inside = within(noisy.t, self.window)
        later = None
        if self.uncertainty is not None:
            last = self.scheduler.config.num_train_timesteps - 1
            t = (noisy.t + 1).clamp(max=last)
            second = noisy._replace(t=t, level=self._level(t))
            later = second, self._denoise(second, batch)
            total = (total + self._weighted(second, self._losses(*later))) / 2
        price, count = losses.new_zeros(()), mean_over_processes(inside.sum())
        if self.reward is not None and inside.any():
            price = self._prices(noisy, prediction, later, batch, inside).sum() / count
        extra = {"diffusion": losses.detach().mean(), "reward": logged(price, count)}
        weight = self.weight * min(1.0, step / self.ramp) if self.ramp else self.weight
        return total + weight * price, extra

    def _prices(
        self, noisy: Noisy, prediction: Tensor, later: tuple[Noisy, Tensor] | None, batch: Batch, inside: Tensor
    ) -> Tensor:
        """What the readings inside the window cost, each."""
        wanted = self.reward.wanted(batch)[inside]
        reading = self._read(noisy, prediction, inside)
        if later is None or self.uncertainty is None:
            return self.reward.price(reading, wanted)
        return self.reward.doubted(reading, self._read(*later, inside), wanted, self.uncertainty)

    def _read(self, noisy: Noisy, prediction: Tensor, rows: Tensor) -> Tensor:
        """Readings of the pictures that predictions imply."""
        latents = estimate_x0(noisy.x_t[rows], prediction[rows], noisy.level[rows], noisy.prediction_type)
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return self.reward.read(pictures.clamp(-1, 1)).float()
