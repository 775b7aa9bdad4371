"""What one ControlNet adds to the prediction, as a function of what it sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from counterpoint.control.attach import taking_in
from counterpoint.types import Inject, Latents, Residuals


def influence(
    unet: UNet2DConditionModel,
    network: ControlNetModel,
    hint: Float[Tensor, "b 3 _ _"],
    text: Float[Tensor, "b t d"],
    timestep: Tensor,
    latents: Latents,
    inject: Inject = torch.add,
) -> Callable[[Latents], Latents]:
    """The host's prediction as a function of the latents that the ControlNet sees, while the host sees ``latents``.

    It may be asked for several of them at once, ``(k b, ...)``: the condition images are encoded once for all.
    Its Jacobian is that part of the prediction's Jacobian which goes through the ControlNet: ``J^c`` of Minimal
    Impact ControlNet (ICLR 2025, section 4.3), of a host that predicts the noise.

    Args:
        unet: the host.
        network: the control.
        hint: condition images in 0..1.
        text: prompt embeddings.
        timestep: one for all, or one each.
        latents: noisy latents for the host; they are a constant.
        inject: how the host takes the control in.
    """
    fixed = latents.detach()

    def predicted(seen: Latents) -> Latents:
        times = len(seen) // len(fixed)
        t = timestep.repeat(times) if timestep.ndim else timestep
        prompt, host = text.repeat(times, 1, 1), fixed.repeat(times, 1, 1, 1)
        encoder = network.controlnet_cond_embedding
        encoded_once = encoder.register_forward_hook(lambda _, __, code: code.repeat(times, 1, 1, 1))
        try:
            down, mid = network(seen, t, prompt, hint, return_dict=False)
        finally:
            encoded_once.remove()
        with taking_in(unet, Residuals(tuple(down), mid), inject) as extra:
            made: Tensor = unet(host, t, prompt, **extra).sample
        return made

    return predicted
