"""Probes: the published heads' keys and shapes, and the network by its description."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from counterpoint.models.probe import Probe, check_reads, load_probe, load_readout_head, reversed_time, span_of
from counterpoint.training.stages.probe import Target
from counterpoint.types import UserError

READOUT = {"sd15": (1280,) * 6 + (640,) * 3 + (320,) * 3, "sdxl": (1280,) * 3 + (640,) * 3 + (320,) * 3}
"""Channels of the layers that the published heads read: outputs of the decoder's residual blocks. InnerControl's read
self-attention of SD1.5, which has SDXL's."""
SMALL = {"time_width": 16, "width": 32, "head": (16, 8), "size": 8}


def published(dims: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published head, written out."""
    table: dict[str, tuple[int, ...]] = {"mixing_weights": (len(dims),)}
    for number, channels in enumerate(dims):
        layer = f"bottleneck_layers.{number}"
        for name, shape in (
            ("shortcut", (384, channels, 1, 1)),
            ("conv1", (96, channels, 1, 1)),
            ("conv2", (96, 96, 3, 3)),
            ("conv3", (384, 96, 1, 1)),
        ):
            table[f"{layer}.{name}.weight"] = shape
            table[f"{layer}.{name}.norm.weight"] = table[f"{layer}.{name}.norm.bias"] = shape[:1]
        table[f"{layer}.emb_layers.weight"], table[f"{layer}.emb_layers.bias"] = (96, 1280), (96,)
    for place, shape in ((0, (128, 384, 3, 3)), (2, (32, 128, 3, 3)), (4, (3, 32, 1, 1))):
        table[f"output_head.{place}.weight"], table[f"output_head.{place}.bias"] = shape, shape[:1]
    return table


@pytest.mark.parametrize("family", READOUT)
def test_the_published_names_and_shapes(family: str) -> None:
    with torch.device("meta"):
        probe = Probe(READOUT[family])
    assert {name: tuple(tensor.shape) for name, tensor in probe.state_dict().items()} == published(READOUT[family])


def test_a_head_in_the_published_form_loads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in published((1280, 320)).items()}
    save_file(state, tmp_path / "head.safetensors")
    probe = load_readout_head(tmp_path / "head.safetensors")
    assert list(probe.config["dims"]) == [1280, 320]
    assert all(torch.equal(probe.state_dict()[name], tensor) for name, tensor in state.items())
    del state["mixing_weights"]
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="no readout head: 'mixing_weights' is not in it"):
        load_readout_head(tmp_path / "head.safetensors")


@pytest.mark.parametrize(
    ("kind", "layers", "narrow"),
    [
        ("depth", "convolution", False),
        ("pose", "convolution", True),
        ("hed", "convolution", True),
        ("hed", "attention", False),
        ("lineart", "attention", False),
    ],
)
def test_a_published_head_is_read_on_its_own_scale(tmp_path: Path, kind: str, layers: str, narrow: bool) -> None:
    """Readout Guidance trains depth on -1..1, lines and poses on -0.5..0.5, InnerControl everything on -1..1: a head
    that is right costs nothing."""
    save_file({name: torch.zeros(shape) for name, shape in published((8,)).items()}, tmp_path / "head.safetensors")
    head = load_probe(tmp_path / "head.safetensors")
    wanted = torch.zeros(1, 1, 8, 8)
    wanted[..., 2:5] = 1
    read = wanted.expand(-1, 3, -1, -1) - 0.5 if narrow else wanted.expand(-1, 3, -1, -1) * 2 - 1
    for sort in ("map", "sparse"):
        target = Target(layers, lambda _: wanted, sort, span_of(head, kind, layers))
        assert target.losses(read, {}).tolist() == [0.0]
        assert target.losses(read + 0.1, {}).item() > 0


@pytest.mark.parametrize(
    ("out", "kind", "right"),
    [
        (1, "depth", True),
        (3, "hed", True),
        (9, "depth", False),
        (3, "seg", False),
        (9, "seg", True),
        (1, "pose", False),
    ],
)
def test_a_probe_for_another_control_is_refused(out: int, kind: str, right: bool) -> None:
    probe = Probe((4,), **{**SMALL, "out": out})
    if right:
        check_reads(probe, kind, 9)
    else:
        with pytest.raises(UserError, match=f"for another control than {kind}: it makes {out} maps"):
            check_reads(probe, kind, 9)


def test_a_published_checkpoint_loads_as_it_is_converted(tmp_path: Path) -> None:
    """With the network under a name of its own, and the optimizer and the settings beside it."""
    state = {name: torch.zeros(shape) for name, shape in published((32, 16)).items()}
    beside = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(5)}
    tensors = {f"aggregation_network.{name}": value for name, value in state.items()}
    tensors |= {f"optimizer_state_dict.state.0.{name}": value for name, value in beside.items()}
    save_file(tensors, tmp_path / "head.safetensors")
    probe = load_readout_head(tmp_path / "head.safetensors")
    assert probe.state_dict().keys() == state.keys()


def test_layers_of_any_size_become_one_map() -> None:
    torch.manual_seed(0)
    probe = Probe((4, 6), **SMALL)
    features = [torch.randn(3, 4, 5, 5), torch.randn(3, 6, 16, 16)]
    time = torch.randn(3, 16)
    read = probe(features, time)
    assert read.shape == (3, 3, 8, 8)
    assert read.abs().max() <= 1
    torch.testing.assert_close(read[1:2], probe([one[1:2] for one in features], time[1:2]))
    assert not torch.allclose(read, probe(features, time + 1)), "it is told the timestep"
    with pytest.raises(ValueError, match=r"shorter|longer"):
        probe(features[:1], time)


def test_mixing_weights_choose_the_layer() -> None:
    torch.manual_seed(0)
    probe = Probe((4, 4), **SMALL, out=5, bounded=False)
    first, second, time = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.randn(1, 16)
    with torch.no_grad():
        probe.mixing_weights.copy_(torch.tensor([40.0, 0.0]))
    one, other = probe([first, second], time), probe([first, torch.zeros_like(second)], time)
    torch.testing.assert_close(one, other)
    assert one.shape == (1, 5, 8, 8)


def test_time_counted_from_the_noisiest_step() -> None:
    assert reversed_time(torch.tensor([0, 1, 999])).tolist() == [999, 998, 0]


def test_thin_lines_have_a_head_that_grows() -> None:
    probe = Probe((4,), **SMALL, upsample=True)
    assert probe([torch.randn(2, 4, 8, 8)], torch.randn(2, 16)).shape == (2, 3, 16, 16)
    assert isinstance(probe.output_head[2], torch.nn.ConvTranspose2d)


@pytest.mark.parametrize("out", [1, 3])
def test_a_new_probe_of_maps_starts_dark_and_can_move(out: int) -> None:
    """From grey, a probe of poses went to where its last layer has no slope, and stayed there."""
    torch.manual_seed(0)
    probe = Probe((8, 16), 32, 32, (16, 8), out, size=16)
    read = probe([torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)], torch.randn(2, 32))
    assert read.min() > -0.99
    assert read.max() < -0.7
    read.mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in probe.output_head.parameters())
