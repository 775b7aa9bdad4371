"""Outlines, silence, colours, boxes, words, asymmetry: cases whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from counterpoint.metrics.boundary import boundary_f, outlines
from counterpoint.metrics.coco_mig import (
    COLOURS,
    box_iou,
    has_colour,
    instance_score,
    mean_iou,
    picture_row,
    success_rate,
)
from counterpoint.metrics.conservativity import asym, asymmetry, normalised_asym
from counterpoint.metrics.silence import l1_cycle, total_variance
from counterpoint.metrics.similarity import ms_ssim
from counterpoint.metrics.text import clip_score


def test_boundary_f() -> None:
    lines = torch.zeros(5, 20, 20, dtype=torch.bool)
    found, wanted = lines.clone(), lines.clone()
    found[:4, :, 5] = True
    wanted[0, :, 5] = True  # the same
    wanted[1, :, 7] = True  # two pixels beside
    wanted[2, :, 5] = wanted[2, :, 15] = True  # half of it
    # 3: nothing is wanted; 4: neither
    near, far = boundary_f(found, wanted, 1), boundary_f(found, wanted, 2)
    assert near.tolist() == pytest.approx([1, 0, 2 / 3, 0, 1])
    assert far.tolist() == pytest.approx([1, 1, 2 / 3, 0, 1])
    assert boundary_f(found, wanted).tolist() == pytest.approx([1, 0, 2 / 3, 0, 1])  # 0.8 % of 28 pixels, rounded up


def test_outlines() -> None:
    classes = torch.tensor([[[0, 0, 1], [0, 0, 1], [2, 2, 1]]])
    assert outlines(classes)[0].int().tolist() == [[0, 1, 0], [1, 1, 0], [0, 1, 0]]


def test_l1_cycle_counts_only_where_the_control_speaks() -> None:
    found, wanted = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    region = torch.zeros(2, 4, 4, dtype=torch.bool)
    region[:, :2] = True
    found[0, :, 0] = 0.5  # half of the region
    found[1, :, 3] = 1.0  # outside
    assert l1_cycle(found, wanted, region).tolist() == [0.25, 0.0]


def test_total_variance() -> None:
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0, 0, :, :2] = 1.0  # red or black, half and half: variance 127.5^2
    pictures[1, :, 2:] = torch.rand(3, 2, 4)
    region = torch.zeros(2, 4, 4, dtype=torch.bool)
    region[:, :2] = True
    assert total_variance(pictures, region).tolist() == pytest.approx([127.5**2, 0.0])


@pytest.mark.parametrize(
    ("rgb", "names"),
    [
        ((255, 0, 0), {"red"}),
        ((0, 0, 255), {"blue"}),
        ((0, 128, 0), {"green"}),
        ((255, 255, 0), {"yellow"}),
        ((0, 0, 0), {"black"}),
        ((255, 255, 255), {"white"}),
        ((139, 69, 19), {"brown"}),
        ((160, 60, 30), {"brown", "red"}),  # hue 7: the benchmark's ranges overlap
        ((127, 127, 127), set()),
    ],
)
def test_mig_colours(rgb: tuple[int, int, int], names: set[str]) -> None:
    image = np.full((10, 10, 3), rgb, np.uint8)
    mask = np.ones((10, 10), bool)
    assert {name for name, ranges in COLOURS.items() if has_colour(image, mask, ranges)} == names


def test_mig_colour_share() -> None:
    image = np.full((10, 10, 3), 127, np.uint8)
    image[:2] = (255, 0, 0)
    mask = np.ones((10, 10), bool)
    assert has_colour(image, mask, COLOURS["red"])
    image[0, 0] = 127
    assert not has_colour(image, mask, COLOURS["red"])
    assert not has_colour(image, np.zeros((10, 10), bool), COLOURS["red"])


def test_mig_instances() -> None:
    wanted = (0.0, 0.0, 0.4, 0.4)
    assert box_iou(wanted, (0.2, 0.0, 0.6, 0.4)) == pytest.approx(1 / 3)
    assert box_iou(wanted, (0.5, 0.5, 0.6, 0.6)) == 0
    assert instance_score(wanted, [], True) == (0, 0)
    success, iou = instance_score(wanted, [(0.2, 0.0, 0.6, 0.4)], True)
    assert (success, iou) == (0, pytest.approx(1 / 3))  # too far off, but its overlap counts
    assert instance_score(wanted, [wanted, (0.9, 0.9, 1, 1)], True) == (1, 1)
    assert instance_score(wanted, [wanted], False) == (0, 0)  # a wrong colour takes the overlap too
    rows = torch.stack([picture_row([(1, 1), (0, 0.25)]), picture_row([(1, 0.75)])])
    assert success_rate(rows) == pytest.approx(2 / 3)
    assert mean_iou(rows) == pytest.approx(2 / 3)


def test_clip_score() -> None:
    pictures = torch.tensor([[2.0, 0], [1, 1], [-1, 0]])
    texts = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    assert clip_score(pictures, texts).tolist() == pytest.approx([100, 50 * 2**0.5, 0])


def test_ms_ssim_says_what_it_needs() -> None:
    picture = torch.rand(1, 3, 176, 180)
    assert float(ms_ssim(picture, picture)) == pytest.approx(1)
    with pytest.raises(ValueError, match="176 pixels"):
        ms_ssim(picture[..., :128], picture[..., :128])


def test_asymmetry_of_linear_fields_is_exact_over_all_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    rows = asymmetry(lambda x: x @ matrix.T, x, signs)
    assert asym(rows) == pytest.approx(float((matrix @ matrix.T - matrix @ matrix).trace()))
    assert rows[:, 1].mean() == pytest.approx(float(matrix.square().sum()))
    for part, wanted in ((matrix + matrix.T, 0.0), (matrix - matrix.T, 1.0)):
        rows = asymmetry(lambda x, part=part: x @ part.T, x, signs)
        assert normalised_asym(rows) == pytest.approx(wanted, abs=1e-12)


def test_asymmetry_of_a_network_matches_its_jacobian() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x = torch.randn(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(net, x)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    rows = asymmetry(net, x.expand(8, 3), signs)
    assert asym(rows) == pytest.approx(float((jacobian - jacobian.T).square().sum() / 2))
