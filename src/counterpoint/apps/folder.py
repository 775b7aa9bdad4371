"""Scoring pictures that are on disk already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint.apps.readers import load_clip, load_pristine, weights_file
from counterpoint.apps.record import read_recipe
from counterpoint.conditions.image import read_image
from counterpoint.data.photos import METADATA, read_metadata
from counterpoint.evaluation.suite import Row, stack
from counterpoint.metrics.distribution import LEAST
from counterpoint.metrics.metric import Metric
from counterpoint.metrics.table import METRICS
from counterpoint.models.inception import load_inception
from counterpoint.models.load import BUILT_IN, locate
from counterpoint.models.lpips import LpipsNetwork, load_lpips
from counterpoint.types import UserError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Networks:
    """What measures may need, loaded when one does.

    Attributes:
        inception: file with the Inception weights, or a hub id that holds it, for ``fid`` and ``kid``.
        lpips: file with backbone and heads, for ``lpips``.
        clip: a transformers CLIP folder or hub id, for ``clip``; default the tiny towers.
    """

    inception: Path | None = None
    lpips: Path | None = None
    clip: Path | None = None

    @cached_property
    def inception_features(self) -> Callable[[Tensor], Tensor]:
        """Pictures -> features."""
        if self.inception is None:
            raise UserError(
                "fid and kid need the Inception weights: give --inception FILE.safetensors (the published "
                "pt_inception-2015-12-05), or use tower_kid, which stands on the tiny family's image tower"
            )
        return load_inception(weights_file(self.inception))

    @cached_property
    def perceptual(self) -> LpipsNetwork:
        """Pictures -> features."""
        if self.lpips is None:
            raise UserError("lpips needs its weights: give --lpips FILE.safetensors")
        return load_lpips(self.lpips)

    @cached_property
    def towers(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
        """Pictures and texts -> CLIP embeddings; the tiny family's are the default."""
        if str(self.clip or BUILT_IN) == BUILT_IN:
            return load_clip(*(locate(BUILT_IN) / part for part in ("image_encoder", "text_encoder", "tokenizer")))
        return load_clip(*[locate(str(self.clip))] * 3)

    @property
    def captions(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
        """The same, once they were named: most words the family's own do not know, and cannot judge."""
        if self.clip is None:
            raise UserError("clip needs a CLIP: give --clip FOLDER, or --clip tiny for pictures of the tiny family")
        return self.towers


@dataclass(frozen=True)
class Needs:
    """What a measure looks at (each picture, with its text, with its partner, or two whole sets), and the networks that
    it is made of."""

    of: Literal["picture", "text", "pair", "set"]
    networks: Callable[[Networks], tuple[Any, ...]] = lambda _: ()


NEEDS = {
    "niqe": Needs("picture", lambda _: (load_pristine(),)),
    "clip": Needs("text", lambda networks: networks.captions),
    **dict.fromkeys(("psnr", "mse", "ssim", "ms_ssim"), Needs("pair")),
    "lpips": Needs("pair", lambda networks: (networks.perceptual, networks.perceptual.weights)),
    **dict.fromkeys(("depth_rmse", "mask_iou", "miou", "boundary_f"), Needs("pair")),
    **dict.fromkeys(("fid", "kid"), Needs("set", lambda networks: (networks.inception_features,))),
    **dict.fromkeys(("tower_fid", "tower_kid"), Needs("set", lambda networks: (networks.towers[0],))),
}
"""Measures of :mod:`counterpoint.metrics.table` that files can have."""


@torch.no_grad()
def score_folders(
    names: Sequence[str],
    folder: Path,
    reference: Path | None,
    networks: Networks,
    listen: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """One row for the whole folder, then one a file with the measures that a single file has.

    Args:
        names: keys of :data:`NEEDS`.
        folder: the pictures.
        reference: what they are compared with: pairs by file name, or as a set.
        networks: for the measures that need one.
        listen: hears ``(files done, files in all)``.

    Raises:
        UserError: something is missing, does not match or cannot be read; nothing is scored then.
    """
    unknown = [name for name in names if name not in NEEDS]
    if unknown:
        raise UserError(f"unknown measure {unknown[0]!r}; there are {', '.join(NEEDS)}")
    kinds = {NEEDS[name].of: name for name in names}
    if reference is None and kinds.keys() & {"pair", "set"}:
        raise UserError(f"{kinds.get('pair') or kinds['set']} compares two folders: give a second one")
    files, others = pictures_in(folder), {} if reference is None else pictures_in(reference)
    for name in names:
        _check_counts(name, len(files), len(others))
    pairs = _matched(folder, files, reference, others) if "pair" in kinds else {}
    made = {name: NEEDS[name].networks(networks) for name in names}
    texts = _texts(folder, files) if "text" in kinds else {}
    sets = [name for name in names if NEEDS[name].of == "set"]
    features: dict[str, list[Tensor]] = {name: [] for name in sets}
    seen = list(others.values()) if sets else []
    total = len(seen) + len(files)
    for done, path in enumerate(seen, start=1):
        picture = stack([read_image(path)])
        for name in sets:
            features[name].append(made[name][0](picture))
        if listen is not None:
            listen(done, total)
    wholes = {
        name: METRICS[name](*made[name], *([torch.cat(features[name])] if name in sets else [])) for name in names
    }
    notes = dict.fromkeys(names, "")
    rows = []
    for done, (stem, path) in enumerate(files.items(), start=len(seen) + 1):
        picture = stack([read_image(path)])
        beside = {"text": [[texts.get(stem)]], "pair": [_partner(picture, path, pairs[stem])] if pairs else []}
        single = []
        for name, whole in wholes.items():
            row = whole.measure(picture, *beside.get(NEEDS[name].of, []))
            whole.add(row)
            notes[name] = notes[name] or whole.note
            single += [] if name in sets else [_of_one(whole, row)]
        rows += [Row(path.name, folder.name, tuple(single))] if single else []
        if listen is not None:
            listen(done, total)
    for name, whole in wholes.items():
        whole.note = notes[name]
    return [Row(folder.name, "all pictures", tuple(wholes.values())), *rows]


def _of_one(whole: Metric, row: Tensor) -> Metric:
    """The same measure of one picture."""
    metric = Metric(whole.name, whole.measure, whole.reduce, higher=whole.higher)
    metric.add(row)
    metric.note = whole.note
    return metric


def _partner(picture: Tensor, path: Path, other: Path) -> Tensor:
    reference = stack([read_image(other)])
    if reference.shape != picture.shape:
        sizes = [f"{one.shape[3]} x {one.shape[2]}" for one in (picture, reference)]
        raise UserError(
            f"{path} is {sizes[0]} pixels and {other} is {sizes[1]}: only pictures of one size can be compared"
        )
    return reference


def pictures_in(folder: Path) -> dict[str, Path]:
    """Name without suffix -> picture.

    Raises:
        UserError: there are none, or two of a name.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURES and files.setdefault(path.stem, path) != path:
            raise UserError(f"{files[path.stem]} and {path.name} differ in their suffix only: which one is meant?")
    if not files:
        raise UserError(f"there are no pictures in {folder} ({', '.join(sorted(PICTURES))})")
    return files


def _matched(folder: Path, files: dict[str, Path], reference: Path, others: dict[str, Path]) -> dict[str, Path]:
    for here, there, first, second in ((files, others, folder, reference), (others, files, reference, folder)):
        lonely = [here[stem].name for stem in here if stem not in there]
        if lonely:
            raise UserError(
                f"pairs are made by file name, and {len(lonely)} of the {len(here)} pictures in {first} have no "
                f"partner in {second}, such as {lonely[0]}"
            )
    return others


def _texts(folder: Path, files: dict[str, Path]) -> dict[str, str]:
    """Prompts: from ``metadata.jsonl``, else from the recipes inside the pictures."""
    listing = folder / METADATA
    if listing.is_file():
        rows = {row["file_name"]: row for row in read_metadata(folder)}
        texts = {stem: rows[path.name]["text"] for stem, path in files.items() if "text" in rows.get(path.name, {})}
    else:
        texts = {}
        for stem, path in files.items():
            with suppress(UserError, KeyError):
                texts[stem] = read_recipe(path)["request"]["prompt"]
    missing = [path.name for stem, path in files.items() if stem not in texts]
    if missing:
        raise UserError(
            f"clip needs a text for every picture, in {listing} (file_name, text) or as the recipe inside; there is "
            f"none for {missing[0]}"
        )
    return texts


def _check_counts(name: str, files: int, others: int) -> None:
    least = {"fid": LEAST, "tower_fid": LEAST, "kid": 2, "tower_kid": 2}.get(name, 1)
    if NEEDS[name].of == "set" and min(files, others) < least:
        raise UserError(
            f"{name} wants at least {least} pictures in each folder, there are {files} and {others}"
            + (f"; {name.replace('fid', 'kid')} is unbiased and takes fewer" if "fid" in name else "")
        )
