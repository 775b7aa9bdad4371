"""Checkpoints that survive: whole or ignored, and the old one goes only when the new one is whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from counterpoint.types import Samples, UserError

MARKER = "complete.json"
"""File name -> SHA-256 of everything else in the folder. Without it a checkpoint does not exist."""

_LOOKED_AT = 8
"""Samples whose captions tell them from others."""


class CheckpointError(UserError):
    """There is no checkpoint where one was asked for, or it is damaged."""


def save(output_dir: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Write ``output_dir/checkpoint-<step>`` and then delete all but the newest ``keep`` whole ones.

    Args:
        write: fills the folder that it is given.

    Raises:
        OSError: nothing of the failed attempt is left, and no older checkpoint was touched.
    """
    final = output_dir / f"checkpoint-{step}"
    partial, before = (output_dir / f"checkpoint-{step}.{part}" for part in ("partial", "before"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        hashes = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        (partial / MARKER).write_text(json.dumps({"step": step, "files": hashes}, indent=1))
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        if final.exists():  # of the same step: until the new one has its name it counts under another
            shutil.rmtree(before, ignore_errors=True)
            final.rename(before)
        partial.rename(final)
        _sync(output_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
    for _, old in found(output_dir)[:-keep]:
        (old / MARKER).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    return final


def found(output_dir: Path) -> list[tuple[int, Path]]:
    """Checkpoints that have their marker, oldest first."""
    names = (
        (re.fullmatch(r"checkpoint-(\d+)(\.before)?", path.name), path) for path in output_dir.glob("checkpoint-*")
    )
    there = [(int(name[1]), not name[2], path) for name, path in names if name and (path / MARKER).is_file()]
    return [(step, path) for step, _, path in sorted(there)]


def verify(folder: Path) -> int:
    """Check every hash of a checkpoint and return its step.

    Raises:
        CheckpointError: no marker, or a file is missing or changed.
    """
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: its marker {MARKER} is missing or unreadable"
        ) from None
    for name, digest in marker["files"].items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise CheckpointError(f"{folder} is damaged: {name} is missing or does not match its recorded hash")
    return int(marker["step"])


def newest(output_dir: Path, warn: Callable[[str], None]) -> Path:
    """The newest undamaged checkpoint; damaged ones are named through ``warn``.

    Raises:
        CheckpointError: there is none.
    """
    for _, folder in reversed(found(output_dir)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            warn(f"{error}; trying the one before")
    raise CheckpointError(f"nothing to resume: {output_dir} has no complete checkpoint")


def fingerprint(samples: Samples) -> tuple[int, str]:
    """Tells samples from others: how many there are, and a hash of some captions, if they have any."""
    count = len(samples)
    few = samples.batch(sorted({number * count // _LOOKED_AT for number in range(_LOOKED_AT)}))
    return count, hashlib.sha256(json.dumps(few.get("caption", [])).encode()).hexdigest()


def check_samples(folder: Path, before: tuple[int, str] | None, now: tuple[int, str]) -> None:
    """Hold the samples of a run against those that a checkpoint was made with, by :func:`fingerprint`; an old one does
    not say.

    Raises:
        CheckpointError: they are others.
    """
    if before is None or before == now:
        return
    changed = f"{before[0]} samples, and there are {now[0]}" if before[0] != now[0] else "other captions"
    raise CheckpointError(f"{folder} was made with {changed}: the result would not be that of one run")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
