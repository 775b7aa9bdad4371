"""Several ControlNets walked side by side, so that a rule can let them exchange features while they run."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import NamedTuple

import torch
from diffusers import ControlNetModel
from jaxtyping import Float
from torch import Tensor

from counterpoint.control.sites import ONE_FAMILY, together
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


def run_lockstep(walks: Mapping[str, Walk], exchange: Exchange, *, skips: bool = True) -> dict[str, Residuals]:
    """Advance all walks together and let them exchange at every stop.

    Args:
        walks: one a branch, not yet started.
        exchange: what the branches' features become, ``(n b ...) -> (n b ...)``.
        skips: whether a block's residuals are exchanged too, or its running feature only.

    Raises:
        UserError: the branches stop at different places, or with features of different shapes.
    """
    results: dict[str, Residuals] = {}
    stops = {name: next(one) for name, one in walks.items()}
    while not results:
        places = {name: f"{stop.site} with {len(stop.residuals)}" for name, stop in stops.items()}
        if len(set(places.values())) > 1:
            listed = ", ".join(f"{name} {place}" for name, place in places.items())
            raise UserError(f"the controls cannot walk side by side ({listed} residuals): {ONE_FAMILY}")
        site = next(iter(stops.values())).site
        samples = exchange(together(site, {name: stop.sample for name, stop in stops.items()}))
        residuals = [stop.residuals for stop in stops.values()]
        if skips:
            sites = [dict(zip(stops, several, strict=True)) for several in zip(*residuals, strict=True)]
            swapped = [exchange(together(site, said)) for said in sites]
            residuals = list(zip(*swapped, strict=True)) if swapped else residuals
        following = {}
        for name, sample, several in zip(stops, samples, residuals, strict=True):
            try:
                following[name] = walks[name].send(Hidden(site, sample, tuple(several)))
            except StopIteration as end:
                results[name] = end.value
        stops = following
    return results
