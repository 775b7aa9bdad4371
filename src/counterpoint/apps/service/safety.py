"""What happens to pictures that nobody should see."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter

from counterpoint.types import UserError

Check = Callable[[PIL.Image.Image], bool]
"""Whether a picture is unsafe."""
Safety = Callable[[PIL.Image.Image], tuple[PIL.Image.Image, str]]
"""What is handed out in a picture's place, and what was found: ``unchecked``, ``safe``, ``flagged`` or ``blurred``."""
ACTIONS = ("off", "flag", "blur", "refuse")


def load_safety(action: str, checker: str | Path | Check | None) -> Safety:
    """A safety checker with an action.

    Args:
        action: one of :data:`ACTIONS`.
        checker: folder of diffusers' safety checker, ``MODULE:FUNCTION`` of an installed one, or the function itself.

    Raises:
        UserError: there is no such action, or no checker for it.
    """
    found = find_check(action, checker)
    if found is None:
        return lambda picture: (picture, "unchecked")
    return safety(action, _checker(found) if isinstance(found, Path) else found)


def find_check(action: str, checker: str | Path | Check | None) -> Check | Path | None:
    """The function or folder that checks; ``None`` where nothing does.

    Raises:
        UserError: as :func:`load_safety`, or the worker's process could not import the function.
    """
    if action not in ACTIONS:
        raise UserError(f"unknown safety {action!r}; there are {', '.join(ACTIONS)}")
    if action == "off":
        return None
    if callable(checker):
        home = sys.modules.get(getattr(checker, "__module__", ""))
        if getattr(home, getattr(checker, "__qualname__", ""), None) is not checker:
            raise UserError("the safety checker cannot be given to another process: it is no function of a module")
        return checker
    if checker is not None and Path(checker).is_dir():
        return Path(checker)
    module, _, name = str(checker).partition(":")
    if checker is None or not name:
        raise UserError(
            f"--safety {action} wants --safety-checker FOLDER, such as SD1.5's own safety_checker, or MODULE:FUNCTION"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--safety-checker {checker}: {error}") from None
    if not callable(found):
        raise UserError(f"--safety-checker {checker} is no function")
    return found


def safety(action: str, unsafe: Check) -> Safety:
    """An action on pictures that a check of your own finds."""

    def apply(picture: PIL.Image.Image) -> tuple[PIL.Image.Image, str]:
        if not unsafe(picture):
            return picture, "safe"
        if action == "refuse":
            raise UserError("the safety checker refused a picture")
        if action == "blur":
            return picture.filter(PIL.ImageFilter.GaussianBlur(max(picture.size) / 16)), "blurred"
        return picture, "flagged"

    return apply


def _checker(folder: Path) -> Check:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    checker = StableDiffusionSafetyChecker.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    side = checker.config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def unsafe(picture: PIL.Image.Image) -> bool:
        pixels = processor(picture, return_tensors="pt").pixel_values
        _, found = checker(images=[np.asarray(picture)], clip_input=pixels)
        return bool(found[0])

    return unsafe
