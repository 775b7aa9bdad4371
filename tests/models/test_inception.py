"""The Inception network is the published one, as far as that can be seen without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from counterpoint.models.inception import FEATURES, Inception, load_inception
from counterpoint.types import UserError

TORCHVISION_WITHOUT_AUX = 23_834_568
"""Parameters of torchvision's inception_v3 with 1000 classes and no auxiliary head."""


def test_it_has_the_published_size() -> None:
    with torch.device("meta"):
        network = Inception()
    assert sum(p.numel() for p in network.parameters()) == TORCHVISION_WITHOUT_AUX + 8 * (FEATURES + 1)
    names = dict(network.state_dict())
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6b.branch7x7dbl_3.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7_3.bn.running_var": (192,),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.bias": (1008,),
    }.items():
        assert tuple(names[name].shape) == shape


def test_a_synthesised_file_loads_and_reads_pictures_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Inception().eval()
    state = network.state_dict()
    save_file(
        {name: value for name, value in state.items() if "num_batches" not in name}, tmp_path / "inception.safetensors"
    )
    loaded = load_inception(tmp_path / "inception.safetensors")
    pictures = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        features = loaded(pictures)
        assert features.shape == (2, FEATURES)
        torch.testing.assert_close(features, network(pictures))
        torch.testing.assert_close(features[:1], loaded(pictures[:1]), rtol=1e-4, atol=1e-4)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="wanted"):
        load_inception(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="pickle"):
        load_inception(tmp_path / "inception.pth")
