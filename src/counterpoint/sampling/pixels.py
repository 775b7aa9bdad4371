"""Pictures, condition images and masks of a call, in any form that diffusers takes, as tensors for a whole batch."""

from __future__ import annotations

from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch import Tensor

from counterpoint.types import UserError


class Pixels:
    """Brings images to one size and number.

    Args:
        factor: pixels a latent, along each side.
    """

    def __init__(self, factor: int) -> None:
        self.pictures = VaeImageProcessor(vae_scale_factor=factor)
        self._hints = VaeImageProcessor(vae_scale_factor=factor, do_convert_rgb=True, do_normalize=False)
        self._shades = VaeImageProcessor(vae_scale_factor=factor, do_normalize=False, do_convert_grayscale=True)
        self._masks = VaeImageProcessor(
            vae_scale_factor=factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    def hint(self, label: str, images: PipelineImageInput, size: tuple[int, int], count: int) -> Tensor:
        """Condition images ``(count, 3, h, w)`` in 0..1, from one for all, one a prompt, or one each."""
        return _one_each(_sized(self._hints, images, size), count, f"images for the control {label}")

    def shade(self, images: PipelineImageInput, size: tuple[int, int], count: int) -> Tensor:
        """Grey images ``(count, 1, h, w)`` in 0..1."""
        return _one_each(_sized(self._shades, images, size), count, "mask images")

    def mask(self, images: PipelineImageInput, size: tuple[int, int], count: int) -> Tensor:
        """Masks ``(count, 1, h, w)`` of 0 and 1."""
        return _one_each(_sized(self._masks, images, size), count, "mask images")


def copies(given: int, wanted: int, what: str) -> int:
    """How often each of several pictures is used.

    Raises:
        UserError: the numbers do not divide.
    """
    if wanted % given:
        raise UserError(f"{given} {what} and {wanted} pictures to make; give one, or one each")
    return wanted // given


def _sized(processor: VaeImageProcessor, images: PipelineImageInput, size: tuple[int, int]) -> Tensor:
    made: Tensor = processor.preprocess(images, height=size[0], width=size[1])
    return made


def _one_each(rows: Tensor, count: int, what: str) -> Tensor:
    return rows.repeat_interleave(copies(len(rows), count, what), 0)
