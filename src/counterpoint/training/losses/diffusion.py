"""The denoising loss: noise prediction and velocity, weighted by signal-to-noise ratio.

Ho et al. 2020 (arXiv:2006.11239, Eq. 14), v-prediction by Salimans and Ho 2022 (arXiv:2202.00512), the Min-SNR weight
by Hang et al. 2023 (arXiv:2303.09556, section 3.4), the debiased one after Yu et al. 2023 (arXiv:2310.08442).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def add_noise(
    x0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], alpha_bar: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """``x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise``; ``alpha_bar`` in (0, 1)."""
    a = _like(alpha_bar, x0)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def target(
    x0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], alpha_bar: Float[Tensor, " b"], prediction_type: str
) -> Float[Tensor, "b ..."]:
    """What the network should say: the noise, or ``v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0``."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = _like(alpha_bar, x0)
        return a.sqrt() * noise - (1 - a).sqrt() * x0
    raise ValueError(f"prediction_type must be 'epsilon' or 'v_prediction', got {prediction_type!r}")


def snr_weight(
    alpha_bar: Float[Tensor, " b"], gamma: float | None, prediction_type: str, debiased: bool = False
) -> Float[Tensor, " b"]:
    """Min-SNR weight ``min(snr, gamma) / snr`` of the noise loss; of the velocity loss, ``/ (snr + 1)``; 1 without a
    ``gamma``.

    ``debiased`` multiplies it by ``1 / sqrt(snr)`` where there is more noise than signal. An error of the predicted
    noise is a larger one of the implied picture there, and pictures are laid out there.
    """
    snr = alpha_bar / (1 - alpha_bar)
    weight = torch.ones_like(snr)
    if gamma is not None:
        weight = snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    return weight * snr.clamp(max=1).rsqrt() if debiased else weight


def diffusion_loss(prediction: Float[Tensor, "b ..."], wanted: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Mean squared error of each sample."""
    return (prediction - wanted).square().flatten(1).mean(1)


def _like(scalar: Tensor, x: Tensor) -> Tensor:
    return scalar.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
