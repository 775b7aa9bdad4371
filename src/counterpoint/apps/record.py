"""The recipe that every picture carries: data only, inside the PNG."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from counterpoint.types import UserError

KEY = "counterpoint"
SCHEMA = 1
_OTHERS = {".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
_PACKAGES = (
    "counterpoint", "diffusers", "torch", "transformers", "compel", "peft", "numpy", "pillow", "opencv-python-headless",
    "openvino",
)  # fmt: skip


def versions() -> dict[str, str]:
    """What the result depends on; of what is not installed there is none."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def platform_facts(device: str) -> dict[str, object]:
    """What decides in which order numbers are added, beyond the versions."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "system": platform.system(),
        "device": name,
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The CPU's model; what :mod:`platform` says of it is empty on most Linux systems."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def save_png(picture: PIL.Image.Image, path: Path, recipe: dict[str, Any]) -> None:
    """Write a picture and its recipe, whole or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    info = PngInfo()
    info.add_itxt(KEY, json.dumps({"schema": SCHEMA, **recipe}, default=str), zip=True)
    write_whole(path, lambda file: picture.save(file, "PNG", pnginfo=info))


def write_whole(path: Path, write: Any, *, durable: bool = True) -> None:
    """Let ``write(file)`` fill a temporary neighbour of ``path`` and move it into place.

    ``durable`` waits until it is on the disk; a killed process leaves a whole file or none either way.

    Raises:
        UserError: no space, no permission, or no such folder; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("x+b") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a record, whole or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    write_text(path, json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")


def settle(folder: Path, settings: dict[str, Any], remedy: str) -> None:
    """Let a folder belong to one run's settings, which are written to its ``settings.json``. A setting that says
    something of each of several things may come to speak of more of them, and stays what it was of each.

    Raises:
        UserError: it holds pictures made with others, ``remedy`` ends the message; or its file is damaged.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    try:
        before = {**json.loads(path.read_text())}
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{path} is damaged: it no longer says how the pictures beside it were made; {remedy}"
        ) from None
    found, changed = dict(before), []
    for key in dict.fromkeys([*before, *settings]):
        old, new = before.get(key), settings.get(key)
        each = isinstance(old or new, dict)
        if each and (both := {**(old or {}), **(new or {})}) == {**(new or {}), **(old or {})}:
            found[key] = both
        elif old != new:
            changed.append(f"{key}: {old} -> {new}")
    if changed:
        raise UserError(f"{folder} holds pictures made with other settings ({'; '.join(changed)}); {remedy}")
    if found != before:
        write_json(path, found)


def names_picture(out: Path) -> bool:
    """Whether ``--out`` is the name of a picture, and not that of a folder.

    Raises:
        UserError: of a picture in another format than is written.
    """
    if out.suffix.lower() in _OTHERS:
        raise UserError(f"--out {out}: images are written as .png; give a folder or a name ending in .png")
    return out.suffix.lower() == ".png" and not out.is_dir()


def check_spared(targets: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Fail before something is written over what it is made from.

    Raises:
        UserError: a target is one of the inputs.
    """
    given = {path.resolve() for path in inputs}
    for target in targets:
        if target.resolve() in given:
            raise UserError(f"{target} is what the picture is made from: choose another --out")


def check_writable(folder: Path) -> None:
    """Fail before the work, not after it; a folder that is not there yet is made and taken away again.

    Raises:
        UserError: the folder cannot be made or written.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror or error}") from None
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe inside a PNG.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        with PIL.Image.open(path, formats=("PNG",)) as picture:
            recipe = json.loads(picture.text[KEY])
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (OSError, SyntaxError, AttributeError, PIL.Image.DecompressionBombError):
        raise UserError(f"{path} is not a PNG that can be read") from None
    except (KeyError, ValueError, RecursionError):
        raise UserError(f"{path} carries no counterpoint recipe") from None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("schema"), int):
        raise UserError(f"{path} carries no counterpoint recipe")
    if recipe["schema"] > SCHEMA:
        raise UserError(
            f"{path} was made by a newer counterpoint (recipe {recipe['schema']}, here {SCHEMA}): update it"
        )
    return recipe
