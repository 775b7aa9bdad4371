"""The denoising loss: noise prediction, velocity and flow, weighted by signal-to-noise ratio.

Ho et al. 2020 (arXiv:2006.11239, Eq. 14), v-prediction by Salimans and Ho 2022 (arXiv:2202.00512), straight flows by
Liu et al. 2022 (arXiv:2209.03003) as Stable Diffusion 3 and FLUX have them (Esser et al. 2024, arXiv:2403.03206), the
Min-SNR weight by Hang et al. 2023 (arXiv:2303.09556, section 3.4), the debiased one after Yu et al. 2023
(arXiv:2310.08442).

Prediction types are called as diffusers' schedulers call them. A noise level is ``alpha_bar`` in (0, 1), the share of
signal; of a flow it is ``s`` in (0, 1), the share of noise.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def add_noise(
    x0: Float[Tensor, "b ..."],
    noise: Float[Tensor, "b ..."],
    level: Float[Tensor, " b"],
    prediction_type: str = "epsilon",
) -> Float[Tensor, "b ..."]:
    """``x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise``; of a flow ``(1 - s) x_0 + s noise``."""
    a = _like(level, x0)
    if prediction_type == "flow_prediction":
        return (1 - a) * x0 + a * noise
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def target(
    x0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], level: Float[Tensor, " b"], prediction_type: str
) -> Float[Tensor, "b ..."]:
    """What the network should say: the noise, ``v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0``, or the flow's
    ``v = noise - x_0``.

    Raises:
        ValueError: the prediction type is none of these.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = _like(level, x0)
        return a.sqrt() * noise - (1 - a).sqrt() * x0
    if prediction_type == "flow_prediction":
        return noise - x0
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def snr_weight(
    level: Float[Tensor, " b"], gamma: float | None, prediction_type: str, debiased: bool = False
) -> Float[Tensor, " b"]:
    """Min-SNR weight ``min(snr, gamma) / snr`` of the noise loss; of the velocity loss, ``/ (snr + 1)``; of a flow's,
    ``min(snr, gamma) s^2``: each is the weight of the implied picture's error. 1 without a ``gamma``.

    ``debiased`` multiplies it by ``1 / sqrt(snr)`` where there is more noise than signal. An error of the predicted
    noise is a larger one of the implied picture there, and pictures are laid out there.
    """
    flow = prediction_type == "flow_prediction"
    snr = ((1 - level) / level).square() if flow else level / (1 - level)
    weight = torch.ones_like(snr)
    if gamma is not None:
        implied = level.square().reciprocal() if flow else snr + 1
        weight = snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else implied)
    return weight * snr.clamp(max=1).rsqrt() if debiased else weight


def diffusion_loss(prediction: Float[Tensor, "b ..."], wanted: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Mean squared error of each sample."""
    return (prediction - wanted).square().flatten(1).mean(1)


def _like(scalar: Tensor, x: Tensor) -> Tensor:
    return scalar.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
