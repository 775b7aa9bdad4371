"""Quality levels: exact is what it was, the others stay near and say what they saved, whoever sits beside a picture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

import counterpoint
from counterpoint.control.reuse import Line, Reuse, relative
from counterpoint.data.pairs import conflicting
from counterpoint.sampling.economy import ENCODER, LOOSER, QUALITIES, Economy
from counterpoint.sampling.pipeline import Output, Pipeline
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.types import Moment, UserError
from tests.conftest import noise

STEPS = 12
HINTS = [[noise((64, 64), 30 + 20 * i + 9 * k) for i in range(2)] for k in range(2)]


@pytest.fixture
def pipe(parts: dict) -> Pipeline:
    networks = dict(zip(("pose", "seg"), parts["networks"], strict=True))
    scheduler = make_scheduler("unipc", parts["scheduler"].config)
    return Pipeline(parts["vae"], parts["text_encoder"], parts["tokenizer"], parts["unet"], scheduler, networks)


def run(pipe: Pipeline, pictures: list[int], **more: object) -> Output:
    return pipe(
        ["a person", "a red ball"][: len(pictures)] if pictures == [0, 1] else ["a red ball"],
        [[hints[i] for i in pictures] for hints in HINTS],
        generator=[torch.Generator().manual_seed(i) for i in pictures],
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        width=64,
        height=64,
        output_type="latent",
        **more,
    )


def test_estimates_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tiny family's networks are foretold to say is computed beside it. Without caution the truth would
    lie above the estimate more often than not."""
    found, ask = [], Reuse.ask

    def beside(reuse: Reuse, name: str, time: float, rows: list[int], compute: object) -> list[torch.Tensor]:
        line = reuse._lines.get(name) or Line(reuse.rows)
        estimates = line.error(time, rows)
        answers = ask(reuse, name, time, rows, compute)
        missed = relative(answers, compute(list(range(len(rows)))))
        found.extend((*one, reuse.bound) for one in zip(estimates.tolist(), missed.tolist(), strict=True))
        return answers

    monkeypatch.setattr(Reuse, "ask", beside)
    case, pipe = conflicting(0), counterpoint.load("tiny", ["pose", "seg"])
    pictures = [Image.fromarray(image) for image in case.images.values()]
    pipe(case.prompt, pictures, generator=torch.manual_seed(0), quality="balanced", output_type="latent")
    foretold = [one for one in found if one[0] <= one[2]]
    assert len(foretold) > 20
    assert {bound for *_, bound in foretold} == {QUALITIES["balanced"].bound, LOOSER * QUALITIES["balanced"].bound}
    assert sum(missed > estimate for estimate, missed, _ in foretold) < 0.3 * len(foretold)
    assert sum(missed > bound for _, missed, bound in foretold) <= 0.1 * len(foretold)


def test_guidance_is_held_and_wrong_by_what_it_last_changed() -> None:
    economy = Economy(QUALITIES["balanced"], 1, guided=True)
    for index, value in enumerate((1.0, 2.0, 4.0, 8.0)):
        economy.learn(Moment(index, 20, torch.tensor(900 - 50 * index)), torch.full((1, 4, 8, 8), value))
    assert economy.skips_guidance(Moment(4, 20, torch.tensor(700)))
    assert torch.equal(economy.difference(), torch.full((1, 4, 8, 8), 8.0)), "a line through the last two would say 12"
    assert economy.thrift["guidance"].error == 0.5


@pytest.mark.parametrize("fusion", ["sum", "pix"])
def test_what_is_foretold_is_near_and_said(pipe: Pipeline, fusion: str) -> None:
    exact = run(pipe, [0, 1], fusion=fusion)
    assert exact.thrift == ()
    assert torch.equal(run(pipe, [0, 1], fusion=fusion, quality="exact").images, exact.images)
    near = run(pipe, [0, 1], fusion=fusion, quality="balanced")
    (saved,) = near.thrift
    assert set(saved) == {"pose", "seg", ENCODER, "guidance"}
    assert saved["guidance"].asked == 2 * (3 + 5)
    for name in ("pose", "seg", ENCODER):
        assert saved[name].share < 1
        assert saved[name].error <= 0.4
    assert saved[ENCODER].asked >= 2 * saved["guidance"].asked, "of both halves, wherever guidance multiplies errors"
    difference = (near.images - exact.images).norm() / exact.images.norm()
    assert 0 < difference < 0.1


def test_a_scheduler_that_asks_twice_at_one_time(pipe: Pipeline) -> None:
    pipe = replace(pipe, scheduler=make_scheduler("heun", pipe.scheduler.config))
    exact, near = run(pipe, [0, 1]), run(pipe, [0, 1], quality="balanced")
    (saved,) = near.thrift
    assert all(0 < one.share < 1 and 0 < one.error < float("inf") for one in saved.values())
    assert 0 < (near.images - exact.images).norm() / exact.images.norm() < 0.1


def test_two_answers_at_one_time_tell_what_the_second_would_miss() -> None:
    line = Line(2)
    for time, first, second in ((3.0, 1.0, 1.1), (2.0, 2.0, 2.0), (1.0, 4.0, None)):
        for value in (first, second):
            if value is not None:
                line.learn(time, [0, 1], [torch.tensor([[value], [first]])])
    of_one, of_other = line.error(1.0, [0, 1]).tolist()
    assert of_one == pytest.approx(2 * 0.5 * 0.1 / 1.1)  # twice what was missed, of which half was forgotten
    assert of_other == 0


def test_a_picture_is_the_same_alone(pipe: Pipeline) -> None:
    both, alone = run(pipe, [0, 1], quality="fast").images, run(pipe, [1], quality="fast").images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_windows_weights_and_single_pictures_go_together(pipe: Pipeline) -> None:
    """Pictures of one batch with controls of their own."""
    own = {
        "control_guidance_end": [[1.0, 0.5], 1.0],
        "controlnet_conditioning_scale": [1.0, [0.5, "0:1,0.5:0.4"]],
    }
    both = run(pipe, [0, 1], quality="balanced", **own).images
    alone = run(
        pipe,
        [1],
        quality="balanced",
        control_guidance_end=[0.5, 1.0],
        controlnet_conditioning_scale=[1.0, "0:1,0.5:0.4"],
    ).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_hints_are_encoded_once_for_all_parts_of_a_batch(pipe: Pipeline) -> None:
    """For the half that is asked where guidance is held, and for rows that are asked alone."""
    encoded: list[int] = []
    for network in pipe.controls.values():
        network.controlnet_cond_embedding.register_forward_hook(lambda _, __, made: encoded.append(len(made)))
    (saved,) = run(pipe, [0, 1], quality="balanced").thrift
    assert saved["pose"].share < 1
    assert encoded == [4, 4]


def test_without_guidance_networks_are_foretold(pipe: Pipeline) -> None:
    found = pipe("a person", [hints[0] for hints in HINTS], generator=torch.manual_seed(0), guidance_scale=1.0,
                 num_inference_steps=STEPS, width=64, height=64, output_type="latent", quality="balanced")  # fmt: skip
    assert set(found.thrift[0]) == {"pose", "seg", ENCODER}
    assert all(one.share < 1 and one.error <= 0.2 for one in found.thrift[0].values())


def test_branches_that_lend_keys_run_at_every_step(pipe: Pipeline) -> None:
    mask = Image.new("L", (64, 64), 255)
    (saved,) = run(pipe, [0, 1], fusion="cross", subject_mask=mask, quality="balanced").thrift
    assert set(saved) == {"guidance"}


def test_there_is_no_other_quality(pipe: Pipeline) -> None:
    with pytest.raises(UserError, match="there are exact, balanced, fast"):
        run(pipe, [0, 1], quality="best")
