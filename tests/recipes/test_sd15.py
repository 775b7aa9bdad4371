"""The papers' methods on the layout of Stable Diffusion 1.5: built and stepped on a small model with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import DPTImageProcessor

from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.control.features import widths
from counterpoint.models.edge_networks import EDGE_NETWORKS
from counterpoint.models.probe import Probe
from counterpoint.recipes import RECIPES
from counterpoint.recipes.sd15 import SD15_WORLD
from counterpoint.training.config import override
from counterpoint.training.losses import alignment
from counterpoint.training.order import Draws
from counterpoint.training.stage import Job
from counterpoint.training.stages.reward import Reward
from counterpoint.types import UserError
from tests.apps.test_readers import networks

__all__ = ["networks"]


@pytest.fixture(scope="module")
def model(saved: Path, networks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a KL autoencoder, photos, and what reads them."""
    root = tmp_path_factory.mktemp("sd15")
    shutil.copytree(saved, root / "model")
    shutil.rmtree(root / "model" / "vae")
    torch.manual_seed(0)
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    AutoencoderKL(
        down_block_types=blocks[0], up_block_types=blocks[1], block_out_channels=(8,) * 4, norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(root / "model" / "vae")  # fmt: skip
    for kind in ("hed", "lineart"):
        save_file(EDGE_NETWORKS[kind]().state_dict(), root / f"{kind}.safetensors")
    (root / "photos").mkdir()
    rows = []
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        PIL.Image.fromarray(noise).save(root / "photos" / f"{i}.png")
        PIL.Image.fromarray(ADE20K_PALETTE[noise[..., 0] % 150]).save(root / "photos" / f"{i}-seg.png")
        row = {"file_name": f"{i}.png", "text": "a red ball"}
        maps = {"seg": f"{i}-seg.png", **dict.fromkeys(("depth", "hed", "lineart", "pose"), f"{i}.png")}
        rows.append(row | {f"{kind}_file_name": name for kind, name in maps.items()})
    (root / "photos" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def build(model: Path, recipe: str, *more: str) -> Job:
    settings = [
        f"pretrained_model_name_or_path={model / 'model'}",
        f"train_data_dir={model / 'photos'}",
        f"cache_dir={model / 'cache'}",
        "resolution=64",
        *more,
    ]
    return RECIPES[recipe].build(override(RECIPES[recipe].config, settings))


def step(job: Job) -> dict[str, torch.Tensor]:
    for parameter in job.stage.parameters():
        parameter.requires_grad_(False)
    for module in job.stage.trained_modules().values():
        module.requires_grad_(True)
    loss, extra = job.stage(job.samples.batch([0, 1]), Draws(0, [0, 1]), 0)
    assert loss.isfinite()
    loss.backward()
    return extra


@pytest.mark.parametrize("kind", ["canny", "depth", "hed", "lineart", "seg"])
def test_rewards_and_probes(model: Path, networks: Path, kind: str) -> None:
    control = [f"control_type={kind}", f"controlnet_model_name_or_path={model / 'model' / 'controlnet'}"]
    job = build(model, "sd15-probe", control[0])
    step(job)
    job.stage.export(model / f"probe-{kind}")
    reader = model / f"{kind}.safetensors" if kind in {"hed", "lineart"} else networks / kind
    control += [f"reader_model_name_or_path={reader}", f"probe_model_name_or_path={model / f'probe-{kind}'}"]
    for method in ("controlnet++", "ctrl-u", "innercontrol"):
        job = build(model, f"sd15-{method}", *control, "max_timestep_rewarding=999", "aligning_alpha=0")
        without_noise_loss(job.stage)
        assert step(job)["reward"] > 0
        assert job.stage.controlnet.controlnet_mid_block.weight.grad.any(), "the reward alone reaches the ControlNet"


def test_poses_have_no_reward_on_photos_and_a_probe_all_the_same(model: Path) -> None:
    control = ["control_type=pose", f"controlnet_model_name_or_path={model / 'model' / 'controlnet'}"]
    job = build(model, "sd15-probe", control[0])
    step(job)
    job.stage.export(model / "probe-pose")
    control += [f"probe_model_name_or_path={model / 'probe-pose'}"]
    with pytest.raises(UserError, match=r"nothing reads poses from photos .*: --set grad_scale=0"):
        build(model, "sd15-innercontrol", *control)
    job = build(model, "sd15-innercontrol", *control, "grad_scale=0")
    without_noise_loss(job.stage)
    assert step(job)["alignment"] > 0
    assert job.stage.controlnet.controlnet_mid_block.weight.grad.any(), "alignment alone reaches the ControlNet"


def without_noise_loss(stage) -> None:
    stage._weighted = lambda _, losses: 0 * losses.detach().sum()


@pytest.mark.parametrize("layers", ["attention", "convolution"])
def test_published_heads_of_either_sort(model: Path, networks: Path, layers: str) -> None:
    """A depth head that reads convolutions is Readout Guidance's, one that reads attention InnerControl's."""
    unet = SD15_WORLD.unet(override(RECIPES["sd15-probe"].config, [f"pretrained_model_name_or_path={model / 'model'}"]))
    head = Probe(widths(unet, layers), unet.time_embedding.linear_2.out_features, 32, (16, 8))
    file = model / f"head-{layers}.safetensors"
    save_file({f"aggregation_network.{name}": value for name, value in head.state_dict().items()}, file)
    control = ["control_type=depth", f"controlnet_model_name_or_path={model / 'model' / 'controlnet'}"]
    control += [f"reader_model_name_or_path={networks / 'depth'}", f"probe_model_name_or_path={file}"]
    job = build(model, "sd15-innercontrol", *control, "grad_scale=0", "reversed_timestep_readout=true")
    assert job.stage.layers == layers
    assert job.stage.target.reverse
    without_noise_loss(job.stage)
    assert step(job)["alignment"] > 0
    assert job.stage.controlnet.controlnet_mid_block.weight.grad.any(), "alignment alone reaches the ControlNet"
    save_file(Probe((32, 8), 64, 32, (16, 8)).state_dict(), file)
    with pytest.raises(UserError, match="the probe is for another denoiser"):
        build(model, "sd15-innercontrol", *control)


def test_photos_without_the_control_are_refused_before_anything_is_computed(model: Path) -> None:
    start = f"controlnet_model_name_or_path={model / 'model' / 'controlnet'}"
    with pytest.raises(UserError, match="3 of 3 photos have no normal image"):
        build(model, "sd15-controlnet", "control_type=normal", f"cache_dir={model / 'untouched'}")
    bare = model / "bare"
    bare.mkdir()
    for name in ("0.png", "1.png"):
        (bare / name).write_bytes((model / "photos" / name).read_bytes())
    (bare / "metadata.jsonl").write_text("".join(f'{{"file_name": "{i}.png", "text": "a ball"}}\n' for i in range(2)))
    photos = [f"train_data_dir={bare}", f"cache_dir={model / 'untouched'}"]
    for kind in ("hed", "lineart"):
        with pytest.raises(UserError, match=f"2 of 2 photos have no {kind} image, .*: counterpoint extract {kind}"):
            build(model, "sd15-tuned", f"control_type={kind}", start, *photos)
    with pytest.raises(UserError, match="has 64 x 64 pixels, too few for a resolution of 256"):
        build(model, "sd15-tuned", "control_type=depth", start, "resolution=256", f"cache_dir={model / 'untouched'}")
    assert not (model / "untouched").exists()


@pytest.mark.parametrize("stage", ["controlnet", "mi-stage1", "mi-stage2"])
def test_controlnets_that_start_and_make_way(model: Path, stage: str) -> None:
    start = [f"controlnet_model_name_or_path={model / 'model' / 'controlnet'}"] * stage.startswith("mi")
    job = build(model, f"sd15-{stage}", "control_type=pose", *start, *["injection=sum"] * (stage == "mi-stage2"))
    step(job)
    assert any(p.grad is not None and p.grad.any() for p in job.stage.controlnet.parameters())


def test_stage_two_with_its_own_settings(model: Path) -> None:
    """Its ControlNet is checkpointed, which changes no gradient."""
    plain = f"controlnet_model_name_or_path={model / 'model' / 'controlnet'}"
    build(model, "sd15-mi-stage1", "control_type=pose", plain).stage.export(model / "stage1")
    start = f"controlnet_model_name_or_path={model / 'stage1'}"
    slopes = []
    for checkpointed in (False, True):
        job = build(model, "sd15-mi-stage2", "control_type=pose", start)
        if checkpointed:
            job.stage.controlnet.enable_gradient_checkpointing()
        step(job)
        slopes.append([p.grad for p in job.stage.controlnet.parameters() if p.grad is not None])
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_what_is_in_no_class_does_not_count() -> None:
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    images[:, :, 4:] = torch.from_numpy(ADE20K_PALETTE[7].copy())
    classes = SD15_WORLD.wanted("seg")({"control:seg": images})
    assert classes.tolist() == [[[-1, 7]] * 2]
    logits = torch.randn(1, 150, 2, 2)
    plain = torch.nn.functional.cross_entropy(logits[..., 1], classes[..., 1], reduction="mean")
    torch.testing.assert_close(Reward(lambda x: x, lambda batch: batch["seg"], True).price(logits, classes)[0], plain)
    torch.testing.assert_close(alignment.cross_entropy(logits, classes)[0], plain)


def test_what_must_be_named(model: Path, networks: Path) -> None:
    with pytest.raises(UserError, match="name the depth ControlNet to go on with"):
        build(model, "sd15-controlnet++", f"reader_model_name_or_path={networks / 'depth'}")
    with pytest.raises(UserError, match="what reads depth from pictures"):
        build(model, "sd15-controlnet++")
    with pytest.raises(UserError, match="layout"):
        build(model, "sd15-controlnet", f"pretrained_model_name_or_path={model}")


def test_hub_ids(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = {"owner/model": model / "model", "owner/control": model / "model" / "controlnet"}
    monkeypatch.setattr("counterpoint.models.hub.snapshot_download", lambda name, **_: str(hub[name]))
    named = ["pretrained_model_name_or_path=owner/model", "controlnet_model_name_or_path=owner/control"]
    step(build(model, "sd15-tuned", "control_type=depth", *named))
    monkeypatch.undo()
    with pytest.raises(UserError, match="controlnet_model_name_or_path: there is no folder 'owner/control'"):
        build(model, "sd15-tuned", "control_type=depth", *named)


def test_pickles_and_other_networks_are_refused(model: Path, tmp_path: Path) -> None:
    """Where training begins as where pictures are made."""
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((model / "model" / "unet" / "config.json").read_text())
    torch.save({}, pickled / "diffusion_pytorch_model.bin")
    for place, said in ((pickled, "safetensors"), (model / "model" / "unet", "holds a UNet2DConditionModel")):
        with pytest.raises(UserError, match=said):
            build(model, "sd15-tuned", "control_type=depth", f"controlnet_model_name_or_path={place}")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.startswith("sd15-")])
@pytest.mark.parametrize("setting", ["snr_gamma=-1", "proportion_empty_prompts=7"])
def test_what_would_turn_the_loss_round_is_refused(recipe: str, setting: str) -> None:
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        override(RECIPES[recipe].config, [setting])


def test_a_reader_of_other_things_is_refused(model: Path, networks: Path, tmp_path: Path) -> None:
    start = f"controlnet_model_name_or_path={model / 'model' / 'controlnet'}"

    def reward(kind: str, reader: Path) -> None:
        build(model, "sd15-controlnet++", f"control_type={kind}", start, f"reader_model_name_or_path={reader}")

    with pytest.raises(UserError, match="knows 4 classes, and seg images show ADE20K's 150"):
        reward("seg", networks / "few")
    metric = Path(shutil.copytree(networks / "depth", tmp_path / "metric"))
    said = json.loads((metric / "config.json").read_text())
    (metric / "config.json").write_text(json.dumps(said | {"depth_estimation_type": "metric"}))
    with pytest.raises(UserError, match="reads distances"):
        reward("depth", metric)
    (metric / "config.json").write_text(json.dumps(said))
    (metric / "preprocessor_config.json").write_text('{"size": {"width": 3}}')
    with pytest.raises(UserError, match=r"preprocessor_config\.json does not say"):
        reward("depth", metric)


def test_a_reader_sees_pictures_as_its_folder_says(model: Path, networks: Path) -> None:
    """With gradients, what transformers' own processor shows it."""
    settings = ["control_type=depth", f"reader_model_name_or_path={networks / 'depth'}"]
    config = override(RECIPES["sd15-controlnet++"].config, settings)
    reader, seen = SD15_WORLD.reader(config, "depth"), []
    reader.network.register_forward_pre_hook(lambda _, __, given: seen.append(given["pixel_values"]), with_kwargs=True)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    reader(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)
    wanted = DPTImageProcessor.from_pretrained(networks / "depth")(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen[0], wanted, rtol=0, atol=1e-5)
