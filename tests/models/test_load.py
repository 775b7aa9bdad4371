"""Models from everywhere: what loads, and what is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from counterpoint import load
from counterpoint.models.hub import fetch
from counterpoint.models.load import load_components, load_controls, load_diffusers, own_controls, split_lora
from counterpoint.models.weights import list_hashes, shapes, verify_folder
from counterpoint.types import UserError
from tests.conftest import noise


def test_loading_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """The towers' projection, which a UNet has no use for, is no warning; what is said elsewhere stays."""
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load("tiny")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


HINTS = [noise((64, 64), 40 + 40 * i) for i in range(2)]


def test_folder_saved_by_diffusers_equals_diffusers(saved: Path) -> None:
    pipe = load(str(saved), ["pose", "seg"], scheduler="ddim")
    got = pipe(
        "a person",
        HINTS,
        fusion="sum",
        num_inference_steps=3,
        width=64,
        height=64,
        generator=torch.manual_seed(0),
        output_type="latent",
    ).images
    stock = StableDiffusionControlNetPipeline.from_pretrained(saved)
    stock.set_progress_bar_config(disable=True)
    wanted = stock(
        "a person", HINTS, num_inference_steps=3, generator=torch.manual_seed(0), output_type="latent"
    ).images
    assert torch.equal(got, wanted)


def test_a_model_says_how_it_is_guided(copy: Path) -> None:
    assert load(str(copy)).guidance_scale == 7.5
    defaults = copy / "generation_config.json"
    defaults.write_text('{"guidance_scale": 2.5}')
    pipe = load(str(copy), scheduler="ddim")

    def made(**how: float) -> torch.Tensor:
        settings = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "latent", **how}
        return pipe("a person", generator=torch.manual_seed(0), **settings).images

    assert torch.equal(made(), made(guidance_scale=2.5))
    assert not torch.equal(made(), made(guidance_scale=7.5))
    defaults.write_text('{"guidance_scale": "much"}')
    with pytest.raises(UserError, match="guidance_scale"):
        load(str(copy))


def test_lora_changes_the_result_and_scales(saved: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    parts = load_components(str(saved))
    parts.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    tensors = {f"unet.{name}": value.contiguous() for name, value in get_peft_model_state_dict(parts.unet).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    settings = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "latent"}

    def result(*lora: str) -> torch.Tensor:
        return load(str(saved), lora=lora)("a person", generator=torch.manual_seed(0), **settings).images

    plain, full, half, none = (
        result(),
        result(f"{tmp_path}/lora.safetensors"),
        result(f"{tmp_path}/lora.safetensors:0.5"),
        result(f"{tmp_path}/lora.safetensors:0"),
    )
    assert not torch.equal(plain, full)
    assert not torch.equal(full, half)
    torch.testing.assert_close(plain, none)


def test_controlnet_in_one_file(saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "controlnet" / "diffusion_pytorch_model.safetensors", tmp_path / "pose.safetensors")
    host = load_components(str(saved))
    network = load_controls(str(saved), {"pose": str(tmp_path / "pose.safetensors")}, host)["pose"]
    for name, value in load_file(tmp_path / "pose.safetensors").items():
        assert torch.equal(network.state_dict()[name], value)


def test_a_label_may_share_a_network(saved: Path) -> None:
    host, folder = load_components(str(saved)), str(saved / "controlnet")
    both = load_controls(str(saved), {"canny": folder, "canny:cup": folder}, host)
    assert both["canny"] is both["canny:cup"]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled(path: Path) -> None:
    torch.save({}, path.with_suffix(".bin"))
    path.unlink()


def misshapen(path: Path) -> None:
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.zeros(1, 2, 3, 3)
    save_file(tensors, path)


def incomplete(path: Path) -> None:
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "damaged"),
        (pickled, "pickle"),
        (misshapen, "conv_in.weight is"),
        (incomplete, "conv_in.weight is missing"),
        (Path.unlink, "no weights"),
    ],
)
@pytest.mark.parametrize("part", ["unet", "controlnet_1"])
def test_bad_weights(copy: Path, damage: object, message: str, part: str) -> None:
    damage(copy / part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load(str(copy), ["pose", "seg"])
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_models(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_index"):
        load(str(tmp_path))
    with pytest.raises(UserError, match="there is no model"):
        load(str(tmp_path / "nowhere" / "x"))
    with pytest.raises(UserError, match="cannot be had from the hub"):
        load("nobody/nothing")
    with pytest.raises(UserError, match="pickle"):
        load("model.ckpt")
    shutil.rmtree(copy / "vae")
    with pytest.raises(UserError, match="no vae"):
        load(str(copy))


def test_a_foreign_controlnet_is_refused(copy: Path, tiny: Path) -> None:
    config = json.loads((copy / "controlnet_1" / "config.json").read_text())
    with pytest.raises(UserError, match="in_channels"):
        load("tiny", {"pose": str(copy / "controlnet")})
    assert config["cross_attention_dim"] == 32


def test_number_of_controls_must_match_the_folder(saved: Path) -> None:
    with pytest.raises(UserError, match="--controlnet"):
        load(str(saved), ["pose"])


def test_a_label_names_a_variant_of_its_kind(tmp_path: Path) -> None:
    for name in ("canny", "canny-mi", "pose"):
        (tmp_path / "controls" / name).mkdir(parents=True)
    found = own_controls(tmp_path, ["canny", "canny:mi", "pose:mi"], "mine")
    assert {label: Path(place).name for label, place in found.items()} == {
        "canny": "canny",
        "canny:mi": "canny-mi",
        "pose:mi": "pose",
    }


def test_unknown_control_of_the_tiny_family(tiny: Path) -> None:
    with pytest.raises(UserError, match="it has canny"):
        load("tiny", ["mlsd"])


def test_single_file_without_configuration(saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="--config"):
        load(str(tmp_path / "model.safetensors"))


def test_hash_list(tmp_path: Path, tiny: Path) -> None:
    family = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    assert verify_folder(family) == len(list_hashes(family))
    weights = family / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="does not match"):
        verify_folder(family)
    weights.unlink()
    with pytest.raises(UserError, match="is missing"):
        verify_folder(family)


def test_shapes_come_from_the_header(tiny: Path) -> None:
    found = shapes(tiny / "unet" / "diffusion_pytorch_model.safetensors")
    assert found["conv_in.weight"][1] == 16


def test_every_part_of_the_family_loads(tiny: Path) -> None:
    for part in ("vae", "unet", *(f"controls/{path.name}" for path in (tiny / "controls").iterdir())):
        assert load_diffusers(tiny / part).dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-0.5", "a.safetensors", -0.5),
        ("a.safetensors:.5", "a.safetensors", 0.5),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
    ],
)
def test_a_lora_and_its_scale(source: str, path: str, scale: float) -> None:
    assert split_lora(source) == (path, scale)


def test_a_model_of_half_precision_files(parts: dict, tmp_path: Path) -> None:
    """As ``save_pretrained(..., variant="fp16")`` writes them, every part."""
    StableDiffusionPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(tmp_path, variant="fp16")  # fmt: skip
    assert list(tmp_path.glob("text_encoder/*.fp16.safetensors"))
    loaded = load_components(str(tmp_path))
    for name in ("vae", "text_encoder", "unet"):
        for one, other in zip(getattr(loaded, name).parameters(), parts[name].parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_model_that_reads_its_guidance_is_refused(parts: dict, tmp_path: Path) -> None:
    config = {name: value for name, value in parts["unet"].config.items() if not name.startswith("_")}
    StableDiffusionPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")},
        unet=UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 16}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="reads its guidance as an input"):
        load_components(str(tmp_path))


def test_of_a_repository_only_what_is_read_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that repositories of the two layouts have."""
    names = {
        "v1-5-pruned.safetensors": False, "sd_xl_base_1.0_0.9vae.safetensors": False, "model_index.json": True,
        "unet/diffusion_pytorch_model.safetensors": True, "unet/diffusion_pytorch_model.fp16.safetensors": False,
        "unet/diffusion_pytorch_model.non_ema.safetensors": False, "unet/diffusion_pytorch_model.bin": False,
        "text_encoder_2/model.safetensors": True, "safety_checker/model.safetensors": False,
        "diffusion_pytorch_model.safetensors": True, "tokenizer/merges.txt": True, "model.safetensors": True,
    }  # fmt: skip

    def download(_: str, **how: list[str]) -> str:
        asked.append(set(filter_repo_objects(names, **how)))
        return str(tmp_path)

    asked: list[set[str]] = []
    monkeypatch.setattr("counterpoint.models.hub.snapshot_download", download)
    fetch("owner/name")
    assert asked[0] == {name for name, wanted in names.items() if wanted}
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in asked[1], "nothing of full precision was there"
    (tmp_path / "model.safetensors").touch()
    fetch("owner/name")
    assert len(asked) == 3
