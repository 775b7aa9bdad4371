"""What a call says besides its controls, held against what there can be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.conditions.layout import Layout
from counterpoint.types import Notice, UserError


def check_numbers(
    *, factor: int, height: int, width: int, steps: int, most: int, strength: float, guidance_scale: float
) -> None:
    """Hold the numbers of a call against their ranges.

    Args:
        factor: pixels a latent.
        height: of the picture, in pixels.
        width: likewise.
        steps: denoising steps.
        most: that the noise schedule has.
        strength: how far a starting picture is noised.
        guidance_scale: of classifier-free guidance.

    Raises:
        UserError: one is outside.
    """
    for name, value in (("height", height), ("width", width)):
        if value < factor or value % factor:
            raise UserError(f"{name} must be a positive multiple of {factor}, got {value}")
    if not isinstance(steps, Integral) or not 1 <= steps <= most:
        raise UserError(f"steps must be at least 1 and at most the {most} of the noise schedule, got {steps!r}")
    if not 0 < strength <= 1:
        raise UserError(f"strength must be in (0, 1], got {strength:g}")
    if not np.isfinite(guidance_scale):
        raise UserError(f"guidance scale must be a finite number, got {guidance_scale}")


def all_prompts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str | None] | None, images: int
) -> tuple[list[str], list[str | None]]:
    """The prompt and the negative prompt of every picture.

    Args:
        prompt: one, or several.
        negative_prompt: one for all, or one a prompt; ``None`` is none, which some models tell from an empty one.
        images: a prompt.

    Raises:
        UserError: there is none, or their numbers differ.
    """
    prompts = _texts("prompt", prompt)
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives: list[str | None] = [negative_prompt] * len(prompts)
    else:
        _texts("negative prompt", ["" if one is None else one for one in negative_prompt])
        negatives = list(negative_prompt)
    if images < 1:
        raise UserError(f"images a prompt must be at least 1, got {images}")
    if len(negatives) != len(prompts):
        raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one a prompt")
    return [one for one in prompts for _ in range(images)], [one for one in negatives for _ in range(images)]


def all_layouts(layout: Any, count: int) -> list[Layout | None]:
    """The layout of every picture, ``None`` where there is none.

    Args:
        layout: one for all, or one each.
        count: pictures.

    Raises:
        UserError: there are others than layouts, or another number of them.
    """
    layouts = list(layout) if isinstance(layout, (list, tuple)) else [layout] * count
    for one in layouts:
        if one is not None and not isinstance(one, Layout):
            raise UserError(f"a layout is what read_layout or Layout makes, got a {type(one).__name__}")
    if len(layouts) != count:
        raise UserError(f"{len(layouts)} layouts for {count} pictures; give one, or one each")
    return layouts


def _texts(what: str, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"the {what} is a text, or a list of some; got {given!r}")
    return texts


def check_noise(generator: Any, latents: Tensor | None, shape: tuple[int, ...]) -> None:
    """Hold what noise is drawn from, and noise that is given, against the latents' shape ``(b, c, h, w)``.

    Raises:
        UserError: it is no generator, there are more or fewer, or the noise has another shape.
    """
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise UserError(f"generator is a torch.Generator, or a list of some; got {one!r}")
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise UserError(f"{len(generator)} generators for {shape[0]} images; give one, or one an image")
    if latents is not None and tuple(latents.shape) != shape:
        raise UserError(f"latents are {shape} here, got {tuple(latents.shape)}")


def warn_if_broken(latents: Tensor) -> None:
    """Say so where latents ``(b, c, h, w)`` are no numbers: half precision that overflowed, or a rule of one's own that
    divides by nothing."""
    broken = (~latents.isfinite()).flatten(1).any(1)
    if broken.any():
        warnings.warn(
            f"{int(broken.sum())} of {len(latents)} pictures are made of values that are no numbers: in float16 some "
            "models overflow, and a rule of your own may divide by zero",
            BrokenPicture,
            stacklevel=4,
        )


class BrokenPicture(Notice):
    """A picture that shows nothing."""
