"""Scenes rendered once and read back by memory map: training never waits for the painter."""

from __future__ import annotations

import json
import os
import random
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from counterpoint.conditions.canny import canny
from counterpoint.conditions.layout import Instance, Interaction, Layout
from counterpoint.conditions.lines import lines
from counterpoint.conditions.openpose import draw_pose
from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.data.scenes.caption import caption, phrase
from counterpoint.data.scenes.maps import seg_map
from counterpoint.data.scenes.render import scene
from counterpoint.data.scenes.vocabulary import SIZE

SHARD = 2048
"""Scenes a shard."""
PEOPLE = 2
"""People a scene has at most."""


class SceneShards:
    """Scenes ``first .. first + count`` as arrays on disk, rendered by :meth:`prepare`.

    Stored fields: ``image (128, 128, 3)`` uint8, ``seg`` and ``depth (128, 128)`` uint8 (disparity times 255),
    ``keypoints (2, 18, 2)`` float32 (``nan`` where there is none), ``caption`` str, ``layout`` after
    :meth:`laid_out`, and whatever :meth:`derive` added.
    Condition images (``control:pose`` and so on, ``(128, 128, 3)`` uint8) are made from them when they are asked for.

    Args:
        root: folder of the shards.
        first: number of the first scene, a multiple of 2048.
        count: how many, likewise.
        fields: what :meth:`batch` returns.
    """

    def __init__(self, root: Path, first: int, count: int, fields: Sequence[str] = ("image",)) -> None:
        if count % SHARD or first % SHARD:
            raise ValueError(
                f"scenes come in shards of {SHARD}: first and count must be multiples of it, got {first} and {count}"
            )
        self.root, self.first, self.count = root, first, count
        self.fields = dict(zip(fields, fields, strict=True))

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The fields of several samples, stacked as tensors; captions as a list. Positions count from 0."""
        return {name: self._read(field, indices) for field, name in self.fields.items()}

    def soft_edges(self) -> SceneShards:
        """Derive the field ``hed (128, 128)`` uint8, too slow to be made on the fly."""
        return self.derive("hed", lambda images: np.stack([soft_edge(image)[..., 0] for image in images]))

    def rename(self, field: str, name: str) -> SceneShards:
        """Let :meth:`batch` call a field something else."""
        self.fields[field] = name
        return self

    def prepare(self, workers: int | None = None) -> SceneShards:
        """Render every shard that is not there yet. Each appears whole or not at all: kill it and call it again."""
        return self._each("", _render_shard, "rendering scenes", workers)

    def laid_out(self) -> SceneShards:
        """Derive the field ``layout``: who and what stands where and does what, without the colours and textures that
        ``layout:detailed`` has; and ``caption:plain``, which does not say who does what."""
        return self._each("layouts.json", _lay_out_shard, "computing layouts")

    def members(self) -> np.ndarray:
        """How many people and things each scene has, after :meth:`laid_out`."""
        return np.array([len(row["instances"]) for start in self._starts() for row in _layouts(self._folder(start))])

    def derive(self, field: str, make: Callable[[np.ndarray], np.ndarray]) -> SceneShards:
        """Add a stored field: ``make(images (n, 128, 128, 3)) -> (n, ...)``, shard by shard."""
        name = f"{field}.npy"
        missing = self._missing(name)
        for start in tqdm(missing, desc=f"computing {field}", unit="shard", disable=not missing):
            folder = self._folder(start)
            if not (folder / name).exists():
                save_whole(folder / name, make(np.load(folder / "image.npy", mmap_mode="r")))
        return self

    def _each(self, name: str, make: Callable[[Path, int], None], what: str, workers: int | None = None) -> SceneShards:
        """``make(folder, start)`` the file of every shard, or the folder itself, on all cores."""
        if missing := self._missing(name):
            self.root.mkdir(parents=True, exist_ok=True)
            with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
                done = pool.map(partial(_unless_there, name, make), map(self._folder, missing), missing)
                for _ in tqdm(done, total=len(missing), desc=what, unit="shard"):
                    pass
        return self

    def _missing(self, name: str) -> list[int]:
        """Shards without a file, in an order of chance: runs that begin together share the work."""
        lacking = [start for start in self._starts() if not (self._folder(start) / name).exists()]
        return random.sample(lacking, len(lacking))

    def _starts(self) -> range:
        return range(self.first, self.first + self.count, SHARD)

    def _folder(self, start: int) -> Path:
        return self.root / f"scenes-{start:08d}"

    def _read(self, field: str, indices: Sequence[int]) -> Any:
        if field == "caption":
            return [_captions(self._folder(self.first + i // SHARD * SHARD))[i % SHARD] for i in indices]
        if field == "caption:plain":
            return [_layouts(self._folder(self.first + i // SHARD * SHARD))[i % SHARD]["plain"] for i in indices]
        if field.startswith("layout"):
            name = "phrase" if field == "layout:detailed" else "name"
            rows = [_layouts(self._folder(self.first + i // SHARD * SHARD))[i % SHARD] for i in indices]
            return [_layout(row, name) for row in rows]
        if field.startswith("control:"):
            return torch.from_numpy(np.stack([self._control(field.removeprefix("control:"), i) for i in indices]))
        return torch.from_numpy(np.stack([self._row(field, i) for i in indices]))

    def _row(self, field: str, index: int) -> np.ndarray:
        return _open(self._folder(self.first + index // SHARD * SHARD), field)[index % SHARD]

    def _control(self, kind: str, index: int) -> np.ndarray:
        if kind == "canny":
            return canny(self._row("image", index))
        if kind == "lineart":
            return lines(self._row("image", index))
        if kind == "pose":
            return draw_pose(self._row("keypoints", index), SIZE, SIZE)
        if kind == "seg":
            return seg_map(self._row("seg", index))
        if kind in {"depth", "hed"}:
            return np.repeat(self._row(kind, index)[..., None], 3, -1)
        raise ValueError(f"scenes have no control {kind!r}")


def save_whole(path: Path, array: np.ndarray) -> None:
    """Write an array, whole or not at all."""
    half = _half(path)
    np.save(half, array)
    half.rename(path)


def _half(path: Path) -> Path:
    """Where something is written before it gets its name; nobody else's, on whatever machine shares the cache."""
    return path.with_name(f"{uuid.uuid4().hex}.partial.{path.name}")


@lru_cache(maxsize=4096)
def _open(folder: Path, field: str) -> np.ndarray:
    return np.load(folder / f"{field}.npy", mmap_mode="r")


@lru_cache(maxsize=1024)
def _captions(folder: Path) -> list[str]:
    return json.loads((folder / "captions.json").read_text())


@lru_cache(maxsize=1024)
def _layouts(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "layouts.json").read_text())


def _layout(row: dict[str, Any], name: str) -> Layout:
    """Things that others hide are left out, and what they do."""
    there = [place for place, one in enumerate(row["instances"]) if one["box"][0] < one["box"][2]]
    instances = tuple(Instance(row["instances"][place][name], tuple(row["instances"][place]["box"])) for place in there)
    interactions = tuple(
        Interaction(there.index(subject), action, there.index(other))
        for subject, action, other in row["triplets"]
        if subject in there and other in there
    )
    return Layout(instances, interactions)


def _unless_there(name: str, make: Callable[[Path, int], None], folder: Path, start: int) -> None:
    """Another run may have made it meanwhile."""
    if not (folder / name).exists():
        make(folder, start)


def _lay_out_shard(folder: Path, start: int) -> None:
    rows = []
    for number in range(start, start + SHARD):
        one = scene(number)
        coloured = one.layout.style != "line drawing"
        instances = [
            {
                "phrase": phrase(member, colour=coloured),
                "name": phrase(member, colour=False, texture=False),
                "box": thing.box,
            }
            for thing, member in zip(one.instances, one.layout.members, strict=True)
        ]
        plain = caption(replace(one.layout, triplets=()), "brief")
        rows.append({"instances": instances, "triplets": one.triplets, "plain": plain})
    half = _half(folder / "layouts.json")
    half.write_text(json.dumps(rows, default=float))
    half.rename(folder / "layouts.json")


def _render_shard(folder: Path, start: int) -> None:
    half = _half(folder)
    half.mkdir(parents=True)
    scenes = [scene(number) for number in range(start, start + SHARD)]
    keypoints = np.full((SHARD, PEOPLE, 18, 2), np.nan, np.float32)
    for row, one in zip(keypoints, scenes, strict=True):
        for person, joints in enumerate(one.keypoints):
            row[person] = joints
    np.save(half / "image.npy", np.stack([one.image for one in scenes]))
    np.save(half / "seg.npy", np.stack([one.seg for one in scenes]))
    np.save(half / "depth.npy", np.stack([np.rint(one.depth * 255).astype(np.uint8) for one in scenes]))
    np.save(half / "keypoints.npy", keypoints)
    (half / "captions.json").write_text(json.dumps([one.caption for one in scenes]))
    try:
        half.rename(folder)
    except OSError:  # another process was faster, with the same scenes
        shutil.rmtree(half)
        if not folder.exists():
            raise
