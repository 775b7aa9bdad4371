"""A UNet in two halves, so that what its encoder says can be kept from step to step.

Along the schedule the encoder's features change less than the decoder's, and whole steps can do without the encoder
(Faster Diffusion, arXiv:2312.09608, section 3). There they are copied; here
:class:`counterpoint.control.reuse.Reuse` foretells them. Controls join after the encoder, so theirs are always new.

Both halves are the UNet's own ``forward`` with some of its modules swapped: nothing of it is written anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.types import Latents


def encode(
    unet: UNet2DConditionModel,
    sample: Latents,
    timestep: Tensor | int,
    encoder_hidden_states: Float[Tensor, "b t d"],
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """What the encoder says: the skip connections from the finest on, and the middle block's features, each
    ``(b, c, h, w)``, before any control joins them. Arguments are those of diffusers' ``forward``."""
    said: list[Tensor] = []
    with ExitStack() as stack:
        stack.callback(unet.conv_in.register_forward_hook(lambda _, __, made: said.append(made)).remove)
        for block in unet.down_blocks:
            stack.callback(block.register_forward_hook(lambda _, __, made: said.extend(made[1])).remove)
        stack.enter_context(_swapped(unet, up_blocks=nn.ModuleList(), conv_norm_out=None, conv_out=nn.Identity()))
        given = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added_cond_kwargs}
        (middle,) = unet(sample, timestep, **given, return_dict=False)
    return [*said, middle]


@contextmanager
def decoding(unet: UNet2DConditionModel, said: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, calls of the UNet run its decoder alone, on what :func:`encode` said or would have said; with
    just that, they answer as the whole UNet does, bit for bit."""
    first, *skips, middle = said
    encoder = _Said((skips[-1], tuple(skips)))
    with _swapped(unet, conv_in=_Said(first), down_blocks=nn.ModuleList([encoder]), mid_block=_Said(middle)):
        yield


class _Said(nn.Module):
    """A module that always answers the same."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.answer


@contextmanager
def _swapped(network: nn.Module, **modules: nn.Module | None) -> Iterator[None]:
    before = {name: getattr(network, name) for name in modules}
    try:
        for name, module in modules.items():
            setattr(network, name, module)
        yield
    finally:
        for name, module in before.items():
            setattr(network, name, module)
