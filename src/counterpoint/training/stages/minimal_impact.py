"""Training a ControlNet to make way for others: Minimal Impact ControlNet (ICLR 2025)."""

from __future__ import annotations

from dataclasses import asdict
from types import MappingProxyType
from typing import Literal

import torch
from diffusers import ControlNetModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from counterpoint.control.influence import influence
from counterpoint.fusion.minimal_impact import INJECTION, BalancedInjection
from counterpoint.training.losses.conservativity import Estimator, conservativity_loss
from counterpoint.training.losses.reward import Window, logged, masked_mean, within
from counterpoint.training.order import Draws
from counterpoint.training.stage import mean_over_processes
from counterpoint.training.stages.diffusion import ControlNetStage, Noisy
from counterpoint.types import Batch, Inject, UserError


class MinimalImpactStage(ControlNetStage):
    """The diffusion loss with the control taken in by a rule, and a price on what is no gradient.

    Stage 1 of the paper has ``weight`` 0, stage 2 has 0.01. Silent-signal balancing is a matter of the samples. A
    strengthened network that is to be taken in by another rule than a sum from now on is exported as it was trained.

    Args:
        inject: how the host takes the control in; the network's configuration keeps it.
        weight: of the conservativity loss, as a sum over all entries of ``J``.
        estimator: of it.
        of: ``"eps"`` or ``"score"``, ``-eps / sigma_t``: what ``J`` is the Jacobian of. The second is dominated by
            the cleanest timesteps, where ``1 / sigma_t^2`` exceeds 1000.
        window: timesteps at which it counts.
        share: samples of each batch on which it is estimated, spread evenly: two estimators ask for second derivatives,
            the third for four more predictions.
    """

    weighed = MappingProxyType({"asymmetry": "weight"})

    def __init__(
        self,
        *args: object,
        inject: Inject = torch.add,
        weight: float = 0.0,
        estimator: Estimator = "paired",
        of: Literal["eps", "score"] = "eps",
        window: Window = (0, 999),
        share: float = 0.25,
        **settings: object,
    ) -> None:
        super().__init__(*args, **settings)
        self.inject, self.weight, self.estimator, self.share = inject, weight, estimator, share
        self.of, self.window = of, window
        if weight:  # for all of the process: differences want all digits, forward and backward
            torch.backends.cudnn.allow_tf32 = False
        if weight and self.scheduler.config.prediction_type != "epsilon":
            raise UserError("conservativity wants a denoiser that predicts the noise")
        trained = asdict(inject) if isinstance(inject, BalancedInjection) else None
        if self.controlnet.config.get(INJECTION, trained) != trained:
            raise UserError(
                f"the ControlNet was trained with the injection {self.controlnet.config[INJECTION]}: go on so"
            )
        if trained and INJECTION not in self.controlnet.config:  # its strength was found for a sum, and this is none
            self.strength = 1.0

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = self._noisy(batch, draws)
        losses = self._losses(noisy, self._denoise(noisy, batch))
        total = self._weighted(noisy, losses)
        extra = {"diffusion": losses.detach().mean()}
        if self.weight == 0:
            return total, extra
        few = self._few(len(noisy.t))
        inside = within(noisy.t[few], self.window)
        asymmetry = self._asymmetry(noisy, batch, draws, few)
        count = mean_over_processes(inside.sum())
        asymmetry = masked_mean(asymmetry, inside, count)
        return total + self.weight * asymmetry, {**extra, "asymmetry": logged(asymmetry, count)}

    def _copy(self) -> ControlNetModel:
        network = super()._copy()
        if isinstance(self.inject, BalancedInjection):
            network.register_to_config(**{INJECTION: asdict(self.inject)})
        return network

    def _few(self, samples: int) -> Tensor:
        """Places of the samples on which the price is estimated."""
        count = max(1, round(self.share * samples))
        return torch.arange(count) * samples // count

    def _asymmetry(self, noisy: Noisy, batch: Batch, draws: Draws, few: Tensor) -> Tensor:
        """One estimate for each of a few samples."""
        shape = noisy.x0.shape[1:]
        probe = (2.0 * (draws.uniform(*shape) < 0.5) - 1)[few]
        x = noisy.x_t[few]
        field = influence(
            self.unet, self.controlnet, self._hint(batch)[few], noisy.text[few], noisy.t[few], x, self.inject
        )
        variance = 1 - noisy.level[few] if self.of == "score" else 1.0
        with torch.autocast(x.device.type, enabled=False):
            if self.estimator == "paired":
                return conservativity_loss(field, x, probe, "paired") / variance
            with sdpa_kernel(SDPBackend.MATH):
                return conservativity_loss(field, x, probe, self.estimator) / variance
