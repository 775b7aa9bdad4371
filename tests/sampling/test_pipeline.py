"""The pipeline: batches, seeds, pictures to start from, prompts, and what it refuses."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from counterpoint.fusion import FUSIONS
from counterpoint.sampling.arguments import BrokenPicture
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.prompt import PromptCut
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.types import Fusion, UserError
from tests.conftest import noise


@pytest.fixture
def pipe(parts: dict) -> Pipeline:
    networks = dict(zip(("pose", "seg"), parts["networks"], strict=True))
    return Pipeline(
        parts["vae"],
        parts["text_encoder"],
        parts["tokenizer"],
        parts["unet"],
        make_scheduler("unipc", parts["scheduler"].config),
        networks,
    )


HINTS = [noise((64, 64), sigma) for sigma in (40, 90)]
FAST = {"num_inference_steps": 3, "width": 64, "height": 64}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("scheduler", ["unipc", "euler-a"])
def test_alone_and_in_a_batch(pipe: Pipeline, scheduler: str) -> None:
    pipe.scheduler = make_scheduler(scheduler, dict(pipe.scheduler.config))
    batch = pipe("a person", HINTS, num_images_per_prompt=8, generator=seeded(*range(8)), **FAST).images
    for seed in (0, 5):
        alone = pipe("a person", HINTS, generator=seeded(seed), **FAST).images[0]
        assert np.abs(np.asarray(alone, int) - np.asarray(batch[seed], int)).max() <= 2


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name not in {"sum", "mean"}])
def test_every_rule_alone_and_in_a_batch(pipe: Pipeline, fusion: str) -> None:
    """In double precision: which of two equal numbers of opposite signs is larger, rounding decides."""
    pipe = deepcopy(pipe)
    for network in (pipe.unet, pipe.text_encoder, *pipe.controls.values()):
        network.double()
    subject = {"subject": "person"} if FUSIONS[fusion].keys else {}
    call = partial(pipe, "a person", HINTS, fusion=fusion, output_type="latent", **subject, **FAST)
    batch = call(num_images_per_prompt=3, generator=seeded(0, 1, 2)).images
    torch.testing.assert_close(call(generator=seeded(1)).images, batch[1:2], atol=1e-4, rtol=1e-4)


def test_keys_are_lent_where_the_subject_is(pipe: Pipeline) -> None:
    def run(**more: object) -> torch.Tensor:
        return pipe("a person", HINTS, generator=seeded(1), output_type="latent", **more, **FAST).images

    plain = run(fusion="pix+channel")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(run(fusion="cross"), plain)
    assert any("knows the subject" in str(warning.message) for warning in caught)
    lent = run(fusion="cross", subject="person")
    assert not torch.equal(lent, plain)
    assert torch.equal(run(fusion="cross", subject="person", foreground="pose"), lent), "the first is the foreground"
    assert not torch.equal(run(fusion="cross", subject="person", foreground="seg"), lent)
    left, right = (
        Image.fromarray(np.repeat([[255, 0], [0, 255]], 32, 1).astype(np.uint8)[[side] * 64]) for side in (0, 1)
    )
    masked = run(fusion="cross", subject_mask=left)
    assert not torch.equal(masked, plain)
    assert not torch.equal(masked, run(fusion="cross", subject_mask=right))


def test_the_rule_changes_with_the_schedule(pipe: Pipeline) -> None:
    def run(fusion: str, **more: object) -> torch.Tensor:
        return pipe("a person", HINTS, fusion=fusion, generator=seeded(1), output_type="latent", **more, **FAST).images

    assert torch.equal(run("0:pix,0.5:pix"), run("pix"))
    two = run("0:pix,0.5:sum")
    assert not torch.equal(two, run("pix"))
    assert not torch.equal(two, run("sum"))
    # of three steps, keys are lent in the second and third, or in the third only
    always, late = (run(name, subject="person") for name in ("cross", "0:pix+channel,0.6:cross"))
    assert not torch.equal(always, late)
    assert not torch.equal(late, run("pix+channel"))


def test_one_control_makes_every_rule_a_sum(parts: dict, pipe: Pipeline) -> None:
    pipe = replace(pipe, controls={"pose": parts["networks"][0]})
    call = partial(pipe, "a person", HINTS[:1], output_type="latent", **FAST)
    wanted = call(fusion="sum", generator=seeded(1)).images
    for fusion in FUSIONS.values():
        if fusion.inject is torch.add:
            assert torch.equal(call(fusion=fusion, generator=seeded(1)).images, wanted), fusion.name


def test_silence_is_gated_where_controls_meet_but_not_under_a_sum(parts: dict, pipe: Pipeline) -> None:
    lines = Image.new("RGB", (64, 64))
    lines.paste((255, 255, 255), (4, 4, 6, 20))
    alone = replace(pipe, controls={"pose": parts["networks"][0]})

    def run(pipe: Pipeline, hints: list[Image.Image], **more: object) -> torch.Tensor:
        return pipe("a person", hints, generator=seeded(1), output_type="latent", **more, **FAST).images

    for which, hints, more, gated in (
        (pipe, [lines, HINTS[1]], {}, True),
        (pipe, [lines, HINTS[1]], {"fusion": "0:sum,0.5:mean"}, True),
        (pipe, [lines, HINTS[1]], {"fusion": "sum"}, False),
        (alone, [lines], {}, False),
    ):
        made = run(which, hints, **more)
        assert torch.equal(made, run(which, hints, gate_silence=gated, **more))
        assert not torch.equal(made, run(which, hints, gate_silence=not gated, **more))


def test_a_control_without_weight_is_none(parts: dict, pipe: Pipeline) -> None:
    """Neither is it fused, nor does silence meet it; for each picture of a batch by itself."""
    lines = Image.new("RGB", (64, 64))
    lines.paste((255, 255, 255), (4, 4, 6, 20))

    def run(pipe: Pipeline, hints: list[Image.Image], *seeds: int, **more: object) -> torch.Tensor:
        prompts = ["a person"] * len(seeds)
        return pipe(prompts, hints, generator=seeded(*seeds), output_type="latent", **more, **FAST).images

    wanted = run(replace(pipe, controls={"pose": parts["networks"][0]}), [lines], 1)
    assert torch.equal(run(pipe, [lines, HINTS[1]], 1, controlnet_conditioning_scale=[1.0, "0:0,1:0"]), wanted)
    assert not torch.equal(run(pipe, [lines, HINTS[1]], 1), wanted)
    both = run(pipe, [lines, HINTS[1]], 0, 1, controlnet_conditioning_scale=[1.0, [1.0, 0.0]])
    torch.testing.assert_close(both[1:], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[:1], run(pipe, [lines, HINTS[1]], 0), atol=1e-4, rtol=1e-4)


def test_masks_gates_and_modes(pipe: Pipeline) -> None:
    white, black = (Image.new("L", (64, 64), shade) for shade in (255, 0))
    lines = Image.new("RGB", (64, 64))
    empty = Image.new("RGB", (64, 64))
    lines.paste((255, 255, 255), (4, 4, 6, 20))

    def run(hints: list[Image.Image] = HINTS, **more: object) -> torch.Tensor:
        return pipe("a person", hints, fusion="sum", generator=seeded(1), output_type="latent", **more, **FAST).images

    plain, without = run(), run(controlnet_conditioning_scale=[1, 0])
    assert torch.equal(run(control_mask=[None, white]), plain)
    assert torch.equal(run(control_mask=[None, black]), without), "a black mask is silence"
    assert not torch.equal(run(control_mask=[None, lines]), plain)
    # pose has a silent value, seg has none and always speaks
    quiet = run([empty, HINTS[1]], gate_silence=True)
    assert torch.equal(quiet, run([empty, HINTS[1]], controlnet_conditioning_scale=[0, 1]))
    assert not torch.equal(quiet, run([empty, HINTS[1]]))
    assert torch.equal(run([empty, HINTS[1]], gate_silence=True, control_mask=[white, None]), run([empty, HINTS[1]]))
    modes = [run(control_mode=mode) for mode in ("balanced", "prompt", "control")]
    assert torch.equal(modes[0], plain)
    assert not torch.equal(modes[1], plain)
    assert not torch.equal(modes[2], modes[1])
    unguided = [run(control_mode=mode, guidance_scale=1) for mode in ("prompt", "control")]
    assert torch.equal(*unguided), "without guidance there is no unconditional prediction to be absent from"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control_mode": "loud"}, "unknown control mode 'loud'; there are balanced, prompt, control"),
        ({"control_mask": [None]}, "1 values of control mask for 2 controls"),
        ({"control_mask": [None, Image.new("L", (90, 10))]}, "mask for seg is 90 x 10 and the picture 64 x 64"),
        ({"control_mask": [None, np.ones((10, 90))]}, "mask for seg is 90 x 10"),
        ({"control_mask": [torch.ones(1, 1, 9, 64), None]}, "mask for pose is 64 x 9"),
        ({"fusion": "cross", "subject_mask": Image.new("L", (90, 10))}, "subject mask is 90 x 10"),
    ],
)
def test_wrong_masks_and_modes(pipe: Pipeline, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe("a person", HINTS, **change, **FAST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "sum", "subject": "person"}, "lends no keys"),
        ({"subject": "ball"}, "'ball' is not in the prompt; its words are: a person"),
        ({"subject": "person", "foreground": "depth"}, "'depth' is no control; there are pose, seg"),
        ({"subject": ["person", "a"], "foreground": ["pose", "seg"]}, "needs one that is not"),
        ({"subject": ["person", "a"], "foreground": "pose"}, "2 subjects for 1 foregrounds"),
    ],
)
def test_what_cannot_be_lent(pipe: Pipeline, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe("a person", HINTS, **{"fusion": "cross", **change}, **FAST)


def test_branches_side_by_side_cannot_share_a_network(parts: dict, pipe: Pipeline) -> None:
    pipe = replace(pipe, controls=dict.fromkeys(("pose", "pose:two"), parts["networks"][0]))
    with pytest.raises(UserError, match="cannot share one network"):
        pipe("a person", HINTS, fusion="cross-authors", subject="person", **FAST)


def test_image_to_image_with_a_vae_that_draws(parts: dict, pipe: Pipeline) -> None:
    """Each picture is drawn from the VAE's distribution with its own generator: alone as in a batch."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, **kinds).eval()
    pipe = replace(pipe, vae=vae)
    call = partial(pipe, "a person", HINTS, image=HINTS[0], strength=0.5, output_type="latent", **FAST)
    batch = call(num_images_per_prompt=3, generator=seeded(0, 1, 2)).images
    torch.testing.assert_close(call(generator=seeded(1)).images, batch[1:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_image": HINTS[0]}, "there is no image"),
        ({"image": torch.rand(3, 3, 64, 64), "num_images_per_prompt": 2}, "3 start pictures and 2 pictures"),
        ({"image": HINTS[0], "mask_image": torch.ones(3, 1, 64, 64)}, "3 mask images and 1 pictures"),
        ({"prompt": ["a person", '("a person", "on meadow").and()']}, "cannot share a batch"),
    ],
)
def test_what_does_not_go_together(pipe: Pipeline, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(**{"prompt": "a person", "control_image": HINTS, **change}, **FAST)


def test_no_negative_prompt_is_an_empty_one(pipe: Pipeline) -> None:
    none, empty = (
        pipe("a person", HINTS, negative_prompt=text, generator=seeded(1), output_type="latent", **FAST).images
        for text in (None, "")
    )
    assert torch.equal(none, empty)


def test_one_prompt_an_image(pipe: Pipeline) -> None:
    both = pipe(["a person", "a red ball"], HINTS, generator=seeded(1, 2), output_type="pt", **FAST).images
    second = pipe("a red ball", HINTS, generator=seeded(2), output_type="pt", **FAST).images
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=0)


def test_one_control_image_a_prompt(pipe: Pipeline) -> None:
    """Each picture keeps its own control images, also with several pictures a prompt."""
    own = [torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    prompts = ["a person", "a red ball"]
    both = pipe(prompts, own, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), output_type="pt", **FAST).images
    fourth = pipe(prompts[1], [one[1:] for one in own], generator=seeded(4), output_type="pt", **FAST).images
    torch.testing.assert_close(both[3:], fourth, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="2 images for the control"):
        pipe(["a person"] * 3, own, **FAST)


def test_diffusers_spelling_of_control_images(pipe: Pipeline) -> None:
    ours = pipe("a person", HINTS, generator=seeded(1), output_type="latent", **FAST).images
    theirs = pipe("a person", image=HINTS, generator=seeded(1), output_type="latent", **FAST).images
    assert torch.equal(ours, theirs)


def test_weight_schedule_and_custom_rule(pipe: Pipeline) -> None:
    seen = []

    def combine(features: torch.Tensor) -> torch.Tensor:
        seen.append(len(features))
        return features.amax(0)

    pipe(
        "a person",
        HINTS,
        fusion=Fusion("loudest", "", combine),
        controlnet_conditioning_scale=["0:1,0.4:0", 1.0],
        generator=seeded(1),
        **FAST,
    )
    assert set(seen) == {1, 2}


def test_inpainting_keeps_what_is_not_masked(pipe: Pipeline) -> None:
    start = noise((64, 64), 90)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    result = pipe(
        "a person", HINTS, image=start, mask_image=mask, strength=1.0, generator=seeded(1), output_type="latent", **FAST
    ).images
    clean = pipe.encode(pipe.pixels.pictures.preprocess(start, height=64, width=64))
    torch.testing.assert_close(result[..., :4], clean[..., :4])
    assert (result[..., 4:] - clean[..., 4:]).abs().max() > 0.1


def test_callback_sees_and_replaces(pipe: Pipeline) -> None:
    seen = []

    def callback(
        _: Pipeline, index: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        seen.append(index)
        return {"latents": torch.zeros_like(values["latents"])}

    result = pipe(
        "a person", HINTS, generator=seeded(1), callback_on_step_end=callback, output_type="latent", **FAST
    ).images
    assert seen == [0, 1, 2]
    assert not result.any()


def test_weighted_and_long_prompts(pipe: Pipeline) -> None:
    plain = pipe("a red ball", HINTS, generator=seeded(1), output_type="latent", **FAST).images
    heavier = pipe("a red++ ball", HINTS, generator=seeded(1), output_type="latent", **FAST).images
    longer = pipe(
        '("a red ball on a meadow", "a person on a meadow").and()',
        HINTS,
        generator=seeded(1),
        output_type="latent",
        **FAST,
    ).images
    assert not torch.equal(plain, heavier)
    assert not torch.equal(plain, longer)
    assert torch.isfinite(longer).all()


def test_too_long_a_prompt_names_what_it_lost(pipe: Pipeline) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptCut)
        pipe("red " * 22 + "meadow meadow", HINTS, generator=seeded(1), **FAST)
    said = [str(warning.message) for warning in caught if warning.category is PromptCut]
    assert len(said) == 1
    assert '"meadow meadow"' in said[0]


def test_a_prompt_that_fits_is_not_warned_about(pipe: Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptCut)
        pipe("red " * 22, HINTS, generator=seeded(1), **FAST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control_image": HINTS[:1]}, "1 control images for 2 controls"),
        ({"controlnet_conditioning_scale": [1.0]}, "1 values of weight for 2 controls"),
        ({"control_guidance_start": [0.0]}, "1 values of start for 2 controls"),
        ({"control_guidance_start": 0.8, "control_guidance_end": 0.2}, "window of pose"),
        ({"controlnet_conditioning_scale": float("nan")}, "finite"),
        ({"num_inference_steps": 0}, "steps must be at least 1"),
        ({"width": 60}, "multiple of 8"),
        ({"strength": 0.0}, "strength"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts"),
        ({"generator": seeded(1, 2, 3)}, "3 generators"),
        ({"fusion": "best"}, "unknown fusion"),
        ({"num_inference_steps": 2000}, "at most the 1000"),
        ({"num_images_per_prompt": 0}, "images a prompt must be at least 1"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, "latents are"),
    ],
)
def test_arguments_that_do_not_fit(pipe: Pipeline, change: dict, message: str) -> None:
    arguments = {"control_image": HINTS, **FAST, **change}
    with pytest.raises(UserError, match=message):
        pipe("a person", **arguments)


@pytest.mark.parametrize(("name", "steps"), [("lcm", 60), ("pndm", 2)])
def test_steps_that_a_scheduler_cannot_make(pipe: Pipeline, name: str, steps: int) -> None:
    config = {"num_train_timesteps": 1000, "beta_start": 0.001, "beta_end": 0.012}
    pipe = replace(pipe, scheduler=make_scheduler(name, config))
    with pytest.raises(UserError, match=f"cannot sample in {steps} steps"):
        pipe("a person", HINTS, **{**FAST, "num_inference_steps": steps})


@pytest.mark.parametrize("name", ["x", "Pipeline", "UNet2DConditionModel", ""])
def test_unknown_scheduler(name: str) -> None:
    with pytest.raises(UserError, match="unknown scheduler"):
        make_scheduler(name, {})


WEIGHTS = [[1.0, 0.4, "0:1,0.5:0.2", 0.0], [0.7, 0.7, 1.3, 0.7]]
ENDS = [[1.0, 0.5, 1.0, 1.0], 1.0]


@pytest.mark.parametrize("fusion", ["sum", "mean", "pix", "maxfusion", "minimal-impact"])
def test_pictures_of_a_batch_have_weights_and_windows_of_their_own(pipe: Pipeline, fusion: str) -> None:
    call = partial(pipe, "a person", HINTS, fusion=fusion, output_type="latent", **FAST)
    batch = call(
        num_images_per_prompt=4,
        generator=seeded(*range(4)),
        controlnet_conditioning_scale=WEIGHTS,
        control_guidance_end=ENDS,
    ).images
    for place in range(4):
        alone = call(
            generator=seeded(place),
            controlnet_conditioning_scale=[weights[place] for weights in WEIGHTS],
            control_guidance_end=[ENDS[0][place], 1.0],
        ).images
        torch.testing.assert_close(alone[0], batch[place], atol=1e-4, rtol=1e-4)


def test_settings_of_the_wrong_number_are_said(pipe: Pipeline) -> None:
    with pytest.raises(UserError, match="2 settings of pose for 1 pictures"):
        pipe("a person", HINTS, controlnet_conditioning_scale=[[1.0, 0.5], 1.0], **FAST)
    with pytest.raises(UserError, match="hear the same controls at a step"):
        pipe(
            "a person", HINTS, num_images_per_prompt=2, controlnet_conditioning_scale=[[1.0, 0.0], 1.0], report=True,
            **FAST,
        )  # fmt: skip


def test_a_picture_of_no_numbers_is_told_of(pipe: Pipeline) -> None:
    """Here by a rule of one's own; in half precision a model may do it by itself."""
    rules = {"broken": lambda features: features.sum(0) / 0, "sum": "sum"}
    for name, fusion in rules.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BrokenPicture)
            pipe("a person", HINTS, fusion=fusion, output_type="latent", **FAST)
        told = [str(one.message) for one in caught if one.category is BrokenPicture]
        assert len(told) == (name == "broken")
        assert all("1 of 1 pictures" in one for one in told)
