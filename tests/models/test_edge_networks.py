"""The published files' names and shapes are the networks'; the networks draw in the field's convention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from counterpoint.models.edge_networks import (
    EDGE_NETWORKS,
    AnimeLineNetwork,
    HedNetwork,
    LineNetwork,
    _UNetLevel,
    load_edge_network,
)
from counterpoint.types import UserError

HED = {"norm": (1, 3, 1, 1)}
for stage, (inside, width, depth) in enumerate(
    ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3)), 1
):
    for i in range(depth):
        HED[f"block{stage}.convs.{i}.weight"] = (width, inside if i == 0 else width, 3, 3)
        HED[f"block{stage}.convs.{i}.bias"] = (width,)
    HED |= {f"block{stage}.projection.weight": (1, width, 1, 1), f"block{stage}.projection.bias": (1,)}
LINE = {
    "model0.1": (64, 3, 7, 7),
    "model1.0": (128, 64, 3, 3),
    "model1.3": (256, 128, 3, 3),
    **{f"model2.{i}.conv_block.{j}": (256, 256, 3, 3) for i in range(3) for j in (1, 5)},
    "model3.0": (256, 128, 3, 3),
    "model3.3": (128, 64, 3, 3),
    "model4.1": (1, 64, 7, 7),
}
TABLES = {
    "hed": HED,
    "lineart": {
        **{f"{name}.weight": shape for name, shape in LINE.items()},
        **{f"{name}.bias": (shape[1 if name.startswith("model3") else 0],) for name, shape in LINE.items()},
    },
}
"""What ``ControlNetHED.pth`` and ``sk_model.pth`` hold."""


@pytest.mark.parametrize("kind", EDGE_NETWORKS)
def test_every_published_tensor_has_its_place(kind: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in EDGE_NETWORKS[kind]().state_dict().items()}
    assert wanted == TABLES[kind]
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in TABLES[kind].items()}
    save_file(tensors, tmp_path / "file.safetensors")
    network = load_edge_network(kind, tmp_path / "file.safetensors")
    for name, value in network.state_dict().items():
        assert torch.equal(value, tensors[name])
    lines = network(torch.rand(2, 3, 32, 40))
    assert lines.shape == (2, 1, 32, 40)
    assert 0 <= lines.min() <= lines.max() <= 1
    del tensors["norm" if kind == "hed" else "model4.1.bias"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(UserError):
        load_edge_network(kind, tmp_path / "short.safetensors")


def test_hed_reads_pixels_of_0_to_255() -> None:
    """The published annotator feeds 0..255 less ``norm``, and averages the five maps before it squashes them."""
    torch.manual_seed(0)
    network = HedNetwork()
    network.norm.data.fill_(100.0)
    picture = torch.rand(1, 3, 32, 32)
    x, sides = picture * 255 - 100, []
    for stage in range(1, 6):
        if stage > 1:
            x = torch.nn.functional.max_pool2d(x, 2)
        block = network.get_submodule(f"block{stage}")
        for conv in block.convs:
            x = torch.relu(conv(x))
        sides.append(torch.nn.functional.interpolate(block.projection(x), (32, 32), mode="bilinear"))
    torch.testing.assert_close(network(picture), torch.sigmoid(sum(sides) / 5))


def test_a_gradient_reaches_the_picture() -> None:
    for network in (HedNetwork(), LineNetwork()):
        picture = torch.rand(1, 3, 32, 32, requires_grad=True)
        network(picture).mean().backward()
        assert picture.grad.abs().max() > 0


def anime_table() -> dict[str, tuple[int, ...]]:
    """What ``netG.pth`` holds, from the outermost level inwards."""
    table: dict[str, tuple[int, ...]] = {}
    levels = [(1, 64), (64, 128), (128, 256), (256, 512), (512, 512), (512, 512), (512, 512), (512, 512)]
    prefix = "model"
    for depth, (outside, inside) in enumerate(levels):
        last = depth == len(levels) - 1
        down, within, up = (0, 1, 3) if depth == 0 else (1, 3, 3 if last else 5)
        table[f"{prefix}.model.{down}.weight"] = (inside, 3 if depth == 0 else outside, 4, 4)
        table[f"{prefix}.model.{down}.bias"] = (inside,)
        table[f"{prefix}.model.{up}.weight"] = (inside if last else 2 * inside, outside, 4, 4)
        table[f"{prefix}.model.{up}.bias"] = (outside,)
        prefix += f".model.{within}"
    return table


def test_anime_lines_from_their_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in AnimeLineNetwork().state_dict().items()}
    assert wanted == anime_table()
    tensors = {f"module.{name}": torch.zeros(shape, dtype=torch.float16) for name, shape in wanted.items()}
    tensors["module.model.model.3.bias"] += torch.atanh(torch.tensor(0.5))
    save_file(tensors, tmp_path / "netG.safetensors")
    drawn = load_edge_network("lineart", tmp_path / "netG.safetensors")(torch.rand(1, 3, 20, 33))
    assert drawn.shape == (1, 1, 20, 33)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 0.25), rtol=1e-3, atol=1e-3)


def test_anime_levels_keep_what_their_activation_left() -> None:
    """The published activation works in place, so the skip carries its result."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 8, 8)
    made = _UNetLevel(2, 3, None)(x)
    torch.testing.assert_close(made[:, :2], torch.nn.functional.leaky_relu(x, 0.2))
    assert made.shape == (1, 4, 8, 8)
