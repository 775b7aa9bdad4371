"""Training a ControlNet to make way for others: Minimal Impact ControlNet (ICLR 2025)."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from counterpoint.control.influence import influence
from counterpoint.fusion.minimal_impact import INJECTION, BalancedInjection
from counterpoint.training.losses.conservativity import Estimator, conservativity_loss
from counterpoint.training.order import Draws
from counterpoint.training.stages.diffusion import ControlNetStage, Noisy
from counterpoint.types import Batch, Inject, UserError


class MinimalImpactStage(ControlNetStage):
    """The diffusion loss with the control taken in by a rule, and a price on what is no gradient.

    Stage 1 of the paper has ``weight`` 0, stage 2 has 0.01. Silent-signal balancing is a matter of the samples.

    Args:
        inject: how the host takes the control in; the network's configuration keeps it.
        weight: of the conservativity loss, as a sum over all entries of ``J``.
        estimator: of it.
        share: samples of each batch on which it is estimated: two estimators ask for second derivatives, the third
            for four more predictions.
    """

    def __init__(
        self,
        *args: object,
        inject: Inject = torch.add,
        weight: float = 0.0,
        estimator: Estimator = "paired",
        share: float = 0.25,
        **settings: object,
    ) -> None:
        super().__init__(*args, **settings)
        self.inject, self.weight, self.estimator, self.share = inject, weight, estimator, share
        trained = asdict(inject) if isinstance(inject, BalancedInjection) else None
        if self.controlnet.config.get(INJECTION, trained) != trained:
            raise UserError(
                f"the ControlNet was trained with the injection {self.controlnet.config[INJECTION]}: go on so"
            )
        if trained:
            self.controlnet.register_to_config(**{INJECTION: trained})

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = self._noisy(batch, draws)
        losses = self._losses(noisy, self._denoise(noisy, batch))
        total = self._weighted(noisy, losses)
        if self.weight == 0:
            return total, {}
        asymmetry = self._asymmetry(noisy, batch, draws).mean()
        return total + self.weight * asymmetry, {"diffusion": losses.detach().mean(), "asymmetry": asymmetry.detach()}

    def _predict(self, x: Tensor, t: Tensor, text: Tensor, batch: Batch) -> Tensor:
        return influence(self.unet, self.controlnet, self._hint(batch), text, t, x, self.inject)(x)

    def _asymmetry(self, noisy: Noisy, batch: Batch, draws: Draws) -> Tensor:
        """One estimate for each of the first samples."""
        shape = noisy.x0.shape[1:]
        first, second = (2.0 * (draws.uniform(*shape) < 0.5) - 1 for _ in range(2))
        few = slice(max(1, round(self.share * len(noisy.t))))
        x = noisy.x_t[few]
        field = influence(
            self.unet, self.controlnet, self._hint(batch)[few], noisy.text[few], noisy.t[few], x, self.inject
        )
        with torch.autocast(x.device.type, enabled=False):  # differences want all digits
            if self.estimator == "paired":
                return conservativity_loss(field, x, first[few], second=second[few], estimator="paired")
            if any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
                raise UserError(
                    f"conservativity_estimator={self.estimator} takes second derivatives, and those cannot be "
                    "checkpointed: --set gradient_checkpointing=false, or the paired estimator"
                )
            with sdpa_kernel(SDPBackend.MATH):
                return conservativity_loss(field, x, first[few], self.estimator)
