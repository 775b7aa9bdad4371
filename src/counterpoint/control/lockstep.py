"""Several ControlNets walked side by side, so that a rule can let them exchange features while they run."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import torch
from diffusers import ControlNetModel
from jaxtyping import Float
from torch import Tensor

from counterpoint.types import Exchange, Latents, Residuals, UserError


class Hidden(NamedTuple):
    """What a branch holds at one point of its walk: the running feature, and the residuals of the block just passed."""

    site: str
    sample: Float[Tensor, "b _ _ _"]
    residuals: tuple[Float[Tensor, "b _ _ _"], ...]


Walk = Generator[Hidden, Hidden, Residuals]


def walk(
    network: ControlNetModel,
    latents: Latents,
    timestep: Tensor,
    text: Float[Tensor, "b t d"],
    hint: Float[Tensor, "b 3 _ _"],
    scale: float | Tensor = 1.0,
    added: Mapping[str, Tensor] | None = None,
) -> Walk:
    """A ControlNet's forward pass that stops after ``conv_in``, every ``down.i`` and ``mid``.

    It yields what it holds there and goes on with what it is sent. Sent back unchanged, the result is that of the
    network's own ``forward``, bit for bit. ``added`` is what SDXL's networks read besides the text: ``text_embeds`` and
    ``time_ids``.

    Raises:
        UserError: the network is of a kind that is not walked.
    """
    if network.config.global_pool_conditions or network.config.controlnet_conditioning_channel_order != "rgb":
        raise UserError(
            "a ControlNet that pools its condition, or reads it as BGR, cannot run side by side with others"
        )
    embedding = network.time_proj(timestep.expand(len(latents))).to(latents.dtype)
    embedding = network.time_embedding(embedding)
    if added:
        sizes = network.add_time_proj(added["time_ids"].flatten()).reshape(len(latents), -1)
        pooled = torch.cat([added["text_embeds"], sizes], -1).to(embedding.dtype)
        embedding = embedding + network.add_embedding(pooled)
    sample, _ = (yield Hidden("conv_in", network.conv_in(latents), ()))[1:]
    sample = sample + network.controlnet_cond_embedding(hint)
    skips = [sample]
    for number, block in enumerate(network.down_blocks):
        cross = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        sample, residuals = block(hidden_states=sample, temb=embedding, **cross)
        sample, residuals = (yield Hidden(f"down.{number}", sample, residuals))[1:]
        skips += residuals
    cross = {"encoder_hidden_states": text} if getattr(network.mid_block, "has_cross_attention", False) else {}
    sample = network.mid_block(sample, embedding, **cross)
    sample, _ = (yield Hidden("mid", sample, ()))[1:]
    down = tuple(conv(skip) * scale for conv, skip in zip(network.controlnet_down_blocks, skips, strict=True))
    return Residuals(down, network.controlnet_mid_block(sample) * scale)


def run_lockstep(walks: Sequence[Walk], exchange: Exchange, *, skips: bool = True) -> list[Residuals]:
    """Advance all walks together and let them exchange at every stop.

    Args:
        walks: one a branch, not yet started.
        exchange: what the branches' features become, ``(n b ...) -> (n b ...)``.
        skips: whether a block's residuals are exchanged too, or its running feature only.
    """
    results: list[Residuals] = []
    stops = [next(one) for one in walks]
    while not results:
        samples = exchange(torch.stack([stop.sample for stop in stops]))
        residuals = [stop.residuals for stop in stops]
        if skips:
            swapped = [exchange(torch.stack(site)) for site in zip(*residuals, strict=True)]
            residuals = list(zip(*swapped, strict=True)) if swapped else residuals
        following = []
        for one, stop, sample, several in zip(walks, stops, samples, residuals, strict=True):
            try:
                following.append(one.send(Hidden(stop.site, sample, tuple(several))))
            except StopIteration as end:
                results.append(end.value)
        stops = following
    return results
