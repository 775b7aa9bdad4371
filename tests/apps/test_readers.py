"""A user's networks as readers, and a suite on published photos from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from counterpoint.apps.readers import user_readers
from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.models.tokenizer import word_tokenizer
from counterpoint.types import UserError
from tests.data.test_published import coco, person, picture


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random networks in the classes and folders that users have."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    depth = DPTConfig(
        **small, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    DPTForDepthEstimation(depth).save_pretrained(folder / "depth")
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "depth")
    for name, labels in (("seg", 150), ("few", 4)):
        seg = SegformerConfig(
            num_labels=labels, depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16
        )
        SegformerForSemanticSegmentation(seg).save_pretrained(folder / name)
        SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / name)
    tokenizer = word_tokenizer(["a", "photo", "of", "person"], 16)
    clip = CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_dim": 16},
        vision_config={**small, "image_size": 32, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    CLIPModel(clip).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    return folder


@torch.no_grad()
def test_readers_of_a_user(networks: Path) -> None:
    readers = user_readers({kind: networks / kind for kind in ("depth", "seg")}, networks / "clip")
    pictures = torch.rand(3, 3, 64, 64)
    depth = readers.maps["depth"](pictures)
    assert depth.shape == pictures.shape
    assert torch.equal(depth.amin((1, 2, 3)), torch.zeros(3))
    assert torch.equal(depth.amax((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(depth[1:2], readers.maps["depth"](pictures[1:2]), rtol=0, atol=1e-4)
    classes = readers.classes(pictures)
    assert classes.shape == (3, 64, 64)
    colours = (readers.maps["seg"](pictures) * 255).byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(colours, ADE20K_PALETTE[classes.numpy()])
    assert torch.equal(readers.classes_of(list(colours)), torch.where(classes == 48, 6, classes))
    assert torch.equal(readers.person(pictures), classes == 12)


def test_what_cannot_be_read_is_said(networks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="150 are needed"):
        user_readers({"seg": networks / "few"}, networks / "clip")
    with pytest.raises(UserError, match=r"is not a model|holds no model"):
        user_readers({"depth": tmp_path}, networks / "clip")
    with pytest.raises(UserError, match="no model for"):
        user_readers({"depth": networks / "seg"}, networks / "clip")
    with pytest.raises(UserError, match="--reader depth=FOLDER"):
        user_readers({}, networks / "clip").maps["depth"](torch.rand(1, 3, 64, 64))


def test_a_suite_on_published_photos(cli, saved: Path, networks: Path, tmp_path: Path) -> None:
    import PIL.Image

    coco(tmp_path / "coco", [person(1, 7), person(2, 3), person(3, 5)])
    (tmp_path / "bg").mkdir()
    for i in range(3):
        PIL.Image.fromarray(picture(i)).save(tmp_path / "bg" / f"{i}.png")
    named = {
        "--controlnet": [f"pose={saved}/controlnet", f"depth={saved}/controlnet_1"],
        "--data": [f"coco2017={tmp_path}/coco", f"bg20k={tmp_path}/bg"],
        "--reader": [f"depth={networks}/depth"],
        "--clip": [f"{networks}/clip"],
    }
    start = ["evaluate", "conflicting", "--model", saved, "-n", 3, "--steps", 1, "--fusion", "sum", "--json"]
    start += ["--out", tmp_path / "run"]
    arguments = [*start, *(part for option, values in named.items() for value in values for part in (option, value))]
    status, _, error = cli(*arguments)
    assert (status, error.splitlines()[-1]) == (
        2,
        "error: this suite reads seg from pictures: name a network with --reader seg=FOLDER",
    )
    assert not list(tmp_path.rglob("settings.json")), "missed before anything was made"
    listed = ["--manifest", tmp_path / "manifest.json"]
    status, out, _ = cli(*arguments, "--reader", f"seg={networks}/seg", *listed)
    assert status == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [case["photos"]["depth"]["name"] for case in manifest["sorts"]["pose+depth"]] == ["0.png", "1.png", "2.png"]
    assert cli(*arguments, "--reader", f"seg={networks}/seg", *listed)[0] == 0
    (tmp_path / "bg" / "1.png").rename(tmp_path / "bg" / "9.png")
    status, _, error = cli(*arguments, "--reader", f"seg={networks}/seg", *listed)
    assert (status, "case 1 of pose+depth is" in error) == (2, True)
    rows = json.loads(out)["rows"]
    assert [(row["name"], row["case"]) for row in rows] == [("sum", "pose+depth")]
    assert set(rows[0]["metrics"]) == {"clip", "mse_depth", "mse_depth_background", "miou_p"}
    layouts = tmp_path / "mig_bench.json"
    layouts.write_text(
        json.dumps({"0": {"caption": "a person", "segment": [{"bbox": [0, 0, 1, 1], "label": "a red a"}]}})
    )
    plain = [part for part in start[2:] if part not in {"--fusion", "sum"}]
    layout = ["evaluate", "layout", *plain, "--layouts", layouts, "--clip", networks / "clip"]
    status, _, error = cli(*layout)
    assert (status, "--reader detect=FOLDER" in error) == (2, True)
    status, _, error = cli(*start, "--data", named["--data"][0])
    assert status == 2
    assert "--controlnet KIND=FOLDER" in error
