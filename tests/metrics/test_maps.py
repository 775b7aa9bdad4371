"""Measures of read-back controls against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from counterpoint.metrics.maps import depth_rmse, mask_iou, miou, overlap
from counterpoint.metrics.metric import Metric
from counterpoint.metrics.similarity import mse, psnr, ssim


def test_depth_rmse_is_on_the_255_scale() -> None:
    wanted = torch.zeros(2, 4, 4)
    assert depth_rmse(torch.stack([wanted[0] + 0.5, wanted[0]]), wanted).tolist() == [127.5, 0.0]


def test_mask_iou() -> None:
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    wanted = mask.clone()
    mask[0, 0] = True  # two pixels, one of them shared
    wanted[0, :, 0] = True
    mask[1, 0, 0] = True  # something where nothing is wanted
    assert mask_iou(mask, wanted).tolist() == [1 / 3, 0.0, 1.0]


def test_miou_counts_the_whole_set_and_skips_absent_classes() -> None:
    seen = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 0]]])
    true = torch.tensor([[[0, 0], [0, 1]], [[0, 0], [0, 1]]])
    rows = overlap(seen, true, 4)
    # class 0: 2 + 3 shared of 3 + 4 together; class 1: 1 + 0 of 2 + 1; classes 2 and 3 are nowhere
    assert miou(rows) == pytest.approx((5 / 7 + 1 / 3) / 2)


def test_unlabelled_places_count_nowhere() -> None:
    seen, true = torch.tensor([[[0, 0], [1, 1]]]), torch.tensor([[[-1, 0], [1, -1]]])
    assert overlap(seen, true, 2).tolist() == [[[1, 1], [1, 1]]]


def test_psnr() -> None:
    a = torch.zeros(2, 3, 8, 8)
    b = a.clone()
    b[0] += 0.1
    values = psnr(a, b).tolist()
    assert values[0] == pytest.approx(20, abs=1e-5)
    assert math.isinf(values[1])


def test_mse_of_a_region() -> None:
    a = torch.zeros(3, 3, 4, 4)
    b = a.clone()
    b[:, :, :2] = 0.5  # the upper half is off by 0.5, the lower by nothing
    region = torch.zeros(3, 4, 4, dtype=torch.bool)
    region[0], region[1, 2:] = True, True
    assert mse(a, b).tolist() == [0.125] * 3
    values = mse(a, b, region).tolist()
    assert values[:2] == [0.125, 0.0]
    assert math.isnan(values[2])


def test_ssim_against_its_formula() -> None:
    """One 11 x 11 window, written out from Wang et al. 2004, section III.B."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 1, 11, 11, generator=generator, dtype=torch.float64)
    line = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = line[:, None] * line / (line[:, None] * line).sum()
    ma, mb = (window * a).sum(), (window * b).sum()
    va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
    cov = (window * (a - ma) * (b - mb)).sum()
    c1, c2 = 0.01**2, 0.03**2
    wanted = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert float(ssim(a, b)) == pytest.approx(float(wanted), abs=1e-12)
    assert float(ssim(a, a)) == pytest.approx(1)


def test_ssim_is_scikit_images() -> None:
    generator = np.random.default_rng(0)
    first = generator.random((24, 31, 3))
    second = (first + 0.2 * generator.random(first.shape)) / 1.2
    wanted = structural_similarity(
        first, second, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
    )
    one, other = (torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in (first, second))
    assert float(ssim(one, other)) == pytest.approx(wanted, abs=1e-9)


def test_rows_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    pictures, references = torch.rand(2, 5, 3, 32, 32, generator=generator)
    for measure in (psnr, ssim):
        whole, parts = Metric("whole", measure), Metric("parts", measure)
        whole.update(pictures, references)
        for i in range(5):
            parts.update(pictures[i : i + 1], references[i : i + 1])
        torch.testing.assert_close(whole.rows, parts.rows, rtol=0, atol=1e-12)
        assert whole.compute() == pytest.approx(parts.compute(), abs=1e-12)


def test_a_metric_that_saw_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="has seen no sample"):
        Metric("psnr", psnr).compute()
