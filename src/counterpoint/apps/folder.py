"""Scoring pictures that are on disk already."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from counterpoint.apps.readers import load_clip, load_pristine
from counterpoint.apps.record import read_recipe
from counterpoint.conditions.image import read_image
from counterpoint.evaluation.suite import Row, stack
from counterpoint.metrics.boundary import boundary_f, outlines
from counterpoint.metrics.distribution import LEAST, frechet_distance, kernel_distance
from counterpoint.metrics.lpips import lpips
from counterpoint.metrics.maps import depth_rmse, mask_iou, miou, nearest_colour, overlap
from counterpoint.metrics.metric import Metric, mean
from counterpoint.metrics.niqe import ENLARGED, enlarged, is_small, luma, niqe
from counterpoint.metrics.similarity import ms_ssim, mse, psnr, ssim
from counterpoint.metrics.text import clip_score
from counterpoint.models.inception import load_inception
from counterpoint.models.load import TINY
from counterpoint.models.lpips import load_lpips
from counterpoint.types import UserError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Networks:
    """What measures may need, loaded when one does.

    Attributes:
        inception: file with the Inception weights, for ``fid`` and ``kid``.
        lpips: file with backbone and heads, for ``lpips``.
        clip: a transformers CLIP folder, for ``clip``; default the tiny towers.
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
        return load_inception(self.inception)

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
            return load_clip(self.clip, self.clip, self.clip)
        return load_clip(*(TINY / part for part in ("image_encoder", "text_encoder", "tokenizer")))


@dataclass(frozen=True)
class FolderMetric:
    """A measure of files: of each alone, of pairs, or of two whole sets.

    Attributes:
        of: what it looks at.
        rows: ``(networks, pictures)``, and references or texts where it looks at pairs or texts.
        reduce: from rows to a number; of a set, ``(rows, reference rows)``.
        higher: whether more is better.
        note: pictures -> what readers of the number must know.
    """

    of: Literal["picture", "text", "pair", "set"]
    rows: Callable[..., Tensor]
    reduce: Callable[..., float] = mean
    higher: bool = True
    note: Callable[[Tensor], str] = lambda _: ""

    def metric(self, name: str, rows: Tensor, note: str = "") -> Metric:
        """Finished rows under a name."""
        made = Metric(name, lambda rows: rows, self.reduce, higher=self.higher)
        made.update(rows)
        made.note = note
        return made


def _niqe(_: Networks, pictures: Tensor) -> Tensor:
    return niqe(luma(enlarged(pictures)), load_pristine())


def _grey(pictures: Tensor) -> Tensor:
    return pictures.mean(1)


def _classes(pictures: Tensor, references: Tensor) -> tuple[Tensor, Tensor, int]:
    """Colours of the reference are the classes; a picture's pixels take the nearest."""
    images = [(one * 255).round().byte().permute(0, 2, 3, 1) for one in (pictures, references)]
    palette = images[1].reshape(-1, 3).unique(dim=0)
    if len(palette) > 512:
        raise UserError(
            f"a segmentation image has few colours, this one has {len(palette)}: it is a photograph or a JPEG"
        )
    return nearest_colour(images[0], palette), nearest_colour(images[1], palette), len(palette)


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
    "mask_iou": FolderMetric("pair", lambda _, a, b: mask_iou(_grey(a) > 0.5, _grey(b) > 0.5)),
    "miou": FolderMetric("pair", _miou),
    "boundary_f": FolderMetric("pair", _boundary),
    "fid": FolderMetric("set", lambda nets, pictures: nets.inception_features(pictures), frechet_distance, False),
    "kid": FolderMetric("set", lambda nets, pictures: nets.inception_features(pictures), kernel_distance, False),
    "tower_fid": FolderMetric("set", lambda nets, pictures: nets.towers[0](pictures), frechet_distance, False),
    "tower_kid": FolderMetric("set", lambda nets, pictures: nets.towers[0](pictures), kernel_distance, False),
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
    files, others = _pictures(folder), {} if reference is None else _pictures(reference)
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
            notes[name] = METRICS[name].note(picture) or notes.get(name, "")
        single = [METRICS[name].metric(name, found[name][-1], notes[name]) for name in names if name not in sets]
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
    distance = METRICS[name].reduce
    metric = Metric(
        name, lambda rows: rows, lambda rows: distance(rows, references.double()), higher=False, distinct=True
    )
    metric.update(rows)
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


def _pictures(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES}
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
    listing = folder / "metadata.jsonl"
    if listing.is_file():
        lines = [json.loads(line) for line in listing.read_text().splitlines() if line.strip()]
        texts = {Path(line["file_name"]).stem: line["text"] for line in lines if "text" in line}
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
