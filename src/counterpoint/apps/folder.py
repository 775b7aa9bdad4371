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
from counterpoint.metrics.boundary import boundary_f, outlines
from counterpoint.metrics.distribution import LEAST, frechet_from, kernel_from
from counterpoint.metrics.lpips import lpips
from counterpoint.metrics.maps import depth_rmse, mask_iou, miou, overlap
from counterpoint.metrics.metric import Metric, mean
from counterpoint.metrics.niqe import ENLARGED, enlarged, is_small, luma, niqe
from counterpoint.metrics.similarity import ms_ssim, mse, psnr, ssim
from counterpoint.metrics.text import clip_score
from counterpoint.models.inception import load_inception
from counterpoint.models.load import TINY, locate
from counterpoint.models.lpips import load_lpips
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
    def perceptual(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Two batches of pictures -> distances."""
        if self.lpips is None:
            raise UserError("lpips needs its weights: give --lpips FILE.safetensors")
        network = load_lpips(self.lpips)
        return lambda one, other: lpips(network(one), network(other), network.weights)

    @cached_property
    def towers(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
        """Pictures and texts -> CLIP embeddings."""
        if self.clip is not None:
            return load_clip(*[locate(str(self.clip))] * 3)
        return load_clip(*(TINY / part for part in ("image_encoder", "text_encoder", "tokenizer")))


@dataclass(frozen=True)
class FolderMetric:
    """A measure of files: of each alone, of pairs, or of two whole sets.

    Attributes:
        of: what it looks at.
        rows: ``(networks, pictures)``, and references or texts where it looks at pairs or texts.
        reduce: from rows to a number; of a set, from reference rows to that.
        higher: whether more is better.
        note: pictures -> what readers of the number must know.
    """

    of: Literal["picture", "text", "pair", "set"]
    rows: Callable[..., Tensor]
    reduce: Callable[..., Any] = mean
    higher: bool = True
    note: Callable[[Tensor], str] = lambda _: ""

    def metric(self, name: str, rows: Tensor, note: str = "") -> Metric:
        """Finished rows under a name."""
        made = Metric(name, self.rows, self.reduce, higher=self.higher)
        made.add(rows)
        made.note = note
        return made


def _niqe(_: Networks, pictures: Tensor) -> Tensor:
    return niqe(luma(enlarged(pictures)), load_pristine())


def _grey(pictures: Tensor) -> Tensor:
    return pictures.mean(1)


def _classes(pictures: Tensor, references: Tensor) -> tuple[Tensor, Tensor, int]:
    """Every colour of either is a class."""
    both = (torch.stack([pictures, references]) * 255).round().int()
    codes = both[:, :, 0] << 16 | both[:, :, 1] << 8 | both[:, :, 2]
    colours, classes = codes.unique(return_inverse=True)
    if len(colours) > 512:
        raise UserError(
            f"segmentation images have few colours, these two have {len(colours)}: one is a photograph or a JPEG"
        )
    return classes[0], classes[1], len(colours)


def _mask(pictures: Tensor) -> Tensor:
    """Whatever is bright in some colour."""
    return pictures.amax(1) > 0.5


def _miou(_: Networks, pictures: Tensor, references: Tensor) -> Tensor:
    """Each pair has its own classes, so the mean is over pairs."""
    return torch.tensor([miou(overlap(*_classes(pictures, references)))], dtype=torch.float64)


def _boundary(_: Networks, pictures: Tensor, references: Tensor) -> Tensor:
    found, wanted, _ = _classes(pictures, references)
    return boundary_f(outlines(found), outlines(wanted))


METRICS = {
    "niqe": FolderMetric("picture", _niqe, higher=False, note=lambda pictures: ENLARGED if is_small(pictures) else ""),
    "clip": FolderMetric(
        "text", lambda nets, pictures, texts: clip_score(nets.towers[0](pictures), nets.towers[1](texts))
    ),
    "psnr": FolderMetric("pair", lambda _, a, b: psnr(a, b)),
    "mse": FolderMetric("pair", lambda _, a, b: mse(a, b), higher=False),
    "ssim": FolderMetric("pair", lambda _, a, b: ssim(a, b)),
    "ms_ssim": FolderMetric("pair", lambda _, a, b: ms_ssim(a, b)),
    "lpips": FolderMetric("pair", lambda nets, a, b: nets.perceptual(a, b), higher=False),
    "depth_rmse": FolderMetric("pair", lambda _, a, b: depth_rmse(_grey(a), _grey(b)), higher=False),
    "mask_iou": FolderMetric("pair", lambda _, a, b: mask_iou(_mask(a), _mask(b))),
    "miou": FolderMetric("pair", _miou),
    "boundary_f": FolderMetric("pair", _boundary),
    "fid": FolderMetric("set", lambda nets, pictures: nets.inception_features(pictures), frechet_from, False),
    "kid": FolderMetric("set", lambda nets, pictures: nets.inception_features(pictures), kernel_from, False),
    "tower_fid": FolderMetric("set", lambda nets, pictures: nets.towers[0](pictures), frechet_from, False),
    "tower_kid": FolderMetric("set", lambda nets, pictures: nets.towers[0](pictures), kernel_from, False),
}
"""Name -> measure. ``tower_fid`` and ``tower_kid`` stand on a CLIP's image tower: they are no FID and no KID."""


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
        names: keys of :data:`METRICS`.
        folder: the pictures.
        reference: what they are compared with: pairs by file name, or as a set.
        networks: for the measures that need one.
        listen: hears ``(files done, files in all)``.

    Raises:
        UserError: something is missing, does not match or cannot be read; nothing is scored then.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(f"unknown measure {unknown[0]!r}; there are {', '.join(METRICS)}")
    kinds = {METRICS[name].of: name for name in names}
    if reference is None and kinds.keys() & {"pair", "set"}:
        raise UserError(f"{kinds.get('pair') or kinds['set']} compares two folders: give a second one")
    files, others = pictures_in(folder), {} if reference is None else pictures_in(reference)
    for name in names:
        _check_counts(name, len(files), len(others))
    pairs = _matched(folder, files, reference, others) if "pair" in kinds else {}
    texts = _texts(folder, files) if "text" in kinds else {}
    sets = [name for name in names if METRICS[name].of == "set"]
    total = len(files) + len(others) * bool(sets)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    notes: dict[str, str] = {}
    rows = []
    for done, (stem, path) in enumerate(files.items(), start=1):
        picture = stack([read_image(path)])
        for name in names:
            found[name].append(_row(METRICS[name], networks, picture, pairs.get(stem), texts.get(stem), path))
        said = {name: METRICS[name].note(picture) for name in names}
        notes |= {name: note for name, note in said.items() if note or name not in notes}
        single = [METRICS[name].metric(name, found[name][-1], said[name]) for name in names if name not in sets]
        rows += [Row(path.name, folder.name, tuple(single))] if single else []
        if listen is not None:
            listen(done, total)
    features: dict[str, list[Tensor]] = {name: [] for name in sets}
    for done, path in enumerate(others.values() if sets else (), start=len(files) + 1):
        picture = stack([read_image(path)])
        for name in sets:
            features[name].append(METRICS[name].rows(networks, picture))
        if listen is not None:
            listen(done, total)
    whole = [
        _set_metric(name, torch.cat(found[name]), torch.cat(features[name]))
        if name in sets
        else METRICS[name].metric(name, torch.cat(found[name]), notes[name])
        for name in names
    ]
    return [Row(folder.name, "all pictures", tuple(whole)), *rows]


def _set_metric(name: str, rows: Tensor, references: Tensor) -> Metric:
    """A distance whose interval comes from leaving out pictures of the first folder."""
    one = METRICS[name]
    metric = Metric(name, one.rows, one.reduce(references), higher=one.higher, distinct=True)
    metric.add(rows)
    return metric


def _row(
    metric: FolderMetric, networks: Networks, picture: Tensor, other: Path | None, text: str | None, path: Path
) -> Tensor:
    if metric.of == "text":
        return metric.rows(networks, picture, [text])
    if metric.of != "pair":
        return metric.rows(networks, picture)
    assert other is not None
    reference = stack([read_image(other)])
    if reference.shape != picture.shape:
        sizes = [f"{one.shape[3]} x {one.shape[2]}" for one in (picture, reference)]
        raise UserError(
            f"{path} is {sizes[0]} pixels and {other} is {sizes[1]}: only pictures of one size can be compared"
        )
    return metric.rows(networks, picture, reference)


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
    if METRICS[name].of == "set" and min(files, others) < least:
        raise UserError(
            f"{name} wants at least {least} pictures in each folder, there are {files} and {others}"
            + (f"; {name.replace('fid', 'kid')} is unbiased and takes fewer" if "fid" in name else "")
        )
