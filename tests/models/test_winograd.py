"""Winograd's convolutions: the same function as the definition, wherever they take another's place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.models import winograd
from counterpoint.models.winograd import Filters, quicken, transforms

openvino = pytest.importorskip("openvino")
opset = pytest.importorskip("openvino.opset13")
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_FEWEST", 8)


@pytest.mark.parametrize("side", [2, 4])
def test_transforms_give_what_a_filter_gives(side: int) -> None:
    a, g, b = transforms(side)
    draw = np.random.default_rng(side)
    inputs, taps = draw.normal(size=(side + 2, side + 2)), draw.normal(size=(3, 3))
    wanted = [[(inputs[y : y + 3, x : x + 3] * taps).sum() for x in range(side)] for y in range(side)]
    np.testing.assert_allclose(a @ ((g @ taps @ g.T) * (b @ inputs @ b.T)) @ a.T, wanted, rtol=1e-12, atol=1e-12)


def network(shape: tuple[int, int, int, int], out: int = 8, kernel: int = 3, **more: list[int]) -> tuple[Any, Any]:
    """Of one convolution; and its filters."""
    filters = np.random.default_rng(out).normal(size=(out, shape[1], kernel, kernel)).astype(np.float32)
    usual = {"strides": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1], "dilations": [1, 1]} | more
    images = opset.parameter(shape, np.float32)
    made = opset.convolution(images, opset.constant(filters), *usual.values())
    made.set_friendly_name("convolution")
    return openvino.Model([made], [images]), filters


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3), into=st.sampled_from([8, 9, 24]), out=st.sampled_from([8, 13]),
    height=st.integers(15, 40), width=st.integers(15, 40),
)  # fmt: skip
def test_any_size_is_the_definition(batch: int, into: int, out: int, height: int, width: int) -> None:
    model, filters = network((batch, into, height, width), out)
    images = np.random.default_rng(height).normal(size=(batch, into, height, width)).astype(np.float32)
    assert quicken(model, {}) == 1
    assert not any(node.get_type_name() == "Convolution" for node in model.get_ordered_ops())
    found = openvino.Core().compile_model(model, "CPU", FLOAT32)([images])[0]
    wanted = torch.nn.functional.conv2d(
        torch.from_numpy(images).double(), torch.from_numpy(filters).double(), padding=1
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.std()))


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((1, 7, 32, 32), {}),
        ((1, 8, 32, 32), {"out": 7}),
        ((1, 8, 14, 14), {}),
        ((1, 8, 32, 32), {"kernel": 1}),
        ((1, 8, 32, 32), {"kernel": 5}),
        ((1, 8, 32, 32), {"strides": [2, 2]}),
        ((1, 8, 32, 32), {"dilations": [2, 2]}),
        ((1, 8, 32, 32), {"pads_begin": [0, 0]}),
        ((1, 8, 32, 32), {"pads_end": [1, 2]}),
    ],
)
def test_others_stay_as_they_are(shape: tuple[int, int, int, int], more: dict[str, Any]) -> None:
    assert quicken(network(shape, **more)[0], {}) == 0


def test_shapes_share_their_filters() -> None:
    kept: Filters = {}
    sizes = ((1, 32), (2, 40), (1, 16), (3, 20))
    for batch, size in sizes:
        model, filters = network((batch, 8, size, size))
        quicken(model, kept)
        images = np.ones((batch, 8, size, size), np.float32)
        middle = openvino.Core().compile_model(model, "CPU", FLOAT32)([images])[0][:, :, 1:-1, 1:-1]
        np.testing.assert_allclose(
            middle, np.broadcast_to(filters.sum((1, 2, 3))[:, None, None], middle.shape), atol=1e-4
        )
    assert {(key, filters.shape) for key, filters in kept.items()} == {
        (("convolution", 4), (36, 8, 8)),
        (("convolution", 2), (16, 8, 8)),
    }
