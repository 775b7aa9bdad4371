"""Networks on OpenVINO: the same numbers in float32, near ones in bfloat16, and a clear word where they cannot go."""

from __future__ import annotations

import copy
import ctypes
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel

from counterpoint import load
from counterpoint.apps.request import GenerateRequest, build
from counterpoint.models import openvino as backend
from counterpoint.models import winograd
from counterpoint.models.openvino import PortedControlNet, PortedPixels, PortedUNet, site_shapes
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import UserError

openvino = pytest.importorskip("openvino")
CAPABLE = "OPTIMIZATION_CAPABILITIES"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


def given(unet: Any, batch: int = 2, size: int = 8) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(batch)
    return {
        "sample": torch.randn(batch, unet.config.in_channels, size, size, generator=draw),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, unet.config.cross_attention_dim, generator=draw),
    }


@pytest.fixture(scope="module")
def pair(parts: dict, cache: Path) -> tuple[PortedUNet, PortedControlNet]:
    unet, network = copy.deepcopy(parts["unet"]), copy.deepcopy(parts["networks"][0])
    return PortedUNet(unet, False, cache), PortedControlNet(network, False, cache)


@torch.no_grad()
def test_the_numbers_are_the_same(parts: dict, pair: tuple[PortedUNet, PortedControlNet]) -> None:
    unet, network = parts["unet"], parts["networks"][0]
    for batch, size in ((2, 8), (4, 8), (2, 7), (2, 12), (2, 6), (3, 8), (7, 8)):
        inputs, hint = given(unet, batch, size), torch.rand(batch, 3, 8 * size, 8 * size)
        down, mid = network(**inputs, controlnet_cond=hint, conditioning_scale=0.7, return_dict=False)
        found = pair[1](**inputs, controlnet_cond=hint, conditioning_scale=0.7)
        for one, other in zip((*down, mid), (*found[0], found[1]), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
        heard = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
        for more in ({}, heard):
            wanted = unet(**inputs, **more, return_dict=False)[0]
            torch.testing.assert_close(pair[0](**inputs, **more)[0], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_convolutions_are_quickened_in_float32_alone(parts: dict, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_FEWEST", 8)
    found: list[int] = []
    quicken = backend.quicken
    monkeypatch.setattr(backend, "quicken", lambda *given: found.append(quicken(*given)))
    unet, inputs = parts["unet"], given(parts["unet"], 2, 36)
    wanted = unet(**inputs, return_dict=False)[0]
    PortedUNet(copy.deepcopy(unet), True, cache)(**inputs)
    assert not found
    torch.testing.assert_close(PortedUNet(copy.deepcopy(unet), False, cache)(**inputs)[0], wanted, rtol=1e-4, atol=1e-4)
    assert min(found) > 0, "of either half"
    assert len(found) == 2


@torch.no_grad()
def test_networks_stay_compiled_for_few_shapes(parts: dict, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, shapes = PortedUNet(copy.deepcopy(parts["unet"]), False, cache), []
    compile_ = network._compile
    monkeypatch.setattr(network, "_compile", lambda inputs: shapes.append(inputs[0].shape) or compile_(inputs))
    for batch in (*range(1, 8), 5):
        network.encode(**given(parts["unet"], batch))
    assert [len(inputs) for inputs in (network._compiled, shapes)] == [3, 3]  # of 1, 2 and 4 rows
    network.encode(**given(parts["unet"], 3, 48))
    assert shapes.pop()[:1] == (1,), "and of one row where it is large"
    network._compiled.popitem()
    monkeypatch.setattr(backend, "_KEPT", 4)
    for size in (8, 10, 8, 12, 8, 14, 8, 16, 8, 10):
        network.encode(**given(parts["unet"], 1, size))
    assert [shape[2] for shape in shapes[3:]] == [10, 12, 14, 16, 10]
    assert len(network._compiled) == 4


def test_a_traced_network_is_found_again_and_another_is_not(
    parts: dict, pair: tuple[PortedUNet, PortedControlNet], cache: Path
) -> None:
    pair[0](**given(parts["unet"]))
    before = set(cache.glob("*.xml"))
    PortedUNet(copy.deepcopy(parts["unet"]), True, cache)(**given(parts["unet"]))
    assert set(cache.glob("*.xml")) == before, "precision is a matter of compiling"
    other = copy.deepcopy(parts["unet"])
    other.conv_in.bias.data += 1
    PortedUNet(other, False, cache)(**given(other))
    assert len(set(cache.glob("*.xml"))) == len(before) + 2, "both halves"
    assert len(list(cache.glob("*"))) == 2 * (len(before) + 2), "and nothing else is left"


@pytest.mark.parametrize("size", [8, 12, 16])
def test_sites_have_the_shapes_that_controls_hand_over(parts: dict, size: int) -> None:
    unet, network = parts["unet"], parts["networks"][0]
    inputs = given(unet, 2, size)
    with torch.no_grad():
        down, mid = network(**inputs, controlnet_cond=torch.rand(2, 3, 8 * size, 8 * size), return_dict=False)
    assert [tuple(one.shape) for one in (*down, mid)] == site_shapes(unet.config, inputs["sample"].shape)


def test_sdxl_reads_what_it_adds(cache: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, norm_num_groups=8,
    ).eval()  # fmt: skip
    network = ControlNetModel.from_unet(unet, conditioning_channels=3).eval()
    inputs = given(unet)
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    hint = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = unet(**inputs, added_cond_kwargs=added, return_dict=False)[0]
        _, mid = network(**inputs, controlnet_cond=hint, added_cond_kwargs=added, return_dict=False)
    found = PortedUNet(copy.deepcopy(unet), False, cache)(**inputs, added_cond_kwargs=added)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    said = PortedControlNet(copy.deepcopy(network), False, cache)(
        **inputs, controlnet_cond=hint, added_cond_kwargs=added
    )
    torch.testing.assert_close(said[1], mid, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderTiny])
def test_decoders_say_the_same(kind: Any, cache: Path) -> None:
    torch.manual_seed(0)
    if kind is AutoencoderKL:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        codec = AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, **blocks).eval()
    else:
        codec = AutoencoderTiny(
            encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), upsampling_scaling_factor=2,
        ).eval()  # fmt: skip
    latents = [torch.randn(batch, 4, *size) for batch, *size in ((1, 8, 8), (3, 9, 12))]
    wanted = [codec.decode(one).sample for one in latents]
    codec.decoder = PortedPixels(codec, cache)
    for one, other in zip(latents, wanted, strict=True):
        torch.testing.assert_close(codec.decode(one).sample, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pipes(cache: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "CACHE", cache)
        kinds = ("fp32", "bf16") if "BF16" in openvino.Core().get_property("CPU", CAPABLE) else ("fp32",)
        yield {dtype: load("tiny", ["pose", "seg"], device="openvino", dtype=dtype) for dtype in kinds}


def make(pipe: Pipeline, **more: Any) -> np.ndarray:
    hints = [np.zeros((128, 128, 3), np.uint8), np.full((128, 128, 3), 90, np.uint8)]
    hints[0][40:90, 60:64] = 255
    settings = {"num_inference_steps": 4, "generator": [torch.Generator().manual_seed(i) for i in (0, 1)], **more}
    return pipe(["a person on a meadow", "a red ball"], hints, output_type="np", **settings).images


def test_pictures_are_the_same(pipes: Any) -> None:
    eager = load("tiny", ["pose", "seg"])
    for more in ({}, {"fusion": "pix+channel"}, {"control_guidance_end": [0.5, 1.0]},
                 {"controlnet_conditioning_scale": [[1.0, 0.0], 0.5]}):  # fmt: skip
        wanted = make(eager, **more)
        assert np.abs(make(pipes["fp32"], **more) - wanted).max() < 2e-3
    for quality in ("balanced", "fast"):  # the encoder is foretold too
        more = {"quality": quality, "num_inference_steps": 8}
        assert np.abs(make(pipes["fp32"], **more) - make(eager, **more)).max() < 2e-3
    if "bf16" in pipes:
        assert 1e-4 < np.abs(make(pipes["bf16"]) - make(eager)).mean() < 0.05
    alone = [replace(pipe, controls={}) for pipe in (eager, pipes["fp32"])]
    wanted, found = (
        pipe("a red ball", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        for pipe in alone
    )
    assert np.abs(found - wanted).max() < 2e-3


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are asked for as Linux has them")
def test_compiling_leaves_no_signal_stack(parts: dict, cache: Path) -> None:
    """One that is unmapped with the network would crash the process at the next Ctrl+C."""

    def stack() -> tuple[object, int]:
        found = backend._Stack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
        return found.place, found.size

    before = stack()
    ported = PortedUNet(copy.deepcopy(parts["unet"]), False, cache)
    ported(**given(parts["unet"], 3))
    assert stack() == before


@pytest.mark.parametrize("fusion", ["maxfusion", "minimal-impact", "0:sum,0.5:maxfusion"])
def test_rules_that_reach_inside_are_refused(pipes: Any, fusion: str) -> None:
    with pytest.raises(UserError, match="reaches into the networks"):
        make(pipes["fp32"], fusion=fusion)


def test_what_else_reaches_inside_is_refused(pipes: Any) -> None:
    with pytest.raises(UserError, match="cross reaches into the networks"):
        make(pipes["fp32"], fusion="cross", subject="a")
    with pytest.raises(UserError, match="adapters reach into the networks"):
        pipes["fp32"].adapted("interact")


def test_wrong_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="fp32 or bf16"):
        load("tiny", device="openvino", dtype="fp16")
    with pytest.raises(UserError, match="unknown dtype 'fp8'"):
        load("tiny", dtype="fp8")
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(UserError, match="this one does not: take fp32"):
        load("tiny", device="openvino", dtype="bf16")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"counterpoint\[openvino\]"):
        load("tiny", device="openvino")


@pytest.mark.parametrize(("there", "wanted"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_written_down_as_what_it_was(monkeypatch: pytest.MonkeyPatch, there: bool, wanted: str) -> None:
    monkeypatch.setattr("counterpoint.api.bf16_pays", lambda: there)
    assert build(GenerateRequest, prompt="a ball", dtype="auto").dtype == wanted
    assert load("tiny", dtype="auto").unet.dtype == (torch.bfloat16 if there else torch.float32)
