"""LPIPS: the published names and shapes, and the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from counterpoint.metrics.lpips import lpips
from counterpoint.models.lpips import LpipsNetwork, load_lpips
from counterpoint.types import UserError

# Places of the convolutions in torchvision's `features`, and the widths that the paper's heads weigh.
PUBLISHED = {
    "alex": ([0, 3, 6, 8, 10], [64, 192, 384, 256, 256]),
    "vgg": ([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], [64, 128, 256, 512, 512]),
}


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_published_names_and_a_synthesised_file(backbone: str, tmp_path: Path) -> None:
    places, widths = PUBLISHED[backbone]
    torch.manual_seed(0)
    network = LpipsNetwork(backbone).eval()
    wanted = {f"features.{place}.{part}" for place in places for part in ("weight", "bias")}
    wanted |= {f"lin{layer}.model.1.weight" for layer in range(5)}
    assert set(network.state_dict()) == wanted
    assert [tuple(weight.shape) for weight in network.weights] == [(width,) for width in widths]
    save_file(network.state_dict(), tmp_path / "lpips.safetensors")
    loaded = load_lpips(tmp_path / "lpips.safetensors")
    a, b = torch.rand(2, 2, 3, 64, 64)
    with torch.no_grad():
        score = lpips(loaded(a), loaded(b), [weight.abs() for weight in loaded.weights])
        assert (score > 0).all()
        assert (lpips(loaded(a), loaded(a), loaded.weights) == 0).all()
        alone = lpips(loaded(a[:1]), loaded(b[:1]), [weight.abs() for weight in loaded.weights])
        torch.testing.assert_close(alone, score[:1], rtol=1e-4, atol=1e-6)


def test_formula() -> None:
    """Two channels, one place: unit vectors at a right angle differ by 1 in each."""
    a, b = torch.tensor([3.0, 0.0])[None, :, None, None], torch.tensor([0.0, 5.0])[None, :, None, None]
    assert lpips([a], [b], [torch.tensor([0.25, 0.5])]).tolist() == [0.75]


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="missing"):
        load_lpips(tmp_path / "half.safetensors")
