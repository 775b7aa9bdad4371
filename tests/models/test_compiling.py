"""Compiled networks make the same pictures, are compiled once, and are not reached into."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from diffusers import UNet2DConditionModel

from counterpoint.api import load
from counterpoint.models.compiling import is_compiled
from counterpoint.sampling.pipeline import Output, Pipeline
from counterpoint.types import UserError

HINTS = [np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 90, np.uint8)]
HINTS[0][20:45, 30:32] = 255


@pytest.fixture(scope="module")
def traced() -> Iterator[Pipeline]:
    """What torch's compiler sees and guards, without the code that it would write."""
    pipe = load("tiny", ["pose", "seg"])
    for network in (pipe.unet, *pipe.controls.values()):
        network.compile(backend="eager")
    yield pipe
    torch._dynamo.reset()


def make(pipe: Pipeline, *seeds: int, **more: Any) -> np.ndarray:
    return run(pipe, *seeds, **more).images


def run(pipe: Pipeline, *seeds: int, **more: Any) -> Output:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or (0,)]
    size = {"height": 64, "width": 64, "num_inference_steps": 4}
    return pipe(
        ["a person on a meadow"] * len(generators), HINTS, output_type="np", generator=generators, **{**size, **more}
    )


@pytest.mark.parametrize(
    "more", [{"fusion": "sum"}, {"fusion": "pix+channel"}, {"fusion": "mgda"}, {"fusion": "sum", "quality": "balanced"}]
)
def test_nothing_is_compiled_twice(traced: Pipeline, more: dict[str, str]) -> None:
    """However weights, windows, schedules, prompts and seeds change; ``balanced`` asks for one row, too."""
    steps = 12 if "quality" in more else 4
    for _ in range(2):
        make(traced, control_guidance_end=0.5, num_inference_steps=steps, **more)  # with controls, and without
    shares = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, own in enumerate(
            (
                {"controlnet_conditioning_scale": [0.3, "0:1,0.5:0.4"], "control_guidance_end": [0.25, 0.75]},
                {"controlnet_conditioning_scale": 0.7, "guidance_scale": 3.3, "num_inference_steps": steps - 1},
                {"controlnet_conditioning_scale": [1.0, 0.8]},
            )
        ):
            out = run(traced, seed + 1, **{"num_inference_steps": steps, **own, **more})
            shares += [one.share for each in out.thrift for one in each.values()]
    assert ("quality" in more) == any(share < 1 for share in shares)


@pytest.mark.parametrize("fusion", ["sum", "pix+channel"])
def test_pictures_are_the_same(traced: Pipeline, fusion: str) -> None:
    more = {"fusion": fusion, "controlnet_conditioning_scale": [0.8, 0.5]}
    assert np.array_equal(make(traced, 0, 1, **more), make(load("tiny", ["pose", "seg"]), 0, 1, **more))


@pytest.mark.parametrize("more", [{"fusion": "minimal-impact"}, {"fusion": "maxfusion"}, {"subject": "person"}])
def test_what_reaches_inside_is_refused(traced: Pipeline, more: dict[str, str]) -> None:
    with pytest.raises(UserError, match="reaches into the networks, which are compiled: load them without compile"):
        make(traced, **{"fusion": "cross", **more})


def test_what_else_reaches_inside_is_refused(traced: Pipeline) -> None:
    with pytest.raises(UserError, match="adapters reach into the networks, which are compiled"):
        traced.adapted("migc")
    with pytest.raises(UserError, match="readouts reach into the networks, which are compiled"):
        make(traced, readout_guidance_scale=0.1)


def test_wrong_wishes() -> None:
    with pytest.raises(UserError, match="OpenVINO compiles its networks itself"):
        load("tiny", device="openvino", compile=True)
    if shutil.which("g++"):
        with pytest.raises(UserError, match="choose compile or a residency"):
            load("tiny", residency="stages", compile=True)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UserError, match="install g"):
        load("tiny", compile=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own ways
def test_load_compiles() -> None:
    pipe = load("tiny", ["pose", "pose:2"], compile=True)
    assert is_compiled(pipe.unet)
    assert all(map(is_compiled, pipe.controls.values()))
    assert not any(map(is_compiled, load("tiny", ["pose"]).networks))


def test_half_precision_lies_channels_last() -> None:
    """As convolutions in it are quickest; float32 stays as stock diffusers has it."""

    def last(network: UNet2DConditionModel) -> bool:
        return network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)

    half, whole = (load("tiny", ["pose"], dtype=dtype) for dtype in ("bf16", "fp32"))
    assert last(half.unet)
    assert last(half.controls["pose"])
    assert not last(whole.unet)
