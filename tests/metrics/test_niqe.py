"""NIQE against the published value, and on pictures it has nothing to say about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint.apps.readers import load_pristine
from counterpoint.metrics.niqe import Pristine, luma, niqe


@pytest.fixture
def pristine(test_data: Path) -> Pristine:
    with np.load(test_data / "niqe" / "niqe_pris_params.npz", allow_pickle=False) as file:
        return Pristine(file["mu_pris_param"].ravel(), file["cov_pris_param"], file["gaussian_window"])


def test_shipped_parameters_are_the_published_ones(pristine: Pristine) -> None:
    shipped = load_pristine()
    for name in ("mean", "covariance", "window"):
        np.testing.assert_array_equal(getattr(shipped, name), getattr(pristine, name))


def test_published_value(test_data: Path, pristine: Pristine) -> None:
    picture = np.array(Image.open(test_data / "niqe" / "baboon.png").convert("RGB"))
    grey = luma(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    assert float(niqe(grey, pristine)) == pytest.approx(5.7300, abs=5e-5)


def test_noise_is_less_natural_than_a_photo(test_data: Path, pristine: Pristine) -> None:
    picture = np.array(Image.open(test_data / "niqe" / "baboon.png").convert("RGB"))
    noise = np.random.default_rng(0).integers(0, 256, picture.shape).astype(np.uint8)
    pair = torch.from_numpy(np.stack([picture, noise])).permute(0, 3, 1, 2) / 255
    values = niqe(luma(pair), pristine)
    assert values[1] > 2 * values[0]
    assert float(niqe(luma(pair[1:]), pristine)) == float(values[1])  # whoever sits beside it


def test_flat_and_small_pictures(pristine: Pristine) -> None:
    assert niqe(torch.full((1, 1, 200, 200), 90.0), pristine).isnan().all()
    with pytest.raises(ValueError, match="two patches"):
        niqe(torch.zeros(1, 1, 128, 128), pristine)
