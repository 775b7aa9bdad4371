"""Several denoisers share their first steps: the equations in float64, and what is asked of the networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from torch import Tensor

from counterpoint.sampling.amdm import (
    PRESETS,
    PUBLISHED,
    Aggregation,
    aggregate,
    coefficients,
    pulled,
    sample_aggregated,
)
from counterpoint.sampling.loop import sample
from counterpoint.sampling.schedulers import moments
from counterpoint.types import Moment, UserError

SHAPE = (2, 4, 8, 8)


SCALE = math.sqrt(math.prod(SHAPE[1:]) / PUBLISHED)
"""Of the paper's lengths, for latents of this shape."""


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


class Model:
    """Predicts a fixed direction and a little of what it sees; counts its calls."""

    def __init__(self, seed: int) -> None:
        self.direction, self.calls = noise(seed), 0

    def __call__(self, latents: Tensor, moment: Moment) -> Tensor:
        self.calls += 1
        return 0.3 * latents + self.direction[: len(latents)]


def scheduler(steps: int = 10) -> DDIMScheduler:
    made = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    made.set_timesteps(steps)
    return made


def run(models: list, aggregation: Aggregation, steps: int = 10, start: Tensor | None = None, **more: object) -> Tensor:
    ddim = scheduler(steps)
    starts = [noise(0) if start is None else start]
    *_, last = sample_aggregated(models, ddim, starts, ddim.timesteps, aggregation, **more)
    return last.latents


def test_the_coefficients_of_algorithm_2() -> None:
    w1, w2 = 0.47, 0.5
    r1, r2 = math.sqrt(1 - w1**2), math.sqrt(1 - w2**2)
    assert coefficients((w1, w2), "paper") == pytest.approx((w1 * w2, r1 * w2, r1 * r2))
    assert sum(c**2 for c in coefficients((w1, w2), "paper")) == pytest.approx(0.834, abs=1e-3)
    for weights in ((0.3,), (w1, w2), (0.2, 0.9, 0.6)):
        assert sum(c**2 for c in coefficients(weights, "unit")) == pytest.approx(1)
    assert coefficients((0.3,), "unit") == coefficients((0.3,), "paper")


def test_all_mixes_agree_on_orthogonal_latents_of_one_length() -> None:
    one, two = torch.zeros(2, *SHAPE).unbind(0)
    one[:, 0], two[:, 1] = 1.0, -1.0
    paper, unit, slerp = (aggregate(torch.stack([one, two]), (0.6,), mix) for mix in ("paper", "unit", "slerp"))
    torch.testing.assert_close(paper, 0.6 * one + 0.8 * two)
    torch.testing.assert_close(unit, paper)
    torch.testing.assert_close(slerp, paper)


def test_slerp_keeps_the_length_where_the_paper_adds_to_it() -> None:
    """Latents of models that started from one noise are nearly parallel."""
    one = noise(1)
    two = one + 0.2 * noise(2)
    long = aggregate(torch.stack([one, two]), (0.5,), "paper").flatten(1).norm(dim=1)
    kept = aggregate(torch.stack([one, two]), (0.5,), "slerp").flatten(1).norm(dim=1)
    lengths = torch.stack([one, two]).flatten(2).norm(dim=2)
    assert (long > 1.2 * lengths.amax(0)).all()
    assert (kept >= 0.99 * lengths.amin(0)).all()
    assert (kept <= lengths.amax(0)).all()
    torch.testing.assert_close(aggregate(torch.stack([one, one]), (0.5,), "slerp"), one)
    torch.testing.assert_close(aggregate(torch.stack([one, two]), (1.0,), "slerp"), one)
    torch.testing.assert_close(aggregate(torch.stack([one, two]), (0.0,), "slerp"), two)


def test_the_pull_is_equation_10_and_never_goes_beyond() -> None:
    mixed, mean = noise(1).double(), noise(2).double()
    away = mixed - mean
    for row in range(2):
        wanted = mixed[row] - 3.0 * away[row] / away[row].norm()
        torch.testing.assert_close(pulled(mixed, mean, 3.0 / SCALE)[row], wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pulled(mixed, mean, 1e6), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pulled(mixed, mean, "0.25x"), mixed - 0.25 * away, rtol=1e-5, atol=1e-6)
    assert torch.equal(pulled(mixed, mean, "auto"), pulled(mixed, mean, "0.3x"))
    assert torch.equal(pulled(mean, mean, 3.0), mean), "no direction, no pull, no NaN"


@pytest.mark.parametrize("mix", ["paper", "unit"])
@pytest.mark.parametrize("count", [2, 3])
def test_algorithm_2_written_out(mix: str, count: int) -> None:
    models = [Model(10 + i) for i in range(count)]
    weights, etas = (0.47, 0.5)[: count - 1], (4.5, 4.0, 3.5)[:count]
    found = run(models, Aggregation(weights, 3, mix, tuple(eta / SCALE for eta in etas)))
    alphas = scheduler().alphas_cumprod.double()
    times = [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    latents = [noise(0).double()] * count
    shares = coefficients(weights, mix)
    for index, t in enumerate(times):
        before = alphas[t]
        after = alphas[t - 100] if t >= 100 else torch.tensor(1.0, dtype=torch.float64)
        steps = []
        for model, x in zip(models if index < 3 else models[:1], latents, strict=False):
            eps = 0.3 * x + model.direction.double()
            x0 = (x - (1 - before).sqrt() * eps) / before.sqrt()
            steps.append(after.sqrt() * x0 + (1 - after).sqrt() * eps)
        if index < 3:
            mixed = sum(share * step for share, step in zip(shares, steps, strict=True))
            for i, (mean, eta) in enumerate(zip(steps, etas, strict=True)):
                away = mixed - mean
                length = away.flatten(1).norm(dim=1)[:, None, None, None]
                assert (eta < length).all(), "the guard against going beyond plays no part here"
                steps[i] = mixed - eta * away / length
        latents = steps
    torch.testing.assert_close(found.double(), latents[0], rtol=1e-4, atol=1e-4)


def test_helpers_are_asked_exactly_as_often_as_steps_are_shared() -> None:
    models, left = [Model(i) for i in range(3)], []
    run(models, Aggregation(steps=3), 50, finished=lambda: left.append(models[0].calls))
    assert [model.calls for model in models] == [50, 3, 3]
    assert left == [3], "they can leave memory before the fourth step"
    run(models, Aggregation(steps=3), 3, finished=lambda: left.append(-1))
    assert left == [3, -1], "also where all steps are shared"


def test_neutral_settings_are_the_first_model_alone() -> None:
    ddim = scheduler()
    *_, alone = sample(Model(5), ddim, noise(0), ddim.timesteps)
    for neutral in (Aggregation(steps=0), Aggregation(weights=(1.0,), mix="slerp"), Aggregation(eta=("1x",))):
        torch.testing.assert_close(run([Model(5), Model(6)], neutral), alone.latents, rtol=1e-5, atol=1e-5)
    shared = run([Model(5), Model(6)], Aggregation())
    assert not torch.allclose(shared, alone.latents, atol=1e-2)


def test_samples_do_not_see_their_batch_mates() -> None:
    models = [Model(5), Model(6)]
    both = run(models, PRESETS["paper"])
    torch.testing.assert_close(run(models, PRESETS["paper"], start=noise(0)[:1]), both[:1], rtol=1e-5, atol=1e-5)


def test_the_authors_way() -> None:
    """Their second step is the first that is shared, and means are those of the step before."""
    models = [Model(5), Model(6)]
    way = replace(PRESETS["authors"], steps=1, eta=(1.0,))
    ddim = scheduler()
    starts = [noise(0), noise(1)]
    events = list(sample_aggregated(models, ddim, starts, ddim.timesteps, way))
    assert models[1].calls == 2
    first = [ddim.step(0.3 * x + m.direction, 900, x).prev_sample for m, x in zip(models, starts, strict=True)]
    assert torch.equal(events[0].latents, first[0])
    second = [ddim.step(0.3 * x + m.direction, 800, x).prev_sample for m, x in zip(models, first, strict=True)]
    mixed = 0.5 * second[0] + math.sqrt(0.75) * second[1]
    stale = 0.3 * starts[0] + models[0].direction
    alpha, product = ddim.alphas[900], ddim.alphas_cumprod[900]
    mean = first[0] / alpha.sqrt() - (1 - alpha) / ((1 - product).sqrt() * alpha.sqrt()) * stale
    torch.testing.assert_close(events[1].latents, pulled(mixed, mean, 1.0), rtol=1e-5, atol=1e-5)


def test_a_length_means_the_same_at_every_size() -> None:
    """The paper's 45 is for SD1.5's latents; on small ones it would be the whole way, and nothing would be shared."""
    small, large = noise(1, 1, 16, 16, 16), noise(1, 1, 4, 64, 64)
    ways = [float((pulled(one, 0 * one, 45.0) - one).norm() / one.norm()) for one in (small, large)]
    assert ways[0] == pytest.approx(ways[1], rel=0.05)
    assert ways[1] == pytest.approx(45 / float(large.norm()), rel=1e-4)
    *_, alone = sample(Model(5), scheduler(), noise(0), scheduler().timesteps)
    for name, preset in PRESETS.items():
        if preset.noise == "shared":
            shared = run([Model(5 + i) for i in range(len(preset.eta))], preset)
            assert not torch.allclose(shared, alone.latents, atol=1e-2), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": (1.2,)}, "weights of an aggregation lie in 0..1, got 1.2"),
        ({"eta": ("1.2x",)}, r"a share such as 0\.5x, at most 1x, or auto; got '1\.2x'"),
        ({"eta": (float("nan"),)}, "got nan"),
        ({"eta": (-1.0,)}, "got -1"),
        ({"eta": ("half",)}, "got 'half'"),
        ({"mix": "sum"}, "unknown mix 'sum'"),
        ({"noise": "none"}, "unknown noise 'none' of an aggregation; there are shared, separate"),
        ({"mean": "last"}, "unknown mean 'last'"),
        ({"steps": -1}, "a whole number of steps, at least 0, got -1"),
        ({"steps": 2.5}, r"a whole number of steps, at least 0, got 2\.5"),
        ({"steps": 2, "sigma": 1.0}, "in steps or in sigma: give one of them"),
        ({"sigma": float("inf")}, "sigma of an aggregation is a positive number, got inf"),
    ],
)
def test_wrong_settings(settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Aggregation(**settings)


def test_what_does_not_fit() -> None:
    ddim = scheduler()
    with pytest.raises(UserError, match="UniPCMultistepScheduler would undo or misread: use ddim"):
        next(sample_aggregated([Model(1)] * 2, UniPCMultistepScheduler(), [noise(0)], ddim.timesteps, Aggregation()))
    with pytest.raises(UserError, match="1 starts for 2 models; give one each"):
        run([Model(1)] * 2, PRESETS["authors"])
    with pytest.raises(UserError, match="at least two models"):
        run([Model(1)], Aggregation())
    with pytest.raises(UserError, match=r"2 weights for 2 models; give one; recipes for 2 models are called "):
        run([Model(1)] * 2, Aggregation((0.5, 0.5)))
    with pytest.raises(UserError, match=r"2 etas for 3 models; .*; recipes for 3 models are called paper-three$"):
        run([Model(1)] * 3, PRESETS["paper"])
    with pytest.raises(UserError, match=r"2 weights for 5 models; give one, or 4$"):
        run([Model(1)] * 5, Aggregation((0.5, 0.5)))


def test_a_window_in_sigma_is_the_one_in_steps() -> None:
    """Shared while sigma_t is at least what is given: a sigma between the fourth step's and the third's is three."""
    ddim = scheduler()
    product = ddim.alphas_cumprod[ddim.timesteps]
    third, fourth = ((1 - product) / product).sqrt()[2:4].tolist()
    models = [Model(5), Model(6)]
    wanted = run(models, Aggregation(steps=3))
    models[1].calls = 0
    assert torch.equal(run(models, Aggregation(sigma=(third + fourth) / 2)), wanted)
    assert models[1].calls == 3, "and no call more"
    assert torch.equal(run(models, Aggregation(sigma=1.001 * third)), run(models, Aggregation(steps=2)))
    assert not Aggregation(sigma=0.1, mean="stale").shares(0, 10.0, (64, 64)), "no step is before the first"


def test_the_window_where_none_is_given() -> None:
    """The paper's at its size and number of steps, the same share of the noise at others, and never less than three."""
    ddim = scheduler()
    for count, size, wanted in ((50, (64, 64), 3), (50, (16, 16), 18), (50, (8, 32), 18), (10, (64, 64), 3),
                                (50, (128, 128), 3), (2, (64, 64), 2)):  # fmt: skip
        ddim.set_timesteps(count)
        found = [Aggregation().shares(one.index, one.sigma, size) for one in moments(ddim, ddim.timesteps)]
        assert found == [index < wanted for index in range(count)]
    models = [Model(5), Model(6)]
    run(models, Aggregation(), 50)
    assert models[1].calls == sum(Aggregation().shares(one.index, one.sigma, noise(0).shape[2:])
                                  for one in moments(scheduler(50), scheduler(50).timesteps))  # fmt: skip


def test_a_window_without_a_step_is_said() -> None:
    models = [Model(5), Model(6)]
    with pytest.raises(UserError, match=r"no step is shared: of \d+ the noisiest has a sigma of [\d.]+$"):
        run(models, Aggregation(sigma=1e6))
    with pytest.raises(UserError, match="with a stale mean the first is never shared"):
        run(models, Aggregation(mean="stale"), 1)


def test_settings_and_presets_as_text() -> None:
    assert Aggregation.parse("") == Aggregation()
    assert Aggregation.parse("paper") == Aggregation((0.5,), 3, "paper", (45.0, 55.0))
    assert Aggregation.parse("paper,sigma=4") == Aggregation((0.5,), None, "paper", (45.0, 55.0), 4.0)
    assert PRESETS["paper-three"].for_models(3) == ((0.47, 0.5), (45.0, 40.0, 35.0))
    authors = Aggregation.parse("authors, steps=5")
    assert (authors.noise, authors.mean, authors.mix, authors.steps) == ("separate", "stale", "paper", 5)
    found = Aggregation.parse("sigma=8,weights=0.47:0.5,eta=auto:0.4x:35,noise=separate")
    assert (found.sigma, found.weights, found.eta) == (8.0, (0.47, 0.5), ("auto", "0.4x", "35"))
    for text, said in (
        ("pape", "unknown aggregation 'pape'; there are paper, paper-style, paper-three, authors, and settings"),
        ("steps=3,paper", "unknown setting 'paper'"),
        ("steps=2.5", "steps cannot be '2.5'"),
        ("eta=1.5x", "at most 1x"),
        ("steps=1,sigma=1", "give one of them"),
    ):
        with pytest.raises(UserError, match=said):
            Aggregation.parse(text)


def test_noise_and_mean_are_settings_of_their_own() -> None:
    models = [Model(5), Model(6)]
    ddim = scheduler()
    starts = [noise(0), noise(1)]
    separate = list(sample_aggregated(models, ddim, starts, ddim.timesteps, Aggregation(steps=1, noise="separate")))
    assert models[1].calls == 1, "with its own mean the first step is shared"
    first = [ddim.step(0.3 * x + m.direction, 900, x).prev_sample for m, x in zip(models, starts, strict=True)]
    mixed = aggregate(torch.stack(first), (0.5,), "slerp")
    torch.testing.assert_close(separate[0].latents, 0.7 * mixed + 0.3 * first[0])
    list(sample_aggregated(models, ddim, starts[:1], ddim.timesteps, Aggregation(steps=1, mean="stale")))
    assert models[1].calls == 3, "one noise for all, and sharing begins with the second step"


def test_every_model_is_settled() -> None:
    seen: list[int] = []

    def settle(number: int) -> Callable:
        return lambda latents, _: seen.append(number) or latents

    run([Model(5), Model(6)], Aggregation(steps=2), 4, settles=[settle(0), settle(1)])
    assert seen == [0, 1, 0, 1, 0, 0]
