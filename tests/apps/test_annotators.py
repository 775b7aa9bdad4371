"""Poses by ViTPose and segments by SAM, in the folders in which transformers keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    SamConfig,
    SamImageProcessorPil,
    SamModel,
    SamProcessor,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    VitPoseImageProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from counterpoint.apps import annotators
from counterpoint.apps.annotators import distinct, paint, pose_annotator, segment_annotator
from counterpoint.apps.extractors import extractor
from counterpoint.conditions.openpose import draw_pose, from_coco
from counterpoint.types import UserError

PHOTO = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)


def save_pose(folder: Path) -> Path:
    """A ViTPose whose heat maps say: joint n is n steps down the middle column of a 16 x 12 grid."""
    torch.manual_seed(0)
    backbone = VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        mlp_ratio=2, out_indices=[1],
    )  # fmt: skip
    VitPoseForPoseEstimation(
        VitPoseConfig(backbone_config=backbone, use_simple_decoder=True, num_labels=17)
    ).save_pretrained(folder)
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(folder)
    return folder


def save_detector(folder: Path, second: str = "person") -> Path:
    """A detector with random weights, which happens to see the second class everywhere."""
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[64, 64],
        patch_size=16, num_detection_tokens=5, id2label={0: "cat", 1: second},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


def save_sam(folder: Path) -> None:
    """A small SAM with random weights."""
    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16, "mlp_dim": 16, "num_pos_feats": 8, "global_attn_indexes": [0],
            "window_size": 2,
        },
        prompt_encoder_config={
            "hidden_size": 16, "image_size": 64, "patch_size": 16, "image_embedding_size": 4, "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    SamModel(config).save_pretrained(folder)
    small = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    SamProcessor(SamImageProcessorPil(**small)).save_pretrained(folder)


def told(monkeypatch: pytest.MonkeyPatch, *joints: tuple[int, int, int]) -> None:
    """Let the network see exactly some joints: (number, row, column) of its 16 x 12 heat maps, in every box."""

    def forward(_: object, pixel_values: torch.Tensor, **__: object) -> object:
        maps = torch.zeros(len(pixel_values), 17, 16, 12)
        for number, row, column in joints:
            maps[:, number, row, column] = 1
        return type("Output", (), {"heatmaps": maps})()

    monkeypatch.setattr(VitPoseForPoseEstimation, "forward", forward)


def test_joints_are_drawn_where_they_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract = pose_annotator(save_pose(tmp_path))
    assert extract(PHOTO).shape == PHOTO.shape
    told(monkeypatch, (5, 4, 8), (6, 4, 4), (0, 2, 6))
    drawn = extract(PHOTO)
    lit = drawn.any(-1)
    rows, columns = lit.nonzero()
    assert lit.any()
    assert rows.max() < 48, "nothing below the shoulders was seen"
    assert 16 < columns.min() < columns.max() < 56
    told(monkeypatch)
    assert not extract(PHOTO).any(), "who sees nothing draws nothing"


def test_people_are_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pose, people = save_pose(tmp_path / "pose"), save_detector(tmp_path / "people")
    told(monkeypatch, (5, 8, 8), (6, 8, 4))
    nobody = extractor("pose", f"{pose},{people}")
    assert not nobody(PHOTO).any()
    monkeypatch.setattr(annotators, "_SURE", 0.0)
    assert nobody(PHOTO).any()
    with pytest.raises(UserError, match="what a person is"):
        pose_annotator(pose, save_detector(tmp_path / "cats", "dog"))
    with pytest.raises(UserError, match="holds no model"):
        pose_annotator(tmp_path)


def test_the_neck_is_between_the_shoulders() -> None:
    points = np.arange(34.0).reshape(17, 2)
    joints = from_coco(points)
    np.testing.assert_array_equal(joints[1], points[5:7].mean(0))
    np.testing.assert_array_equal(joints[[0, 2, 5, 8, 11]], points[[0, 6, 5, 12, 11]])
    assert draw_pose([joints], 64, 64).any()


def test_segments_are_distinct_and_small_ones_lie_on_top() -> None:
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[0] = True
    masks[1, :, :7] = True  # nearly the first
    masks[2, 2:4, 2:4] = True
    kept = distinct(masks, torch.tensor([0.9, 0.95, 0.8, 0.99]))
    assert kept == [1, 2], "the surer of two that are one, and no empty one"
    picture = paint(masks[kept], 8, 8)
    colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert len(colours) == 3
    assert (picture[:, 7] == 0).all()
    assert (picture[2, 2] != picture[0, 0]).any()


def test_sam_paints_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sam(tmp_path)
    monkeypatch.setattr(annotators, "_STABLE", -100.0)
    picture = segment_annotator(tmp_path)(PHOTO)
    assert picture.shape == PHOTO.shape
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) >= 2
    monkeypatch.setattr(annotators, "_STABLE", 100.0)
    assert not segment_annotator(tmp_path)(PHOTO).any()
