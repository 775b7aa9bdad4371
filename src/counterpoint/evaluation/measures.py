"""Measures of finished pictures against the cases that they were made for, as the papers' tables have them.

Where the papers give no definition, ``docs/evaluation.md`` has ours. Every function here makes a fresh
:class:`Metric` whose ``update`` takes ``(pictures, cases, readers)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.data.pairs import Case
from counterpoint.evaluation.suite import Readers, stack, unstack
from counterpoint.metrics.boundary import boundary_f
from counterpoint.metrics.distribution import LEAST, frechet_distance, kernel_distance
from counterpoint.metrics.maps import depth_rmse, mask_iou, miou, overlap
from counterpoint.metrics.metric import Metric
from counterpoint.metrics.niqe import ENLARGED, enlarged, is_small, luma, niqe
from counterpoint.metrics.silence import l1_cycle, total_variance
from counterpoint.metrics.similarity import SMALLEST, ms_ssim, mse, psnr, ssim
from counterpoint.metrics.text import clip_score


def clip() -> Metric:
    """Agreement of picture and prompt, 0..100."""

    def measure(pictures: Tensor, cases: Sequence[Case], readers: Readers) -> Tensor:
        return clip_score(readers.embed_pictures(pictures), readers.embed_texts([case.prompt for case in cases]))

    return Metric("clip", measure)


def map_mse(kind: str) -> Metric:
    """Squared error of the condition image read back, in 0..1 colours: MSE-S, MSE-D, MSE-H."""

    def measure(pictures: Tensor, cases: Sequence[Case], readers: Readers) -> Tensor:
        return mse(readers.maps[kind](pictures), stack([case.images[kind] for case in cases]))

    return Metric(f"mse_{kind}", measure, higher=False)


def background_mse(kind: str) -> Metric:
    """The same where the person of the pose does not stand: a person who is there is no error of the background."""

    def measure(pictures: Tensor, cases: Sequence[Case], readers: Readers) -> Tensor:
        outside = ~_masks([case.person for case in cases])
        return mse(readers.maps[kind](pictures), stack([case.images[kind] for case in cases]), outside)

    return Metric(f"mse_{kind}_background", measure, higher=False)


def person_iou() -> Metric:
    """mIoU-P: overlap of the people in the picture and the person of the pose."""

    def measure(pictures: Tensor, cases: Sequence[Case], readers: Readers) -> Tensor:
        return mask_iou(readers.person(pictures), _masks([case.person for case in cases]))

    return Metric("miou_p", measure)


def source_ssim() -> Metric:
    """Structural similarity of luma with the picture that the controls came from."""

    def measure(pictures: Tensor, cases: Sequence[Case], _: Readers) -> Tensor:
        photos = stack([next(iter(case.photos.values())) for case in cases])
        return ssim(luma(pictures) / 255, luma(photos) / 255)

    return Metric("ssim", measure)


def naturalness() -> Metric:
    """NIQE; pictures under two patches are enlarged by a cubic to 512 pixels first."""

    def measure(pictures: Tensor, _: Sequence[Case], readers: Readers) -> Tensor:
        metric.note = ENLARGED if is_small(pictures) else ""
        return niqe(luma(enlarged(pictures)), readers.pristine)

    metric = Metric("niqe", measure, higher=False)
    return metric


def cycle(kind: str) -> Metric:
    """L1 distance of the condition read back, where the control speaks."""

    def measure(pictures: Tensor, cases: Sequence[Case], readers: Readers) -> Tensor:
        wanted = stack([case.images[kind] for case in cases])
        return l1_cycle(readers.maps[kind](pictures), wanted, _masks([case.active[kind] for case in cases]))

    return Metric(f"l1_{kind}", measure, higher=False)


def silent_variance(kind: str) -> Metric:
    """Total variance where the control is silent: does its silence wipe out detail?"""

    def measure(pictures: Tensor, cases: Sequence[Case], _: Readers) -> Tensor:
        return total_variance(pictures, ~_masks([case.active[kind] for case in cases]))

    return Metric(f"tv_silent_{kind}", measure)


def region_distance(kind: str, features_of: str, n: int) -> Metric:
    """Between what was made where a control speaks and the same region of the pictures that the control came from.

    On Inception's features it is FID for enough pictures and KID below; on others it is named after them.
    """
    is_fid = features_of == "inception" and n >= LEAST
    distance = frechet_distance if is_fid else kernel_distance
    name = ("fid" if is_fid else "kid") if features_of == "inception" else f"{features_of}_kid"

    def measure(pictures: Tensor, cases: Sequence[Case], readers: Readers) -> Tensor:
        region = _masks([case.active[kind] for case in cases])
        both = (pictures, stack([case.photos[kind] for case in cases]))
        return torch.stack([readers.features(_cut(one, region)) for one in both], 1)

    return Metric(f"{name}_{kind}", measure, lambda rows: distance(rows[:, 0], rows[:, 1]), higher=False, distinct=True)


def _cut(pictures: Tensor, region: Tensor) -> Tensor:
    """Grey outside a region that is the same in every picture, cut to its bounds and stretched to a square."""
    rows, columns = region[0].any(1).nonzero().flatten(), region[0].any(0).nonzero().flatten()
    masked = torch.where(region[:, None], pictures, 0.5)
    box = masked[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return F.interpolate(box, size=pictures.shape[2:], mode="bilinear", antialias=True)


def _masks(masks: Sequence[np.ndarray | None]) -> Tensor:
    return torch.from_numpy(np.stack([mask for mask in masks if mask is not None]))


def depth_error() -> Metric:
    """RMSE of the depth read back, 0..255."""

    def measure(pictures: Tensor, cases: Sequence[Case], readers: Readers) -> Tensor:
        return depth_rmse(readers.maps["depth"](pictures)[:, 0], stack([case.images["depth"] for case in cases])[:, 0])

    return Metric("depth_rmse", measure, higher=False)


def class_iou(count: int) -> Metric:
    """mIoU of the segmentation read back, against the published classes where there are some.

    Without, both sides go through the palette: two of ADE20K's classes have one colour and count as one.
    """

    def measure(pictures: Tensor, cases: Sequence[Case], readers: Readers) -> Tensor:
        labels = [case.classes for case in cases if case.classes is not None]
        if len(labels) == len(cases):
            return overlap(readers.classes(pictures), torch.from_numpy(np.stack(labels)), count)
        found = readers.classes_of(unstack(readers.maps["seg"](pictures)))
        return overlap(found, readers.classes_of([case.images["seg"] for case in cases]), count)

    return Metric("miou", measure, miou)


def edges(kind: str, side: int) -> list[Metric]:
    """Structural similarity of the edges read back, over five scales where pictures are large enough for it, as
    ControlNet++ has it; of binary ones also PSNR and F1."""
    similar = ("ms_ssim", ms_ssim) if side >= SMALLEST else ("ssim", ssim)
    measures = [similar] if kind != "canny" else [similar, ("psnr", psnr), ("f1", _pixel_f1)]
    return [Metric(f"{name}_{kind}", _of_map(kind, measure)) for name, measure in measures]


def _of_map(kind: str, measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def compare(pictures: Tensor, cases: Sequence[Case], readers: Readers) -> Tensor:
        return measure(readers.maps[kind](pictures)[:, :1], stack([case.images[kind] for case in cases])[:, :1])

    return compare


def _pixel_f1(found: Tensor, wanted: Tensor) -> Tensor:
    return boundary_f(found[:, 0] > 0.5, wanted[:, 0] > 0.5, radius=0.5)
