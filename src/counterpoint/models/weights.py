"""Weight files: what is in them, whether it is whole, and whether it fits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from counterpoint.types import UserError

PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a safetensors file, from its header alone.

    Raises:
        UserError: the file is missing, is a pickle, or is damaged.
    """
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code when it is read: only safetensors are loaded")
    if not path.is_file():
        raise UserError(f"there is no weight file {path}")
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model folder, sharded or not.

    Raises:
        UserError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if ".fp16." not in file.name]
    if files:
        return plain or files
    if any(path.suffix in PICKLES for path in folder.glob("*")):
        raise UserError(
            f"{folder} holds its weights as a pickle, which can run code when it is read: only safetensors are loaded"
        )
    raise UserError(f"{folder} holds no weights: there is no .safetensors file in it")


def check_fit(
    wanted: Mapping[str, torch.Tensor], found: Mapping[str, tuple[int, ...]], where: object, model: str = "this network"
) -> None:
    """Compare a file's tensors with those that a model has (on any device).

    Args:
        wanted: the model's.
        found: name -> shape, of the file.
        where: the file's name.
        model: what they have to fit, for the message.

    Raises:
        UserError: the first few tensors that are missing, foreign or of another shape.
    """
    problems = [
        f"{name} is {found[name]}, wanted {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name] != tensor.shape
    ]
    problems += [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is foreign" for name in found if name not in wanted]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"the weights in {where} do not fit {model}: {'; '.join(problems[:3])}{more}")


def on_meta(build: type[nn.Module], config: dict[str, object]) -> nn.Module:
    """A diffusers model without storage."""
    with torch.device("meta"):
        return build.from_config(config)


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled checkpoint, read without running anything that is in it.

    ``state_dict`` around them, as training frameworks write it, is taken off; other dictionaries become prefixes.
    Objects beside them, such as a configuration, are left out: whatever class or function they name, an inert one
    stands in for it.

    Raises:
        UserError: the file is missing, no checkpoint, or wants more than tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in _foreign(path)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a file that is no checkpoint raises is anybody's guess
        raise UserError(f"{path} holds something other than tensors, or is damaged: {_reason(error)}") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value.contiguous().clone() for name, value in _flat(content).items()}
    if not tensors:
        raise UserError(f"{path} holds no named tensors")
    return tensors


class _Inert:
    """Stands in for what a checkpoint names and is no tensor: takes anything, does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


def _foreign(path: Path) -> list[str]:
    """Classes and functions that a checkpoint names and that are no part of tensors; none for one in torch's old
    format, which is then read with no stand-ins."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:
        return []


def _reason(error: Exception) -> str:
    """Of torch's message, which advises how to run what is in the file, one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}"
    if text.startswith("Weights only"):
        return "it is no pickle of tensors"
    return (text.splitlines() or [type(error).__name__])[0]


def _flat(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in content.items():
        if torch.is_tensor(value):
            found[str(name)] = value
        elif isinstance(value, dict):
            found |= {f"{name}.{inner}": one for inner, one in _flat(value).items()}
    return found


_PROBES, _PROBE = 64, 4096


def fingerprint(places: Sequence[Path]) -> str:
    """Tells weights from others without reading all of them: of every safetensors file in folders or named itself its
    size, its header and 64 pieces of 4 KB that are spread evenly."""
    total = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]:
            size = path.stat().st_size
            total.update(f"{path.name}-{size}".encode())
            with path.open("rb") as file:
                for number in range(_PROBES + 1):
                    file.seek(number * max(size - _PROBE, 0) // _PROBES)
                    total.update(file.read(_PROBE))
    return total.hexdigest()[:16]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_folder(folder: Path, listing: str = "hashes.json") -> int:
    """Check every file of a folder against its hash list and return how many there are.

    Raises:
        UserError: a file is missing or changed.
    """
    if not (folder / listing).is_file():
        raise UserError(f"{folder / listing} is missing: this copy of counterpoint comes without these models")
    hashes = json.loads((folder / listing).read_text())
    for name, wanted in hashes.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: reinstall counterpoint")
        if digest(path) != wanted:
            raise UserError(f"{path} does not match its recorded hash: reinstall counterpoint")
    return len(hashes)


def list_hashes(folder: Path) -> dict[str, str]:
    """Path inside the folder -> SHA-256, for everything but the list itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "hashes.json")
    return {str(path.relative_to(folder)): digest(path) for path in files}
