"""What finds named things: patches of a class map, and the networks of the published benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    SwinConfig,
)

from counterpoint.apps.detectors import _distinct, by_classes, load_detector, load_mask_generator
from counterpoint.types import UserError
from tests.apps.test_annotators import save_sam

CPU = torch.device("cpu")


def test_patches_of_a_class_map() -> None:
    seg = torch.zeros(1, 40, 80, dtype=torch.long)
    seg[0, 4:20, 8:40] = 3
    seg[0, 30:38, 60:80] = 3
    seg[0, 0, 0] = 3  # too small to be a thing
    detect, segment = by_classes(lambda _: seg, {"ball": 3, "box": 5})
    assert detect(torch.zeros(1, 3, 40, 80), [["ball", "box"]]) == [
        [[(0.1, 0.1, 0.5, 0.5), (0.75, 0.75, 1.0, 0.95)], []]
    ]
    (masks,) = segment(torch.zeros(1, 3, 40, 80), [["ball", "box"]], [[(0.2, 0.0, 0.6, 1.0), (0, 0, 1, 1)]])
    wanted = np.zeros((40, 80), bool)
    wanted[4:20, 16:40] = True
    np.testing.assert_array_equal(masks[0], wanted)
    assert not masks[1].any()


def test_of_boxes_that_nearly_coincide_the_best_stays() -> None:
    boxes = [(0.0, 0.0, 1.0, 0.95), (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.7), (0.5, 0.5, 1.0, 1.0)]
    assert _distinct(boxes, [0.5, 0.9, 0.8, 0.3]) == [1, 2, 3]  # overlaps of 0.95, 0.7 and 0.25 with the best
    assert _distinct([], []) == []


def test_grounding_dino_in_its_own_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, image_size=64,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, max_text_len=32, two_stage=True,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", ".", "?"]))
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 192})
    GroundingDinoProcessor(images, BertTokenizer(str(vocabulary))).save_pretrained(tmp_path)
    detect = load_detector(tmp_path, CPU)
    pictures = torch.rand(2, 3, 64, 96)
    found = detect(pictures, [["cat", "dog"], ["cat"]])
    assert [len(several) for several in found] == [2, 1]
    boxes = [box for several in found for one in several for box in one]
    assert boxes
    assert all(0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1 for x0, y0, x1, y1 in boxes)
    assert detect(pictures[1:], [["cat"]])[0] == found[1]


def test_sam_in_its_own_folder(tmp_path: Path) -> None:
    save_sam(tmp_path)
    segment = load_mask_generator(tmp_path, CPU)
    boxes = [[(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)], [(0.0, 0.0, 1.0, 1.0)]]
    found = segment(torch.rand(2, 3, 48, 96), [["cat", "dog"], ["cat"]], boxes)
    assert [[(mask.shape, mask.dtype) for mask in several] for several in found] == [
        [((48, 96), bool)] * 2,
        [((48, 96), bool)],
    ]
    assert any(0 < mask.mean() < 1 for several in found for mask in several)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    for load in (load_detector, load_mask_generator):
        with pytest.raises(UserError, match="holds no model"):
            load(tmp_path, CPU)
