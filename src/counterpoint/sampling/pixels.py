"""Pictures, condition images and masks of a call, in any form that diffusers takes, as tensors for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch import Tensor

from counterpoint.types import UserError

_SLACK = 0.05
"""How far floats may leave 0..1, as resampled ones do."""


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

    def picture(self, images: Any, size: tuple[int, int]) -> Tensor:
        """Pictures to start from, ``(n, 3, h, w)`` in -1..1, in which floats may lie already."""
        return _sized(self.pictures, _taken(images, "start picture", 3, -1.0), size)

    def hint(self, label: str, images: Any, size: tuple[int, int], count: int) -> Tensor:
        """Condition images ``(count, 3, h, w)`` in 0..1, from one for all, one a prompt, or one each."""
        taken = _taken(images, f"image for the control {label}", 3)
        return _one_each(_sized(self._hints, taken, size), count, f"images for the control {label}")

    def region(self, label: str, masks: Any, shown: Any, size: tuple[int, int], count: int) -> Tensor:
        """Where a control speaks, ``(count, 1, h, w)`` in 0..1; masks have the shape of the picture or of its image."""
        masks = _taken(masks, f"mask for {label}", 1)
        _check_shape(masks, size, shown, f"mask for {label}")
        return _one_each(_sized(self._shades, masks, size), count, "mask images")

    def subject(self, masks: Any, shown: Sequence[Any], size: tuple[int, int], count: int) -> Tensor:
        """Where a foreground is, ``(count, 1, h, w)`` of 0 and 1; likewise."""
        masks = _taken(masks, "subject mask", 1)
        _check_shape(masks, size, shown, "subject mask")
        return self.mask(masks, size, count)

    def mask(self, images: Any, size: tuple[int, int], count: int) -> Tensor:
        """Masks ``(count, 1, h, w)`` of 0 and 1."""
        return _one_each(_sized(self._masks, _taken(images, "mask", 1), size), count, "mask images")


def _taken(images: Any, what: str, channels: int, least: float = 0.0) -> Any:
    """Pictures as diffusers' processor reads them, which takes the values of arrays and tensors as they are.

    Args:
        images: PIL pictures, arrays ``(h, w)`` or ``(.., h, w, c)``, tensors ``(h, w)`` or ``(.., c, h, w)``, or lists
            of them; bytes, booleans, or floats in 0..1.
        what: they are, for the message.
        channels: that arrays and tensors are to have, 1 or 3; grey becomes three alike, colours their mean.
        least: value of floats.

    Raises:
        UserError: one is something else.
    """
    if isinstance(images, (list, tuple)):
        return [_taken(one, what, channels, least) for one in images]
    if isinstance(images, PIL.Image.Image):
        return images
    if not isinstance(images, (np.ndarray, Tensor)):
        raise UserError(f"the {what} is a {type(images).__name__}: give a PIL picture, an array or a tensor")
    values = torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images
    if values.dtype in {torch.uint8, torch.bool}:
        values = values.float() / (255 if values.dtype == torch.uint8 else 1)
    if not values.is_floating_point() or values.numel() == 0:
        raise UserError(f"the {what} is {tuple(values.shape)} of {values.dtype}: give bytes, or floats in 0..1")
    low, high = float(values.min()), float(values.max())
    if not (low >= least - _SLACK and high <= 1 + _SLACK):
        raise UserError(f"the {what} has values from {low:g} to {high:g}: give bytes, or floats in 0..1")
    axis = -1 if isinstance(images, np.ndarray) else -3
    values = values if values.ndim > 2 else values.unsqueeze(axis)
    if (given := values.shape[axis]) not in {1, 3}:
        order = "(h, w, c)" if axis == -1 else "(c, h, w)"
        raise UserError(f"the {what} has {given} channels: give 1 or 3, in the order {order}")
    if given != channels:
        values = torch.cat([values] * 3, axis) if given == 1 else values.mean(axis, keepdim=True)
    return values.numpy() if isinstance(images, np.ndarray) else values


def _check_shape(masks: PipelineImageInput, size: tuple[int, int], shown: Any, what: str) -> None:
    """Refuse masks that would have to be stretched: they have the shape of the picture or of a condition image."""
    known = [size, *map(_shape, _several(shown))]
    for mask in _several(masks):
        height, width = _shape(mask)
        if height * width > 1 and not any(alike((height, width), one) for one in known):
            raise UserError(
                f"the {what} is {width} x {height} and the picture {size[1]} x {size[0]}: give it the picture's "
                "shape, at any resolution"
            )


def alike(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes have one shape, to the rounding of a small one."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)


def _several(images: Any) -> list[Any]:
    """All pictures of a nest of lists."""
    return [one for part in images for one in _several(part)] if isinstance(images, (list, tuple)) else [images]


def _shape(image: Any) -> tuple[int, int]:
    """Height and width of a picture, an array with its channels last or without, or a tensor."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    shape = image.shape[:-1] if isinstance(image, np.ndarray) and image.shape[-1] <= 4 else image.shape
    return int(shape[-2]), int(shape[-1])


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
