"""Reward, uncertainty and alignment losses against their equations, written out place by place in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from counterpoint.training.losses import alignment
from counterpoint.training.losses.diffusion import add_noise, diffusion_loss, snr_weight, target
from counterpoint.training.losses.reward import class_error, estimate_x0, map_error, masked_mean, within
from counterpoint.training.losses.uncertainty import disagreement, divergence, uncertain_class_error, uncertain_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_the_picture_back(kind: str) -> None:
    x0, noise, alpha_bar = random(3, 2, 4, 4), random(3, 2, 4, 4, seed=1), torch.tensor([0.99, 0.5, 0.01]).double()
    x_t = add_noise(x0, noise, alpha_bar)
    torch.testing.assert_close(estimate_x0(x_t, target(x0, noise, alpha_bar, kind), alpha_bar, kind), x0)
    with pytest.raises(ValueError, match="prediction_type"):
        estimate_x0(x_t, noise, alpha_bar, "sample")


def test_a_flow_goes_straight_from_the_picture_to_the_noise() -> None:
    x0, noise, s = random(3, 2, 4, 4), random(3, 2, 4, 4, seed=1), torch.tensor([0.01, 0.5, 0.99]).double()
    x_t, v = add_noise(x0, noise, s, "flow_prediction"), target(x0, noise, s, "flow_prediction")
    for b, share in enumerate(s.tolist()):
        torch.testing.assert_close(x_t[b], (1 - share) * x0[b] + share * noise[b])
        torch.testing.assert_close(v[b], noise[b] - x0[b])
        torch.testing.assert_close(x_t[b] - share * v[b], x0[b])
    torch.testing.assert_close(estimate_x0(x_t, v, s, "flow_prediction"), x0)
    off = random(3, 2, 4, 4, seed=2)
    miss = (estimate_x0(x_t, v + off, s, "flow_prediction") - x0).square().mean((1, 2, 3))
    weighted = snr_weight(s, 5.0, "flow_prediction") * off.square().mean((1, 2, 3))
    torch.testing.assert_close(weighted, ((1 - s) / s).square().clamp(max=5) * miss), "min-SNR weighs pictures"


def test_windows_and_masked_means() -> None:
    t = torch.tensor([0, 200, 201, 999])
    mask = within(t, (0, 200))
    assert mask.tolist() == [True, True, False, False]
    losses = torch.tensor([1.0, 3.0, 100.0, torch.inf], requires_grad=True)
    mean = masked_mean(losses, mask)
    mean.backward()
    assert mean.item() == 2
    assert losses.grad.tolist() == [0.5, 0.5, 0, 0], "what lies outside has no gradient, whatever it is"
    assert masked_mean(losses, torch.zeros(4, dtype=torch.bool)).item() == 0
    halves = [masked_mean(losses[part], mask[part], mask.sum() / 2) for part in (slice(1), slice(1, 4))]
    assert torch.stack(halves).mean() == mean, "two processes, whose gradients are averaged, are one"


def test_errors_place_by_place() -> None:
    read, wanted = random(2, 3, 2, 2), random(2, 3, 2, 2, seed=1)
    classes = torch.tensor([[[0, 1], [2, -1]], [[1, 1], [0, 2]]])
    squares, entropies = map_error(read, wanted), class_error(read, classes)
    for b in range(2):
        for i in range(2):
            for j in range(2):
                assert float(squares[b, i, j]) == pytest.approx(
                    sum(float(read[b, c, i, j] - wanted[b, c, i, j]) ** 2 for c in range(3)) / 3
                )
                label = int(classes[b, i, j])
                total = sum(math.exp(float(read[b, c, i, j])) for c in range(3))
                wanted_entropy = 0.0 if label < 0 else math.log(total) - float(read[b, label, i, j])
                assert float(entropies[b, i, j]) == pytest.approx(wanted_entropy)


def test_uncertainty_place_by_place() -> None:
    first, second = random(2, 3, 2, 2), random(2, 3, 2, 2, seed=1)
    error = random(2, 2, 2, seed=2).square()
    apart, diverging = disagreement(first, second), divergence(first, second)
    every = torch.zeros(2, 2, 2, dtype=torch.long)
    plain, classed = uncertain_error(error, apart, 0.1), uncertain_class_error(error, diverging, every, 0.3)
    for b in range(2):
        sums = [0.0, 0.0]
        for i in range(2):
            for j in range(2):
                one, two = first[b, :, i, j].softmax(0), second[b, :, i, j].softmax(0)
                u = sum(abs(float(first[b, c, i, j] - second[b, c, i, j])) for c in range(3)) / 3
                kl = sum(float(two[c]) * math.log(float(two[c] / one[c])) for c in range(3))
                e = float(error[b, i, j])
                sums[0] += (math.exp(-u) * e + 0.1 * u) / 4
                sums[1] += (math.exp(-0.3 * kl) * e + 0.3 * kl) / 4
        assert float(plain[b]) == pytest.approx(sums[0])
        assert float(classed[b]) == pytest.approx(sums[1])
    assert torch.equal(uncertain_error(error, torch.zeros_like(error), 0.1), error.flatten(1).mean(1)), "no doubt"
    classes = torch.tensor([[[0, 1], [2, -1]], [[-1, -1], [-1, -1]]])
    some = uncertain_class_error(class_error(first, classes), diverging, classes, 0.3)
    wanted = (-0.3 * diverging[0]).exp() * class_error(first, classes)[0] + 0.3 * diverging[0]
    torch.testing.assert_close(some, torch.stack([wanted.flatten()[:3].mean(), wanted.new_zeros(())]))


def test_alignment_losses() -> None:
    read = random(3, 1, 4, 4)
    wanted = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    wanted[0, 0, 0, :2] = torch.tensor([0.5, 1.0])
    wanted[1] = 0.7  # nothing is at the range's minimum
    wanted[2, 0, 1:] = 1
    got = alignment.sparse_mse(read, wanted)
    for b in range(3):
        pairs = [(float(r), float(w)) for r, w in zip(read[b].flatten(), wanted[b].flatten(), strict=True)]
        parts = [[(r - w) ** 2 for r, w in pairs if (w == 0) is low] for low in (True, False)]
        means = [sum(part) / len(part) for part in parts if part]
        assert float(got[b]) == pytest.approx(sum(means) / len(means))
    torch.testing.assert_close(alignment.mse(read, wanted), (read - wanted).square().mean((1, 2, 3)))
    logits, classes = random(2, 5, 3, 3), torch.randint(5, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(alignment.cross_entropy(logits, classes), class_error(logits, classes).mean((1, 2)))
    raised = alignment.sparse_mse(read, wanted + 0.2)
    torch.testing.assert_close(raised, (read - wanted - 0.2).square().mean((1, 2, 3))), "no pixel is black"
    for sample in range(3):
        torch.testing.assert_close(got[sample : sample + 1], alignment.sparse_mse(read[[sample]], wanted[[sample]]))


OTHER = random(2, 3, 4, 4, seed=9)
CLASSES = torch.eye(4).long().expand(2, 4, 4) - 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: map_error(x, OTHER).sum(),
        lambda x: class_error(x, torch.zeros(2, 4, 4, dtype=torch.long)).sum(),
        lambda x: uncertain_error(map_error(x, OTHER), disagreement(x, 2 * OTHER), 0.1).sum(),
        lambda x: uncertain_class_error(map_error(x, OTHER), divergence(x, OTHER), CLASSES, 0.1).sum(),
        lambda x: alignment.mse(x, OTHER).sum(),
        lambda x: alignment.cross_entropy(x, torch.zeros(2, 4, 4, dtype=torch.long)).sum(),
        lambda x: diffusion_loss(x, OTHER).sum(),
        lambda x: alignment.sparse_mse(x, torch.eye(4).double().expand(2, 3, 4, 4)).sum(),
        lambda x: estimate_x0(x, 2 * x, torch.tensor([0.3, 0.9]).double(), "epsilon").square().sum(),
        lambda x: estimate_x0(x, 2 * x, torch.tensor([0.3, 0.9]).double(), "flow_prediction").square().sum(),
    ],
)
def test_gradients(loss) -> None:
    torch.autograd.gradcheck(loss, random(2, 3, 4, 4).requires_grad_())
