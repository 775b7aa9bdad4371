"""The papers' methods build what they say and take a step, on an untrained family."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file

from counterpoint.api import load
from counterpoint.conditions.canny import canny
from counterpoint.conditions.lines import lines
from counterpoint.data.balance import Balanced
from counterpoint.data.scenes.render import scene
from counterpoint.data.scenes.vocabulary import SEG_CLASSES
from counterpoint.data.shards import SceneShards
from counterpoint.recipes import RECIPES, parts
from counterpoint.recipes.worlds import SCENES
from counterpoint.training.config import override
from counterpoint.training.order import Draws
from counterpoint.training.stage import Job, Stage
from counterpoint.training.stages.diffusion import ControlNetStage
from counterpoint.training.stages.probe import AlignmentStage
from counterpoint.training.stages.reward import RewardStage
from counterpoint.training.trainer import train
from counterpoint.types import UserError


@pytest.fixture
def build(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stage of a recipe on a family that has a ControlNet of every kind."""
    monkeypatch.setattr(parts, "latents", lambda *_: SceneShards(tmp_path, 0, 2048))
    copy = Path(shutil.copytree(family, tmp_path / "family"))
    for kind in ("canny", "depth", "hed", "lineart", "seg"):
        shutil.copytree(copy / "controls" / "pose", copy / "controls" / kind)

    def make(recipe: str, *settings: str) -> Stage:
        config = override(RECIPES[recipe].config, [f"pretrained_model_name_or_path={copy}", *settings])
        return RECIPES[recipe].build(config).stage

    make.family = copy
    return make


def batch(kind: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(4, 16, 16, 16, generator=generator),
        "caption": ["a red ball on a meadow"] * 4,
        f"control:{kind}": torch.randint(0, 256, (4, 128, 128, 3), generator=generator).byte(),
        "seg": torch.randint(len(SEG_CLASSES), (4, 128, 128), generator=generator).byte(),
        "keypoints": 128 * torch.rand(4, 2, 18, 2, generator=generator),
    }


KINDS = ("canny", "depth", "hed", "lineart", "pose", "seg")


@pytest.mark.parametrize("kind", KINDS)
def test_probes_then_aligned_controlnets(build, kind: str) -> None:
    stage = build("tiny-probe", f"control_type={kind}")
    assert stage.target.kind == {"seg": "classes", "canny": "sparse", "pose": "sparse"}.get(kind, "map"), (
        "appendix A.1; the sparse loss is alignment's"
    )
    loss, _ = stage(batch(kind), Draws(0, range(4)), 0)
    loss.backward()
    assert all(p.grad is not None for p in stage.probe.parameters())
    assert sum(p.numel() for p in stage.probe.parameters()) < 200_000
    assert stage.probe.config["out"] == {"pose": 3, "seg": len(SEG_CLASSES)}.get(kind, 1)
    assert stage.probe.config["upsample"] == (kind in {"canny", "hed", "lineart"})
    stage.export(build.family / "probes" / kind)
    everywhere = ["max_timestep_rewarding=999", f"control_type={kind}"]
    for method, expected in (("controlnet++", RewardStage), ("ctrl-u", RewardStage), ("innercontrol", AlignmentStage)):
        stage = build(f"tiny-{method}", *everywhere)
        assert type(stage) is expected
        assert (stage.uncertainty is not None) == (method == "ctrl-u")
        weights = {"canny": 1.0, "depth": 0.5, "hed": 1.0, "lineart": 10.0, "pose": 20.0, "seg": 0.5}
        assert stage.weight == weights[kind]
        if method == "innercontrol":
            assert (stage.target.kind == "sparse") == (kind in {"canny", "hed", "pose"}), "table 4"
        loss, extra = stage(batch(kind), Draws(0, range(4)), 0)
        assert loss.isfinite()
        assert extra["reward"] > 0
        loss.backward()
        assert stage.controlnet.controlnet_mid_block.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_alone_reaches_the_controlnet(build, kind: str) -> None:
    stage = build("tiny-controlnet++", "max_timestep_rewarding=999", f"control_type={kind}")
    stage._weighted = lambda _, losses: 0 * losses.detach().sum()
    loss, _ = stage(batch(kind), Draws(0, range(4)), 0)
    loss.backward()
    assert stage.controlnet.controlnet_mid_block.weight.grad.any()


@pytest.mark.parametrize("recipe", ["tiny-tuned", "tiny-mi-stage1"])
def test_a_lora_from_recipe_to_stock_diffusers(build, tmp_path: Path, recipe: str) -> None:
    """As the recipe has it, channels last; what comes out is the merged network and what was added to the first one."""
    place = build.family / "controls" / "pose"
    start = [f"controlnet_model_name_or_path={place}", "control_type=pose", "rank=2", "learning_rate=0.1"]
    settings = [f"output_dir={tmp_path / 'out'}", "max_train_steps=2", "train_batch_size=4", "mixed_precision=no"]
    stage = build(recipe, *start, *settings)
    config = override(RECIPES[recipe].config, [f"pretrained_model_name_or_path={build.family}", *start, *settings])
    train(Job(stage, Few("pose")), config)
    merged = ControlNetModel.from_pretrained(tmp_path / "out")
    first = ControlNetModel.from_pretrained(place)
    plain = {name: value.clone() for name, value in first.state_dict().items()}
    first.load_lora_adapter(load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"), prefix=None)
    first.fuse_lora()
    first.unload_lora()
    changed = 0
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        changed += not torch.equal(value, plain[name])
    assert changed > 10


class Few:
    """Four samples."""

    def __init__(self, kind: str) -> None:
        self.rows = batch(kind) | {"segments": batch(kind)["seg"].long()}

    def __len__(self) -> int:
        return 4

    def batch(self, indices: list[int]) -> dict:
        return {
            name: [rows[i] for i in indices] if isinstance(rows, list) else rows[torch.tensor(indices)]
            for name, rows in self.rows.items()
        }


def test_a_reward_that_weighs_nothing_reads_nothing(build) -> None:
    build("tiny-probe", "control_type=depth").export(build.family / "probes" / "depth")
    shutil.rmtree(build.family / "judges")
    stage = build("tiny-innercontrol", "grad_scale=0", "control_type=depth")
    stage.vae = None
    loss, extra = stage(batch("depth"), Draws(0, range(4)), 0)
    assert extra["reward"] == 0
    assert extra["alignment"] > 0
    loss.backward()
    assert stage.controlnet.controlnet_mid_block.weight.grad.any()


def test_of_poses_the_judge_sees_where_joints_are() -> None:
    """A reading of the joints themselves costs nothing; one of people elsewhere does, and a hidden joint is nowhere."""
    rows = batch("pose")
    wanted = SCENES.seen("pose")(rows)
    assert wanted.shape == (4, 18, 128, 128)
    x, y = rows["keypoints"][0, 0, 3].int().tolist()
    assert wanted[0, 3, y, x] > 0.8
    rows["keypoints"][:, :, 5] = torch.nan
    assert not SCENES.seen("pose")(rows)[:, 5].any()


def test_drawn_lines_are_those_of_the_extractor_and_have_a_slope() -> None:
    image = scene(7).image
    picture = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double() / 127.5 - 1
    picture.requires_grad_()
    drawn = SCENES.reader(None, "lineart")(picture)
    miss = (drawn[0, 0].detach() - torch.from_numpy(lines(image)[..., 0].copy()) / 255).abs()
    assert miss.mean() < 0.01
    assert miss.max() < 0.1
    drawn.sum().backward()
    assert picture.grad.any()
    assert (SceneShards._control(Rows(image), "lineart", 0) == lines(image)).all()


@pytest.mark.parametrize("number", [7, 8, 9])
def test_drawn_edges_are_those_of_opencv_but_for_hysteresis(number: int) -> None:
    """What is beyond the higher threshold is an edge, and every edge is beyond the lower one; nothing else is kept."""
    image = scene(number).image
    picture = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1).requires_grad_()
    drawn = SCENES.reader(None, "canny")(picture)
    edges = torch.from_numpy(canny(image)[..., 0].copy()) > 0
    inner = drawn[0, 0, 1:-1, 1:-1]
    strong, weak = inner > 0.8809, inner > 0.1191
    assert not (strong & ~edges[1:-1, 1:-1]).any()
    assert not (edges[1:-1, 1:-1] & ~weak).any()
    assert strong.sum() > 0.5 * edges.sum()
    drawn.sum().backward()
    assert picture.grad.abs().sum() > 0
    flat = SCENES.reader(None, "canny")(torch.zeros(1, 3, 8, 8))
    assert not flat.any()


class Rows:
    """A shard of one picture."""

    def __init__(self, image: np.ndarray) -> None:
        self._row = lambda field, index: {"image": [image]}[field][index]


@pytest.mark.parametrize("kind", ["depth", "pose"])
def test_the_plain_loss_goes_on_for_as_long(build, kind: str) -> None:
    """The row that the methods are compared with: the same network, data and steps."""
    stage = build("tiny-tuned", f"control_type={kind}")
    assert type(stage) is ControlNetStage
    stage(batch(kind), Draws(0, range(4)), 0)[0].backward()
    assert stage.controlnet.controlnet_mid_block.weight.grad is not None
    method, plain = (RECIPES[f"tiny-{name}"].config for name in ("controlnet++", "tuned"))
    same = ("max_train_steps", "train_batch_size", "learning_rate", "lr_scheduler", "max_train_samples")
    assert all(getattr(method, name) == getattr(plain, name) for name in same)


def test_the_recipes_name_is_that_of_its_job(build) -> None:
    config = override(RECIPES["tiny-tuned"].config, [f"pretrained_model_name_or_path={build.family}"])
    assert RECIPES["tiny-tuned"].build(config).recipe == "tiny-tuned"


def test_the_models_own_schedule_and_prediction(build) -> None:
    place = build.family / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"prediction_type": "v_prediction", "beta_end": 0.02}))
    stage = build("tiny-tuned")
    assert stage.scheduler.config.prediction_type == "v_prediction"
    noisy = stage._noisy(batch("depth"), Draws(0, range(4)))
    betas = torch.linspace(0.00085**0.5, 0.02**0.5, 1000).square()
    torch.testing.assert_close(noisy.level, (1 - betas).cumprod(0)[noisy.t])
    root = noisy.level.sqrt()[:, None, None, None]
    wanted = root * noisy.noise - (1 - noisy.level).sqrt()[:, None, None, None] * noisy.x0
    assert stage._losses(noisy, wanted).max() < 1e-10
    place.unlink()
    with pytest.raises(UserError, match="has no scheduler"):
        build("tiny-tuned")


def test_samples_come_in_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_train_samples=100: scenes come in shards of 2048"):
        parts.scenes(override(RECIPES["tiny-codec"].config, ["max_train_samples=100", f"cache_dir={tmp_path}"]))


def test_what_is_missing_is_said(build) -> None:
    with pytest.raises(UserError, match="no probes/depth"):
        build("tiny-innercontrol")
    shutil.rmtree(build.family / "judges" / "b")
    with pytest.raises(UserError, match="no judges/b"):
        build("tiny-controlnet++")


@pytest.mark.parametrize(
    "settings",
    [
        ["balanced=false", "injection=sum"],
        ["injection=literal"],
        ["control_type=depth", "injection=sum"],
        ["conservativity_estimator=paired"],
        ["conservativity_estimator=symmetric", "injection=sum"],
    ],
)
def test_controlnets_that_make_way(build, settings: list[str]) -> None:
    place = build.family / "controls" / "pose"
    start = f"controlnet_model_name_or_path={place}"
    kind = "depth" if "control_type=depth" in settings else "pose"
    number = 2 if settings[0].startswith("conservativity") else 1
    if number == 2 and "injection=sum" not in settings:
        with pytest.raises(UserError, match="stage 2 goes on with the output of stage 1"):
            build("tiny-mi-stage2", "control_type=pose", start, *settings)
        build("tiny-mi-stage1", "control_type=pose", start).export(place)
    stage = build(f"tiny-mi-stage{number}", "control_type=pose", start, *settings)
    with torch.autocast("cpu", torch.bfloat16):
        loss, extra = stage(batch(kind), Draws(0, range(4)), 0)
    assert loss.isfinite()
    assert ("asymmetry" in extra) == (number == 2)
    loss.backward()
    assert stage.controlnet.controlnet_mid_block.weight.grad is not None
    with pytest.raises(UserError, match="controlnet_model_name_or_path: there is no model"):
        build("tiny-mi-stage1", "controlnet_model_name_or_path=nowhere")


def test_balanced_scenes(build, tmp_path: Path) -> None:
    places = {"pretrained": build.family, "controlnet": build.family / "controls" / "pose"}
    job = RECIPES["tiny-mi-stage1"].build(
        override(
            RECIPES["tiny-mi-stage1"].config,
            [f"{key}_model_name_or_path={place}" for key, place in places.items()],
        )
    )
    assert isinstance(job.samples, Balanced)
    assert "segments" in job.samples.samples.fields.values()


def test_a_network_says_what_it_was_trained_for(build, tmp_path: Path) -> None:
    """And stock diffusers takes no notice."""
    build("tiny-probe", "control_type=depth").export(build.family / "probes" / "hed")
    with pytest.raises(UserError, match="was trained for depth, and is asked for hed"):
        build("tiny-innercontrol", "control_type=hed")
    build("tiny-probe", "control_type=canny").export(tmp_path / "probe")
    build("tiny-innercontrol", "control_type=canny", f"probe_model_name_or_path={tmp_path / 'probe'}")
    with pytest.raises(UserError, match=r"train it first .* or name one as probe_model_name_or_path"):
        build("tiny-innercontrol", "control_type=canny")
    build("tiny-tuned", "control_type=depth").export(tmp_path / "depth")
    for recipe in ("tiny-tuned", "tiny-mi-stage1"):
        with pytest.raises(UserError, match="was trained for depth, and is asked for pose"):
            build(recipe, "control_type=pose", f"controlnet_model_name_or_path={tmp_path / 'depth'}")
    with pytest.raises(UserError, match="was trained for depth, and is asked for pose"):
        load(str(build.family), {"pose": str(tmp_path / "depth")})
    load(str(build.family), {"depth:mine": str(tmp_path / "depth")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, unused = ControlNetModel.from_pretrained(tmp_path / "depth", output_loading_info=True)
    assert not any(unused.values())


def test_what_says_nothing_learns_nothing_by_the_literal_injection(build) -> None:
    parts.new_controlnet(parts.network(UNet2DConditionModel, build.family / "unet")).save_pretrained(
        build.family / "controls" / "pose"
    )
    with pytest.raises(UserError, match="says nothing yet"):
        build("tiny-mi-stage1", "control_type=pose")
    build("tiny-mi-stage1", "control_type=pose", "injection=min-norm")
