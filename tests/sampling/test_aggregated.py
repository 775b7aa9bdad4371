"""Whole models with adapters, alone and together: stock diffusers at the seams, and nothing but the first's picture."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionGLIGENPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import counterpoint
from counterpoint.conditions.layout import Instance, Interaction, Layout, Reference
from counterpoint.models.gligen import fuser_state, with_fusers
from counterpoint.models.interact import InteractionEmbedding
from counterpoint.models.ip_adapter import attention_names, load_ip_adapter
from counterpoint.models.migc import instance_state, with_instances
from counterpoint.sampling import pipeline
from counterpoint.sampling.aggregated import come_back, leave, own_tensors
from counterpoint.sampling.amdm import PRESETS
from counterpoint.sampling.arguments import all_layouts
from counterpoint.sampling.guides import Adapter, Unseen
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.prompt import PromptCut, PromptEncoder
from counterpoint.sampling.schedulers import SCHEDULERS, make_scheduler
from counterpoint.types import UserError
from tests.conftest import noise

FAST = {"num_inference_steps": 10, "width": 64, "height": 64, "guidance_scale": 4.0, "output_type": "latent"}
THINGS = (Instance("a person", (0.0, 0.1, 0.5, 0.9)), Instance("a red ball", (0.5, 0.5, 1.0, 1.0)))
STYLE = noise((40, 40), 60)
LAYOUT = Layout(THINGS, (Interaction(0, "kicking", 1),), Reference(np.asarray(STYLE), 0.7))
HINT = noise((64, 64), 60)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def trained(state: dict[str, torch.Tensor], size: float = 0.3) -> None:
    torch.manual_seed(3)
    for value in state.values():
        value.copy_(size * torch.randn_like(value))


@pytest.fixture(scope="module")
def encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=24,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture
def make(parts: dict, tmp_path: Path, encoder: CLIPVisionModelWithProjection) -> Callable[[str | None], Pipeline]:
    """A model with an adapter of a kind, on the same UNet."""

    def made(kind: str | None = None, **more: object) -> Pipeline:
        unet: UNet2DConditionModel = parts["unet"]
        text, adapter = unet.config.cross_attention_dim, None if kind is None else Adapter(kind)
        if kind == "interact":
            unet = with_fusers(unet, InteractionEmbedding(text, text, 3))
            trained(fuser_state(unet))
        elif kind == "gligen":
            unet = with_fusers(unet, GLIGENTextBoundingboxProjection(text, text))
            trained(fuser_state(unet))
        elif kind == "migc":
            unet = with_instances(unet, ("mid_block.attentions.0",))
            trained(instance_state(unet))
        elif kind == "ip-adapter":
            save_file(pictured(unet), tmp_path / "style.safetensors")
            unet = load_ip_adapter(unet, tmp_path / "style.safetensors")
            adapter = Adapter(kind, encoder, processor())
        scheduler = make_scheduler("ddim", parts["scheduler"].config)
        return Pipeline(
            parts["vae"], parts["text_encoder"], parts["tokenizer"], unet, scheduler, adapter=adapter, **more
        )

    return made


def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def pictured(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    text = unet.config.cross_attention_dim
    return {
        **{name: 0.5 * torch.randn_like(value) for name, value in attention_names(unet).items()},
        "image_proj.proj.weight": torch.randn(4 * text, 24),
        "image_proj.proj.bias": torch.randn(4 * text),
        "image_proj.norm.weight": torch.ones(text),
        "image_proj.norm.bias": torch.zeros(text),
    }


def stock(parts: dict, unet: UNet2DConditionModel, kind: type, **more: object) -> object:
    made = kind(
        vae=parts["vae"], text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"], unet=unet,
        scheduler=DDIMScheduler.from_config(parts["scheduler"].config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **more,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def test_gligen_is_the_stock_pipeline(parts: dict, make: Callable) -> None:
    ours = make("gligen")
    found = ours("a person", layout=LAYOUT, generator=seeded(0), **FAST).images
    theirs = stock(parts, ours.unet, StableDiffusionGLIGENPipeline)
    wanted = theirs(
        "a person",
        gligen_phrases=[one.phrase for one in THINGS],
        gligen_boxes=[list(one.box) for one in THINGS],
        gligen_scheduled_sampling_beta=0.3,
        generator=torch.Generator().manual_seed(0),
        **FAST,
    ).images
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    theirs.enable_fuser(True)
    plain = make()("a person", generator=seeded(0), **FAST).images
    assert not torch.allclose(found, plain, atol=1e-2)


def test_an_ip_adapter_is_the_stock_pipeline(
    parts: dict, make: Callable, encoder: CLIPVisionModelWithProjection
) -> None:
    ours = make("ip-adapter")
    found = ours("a person", layout=LAYOUT, generator=seeded(0), **FAST).images
    theirs = stock(parts, ours.unet, StableDiffusionPipeline, image_encoder=encoder)
    theirs.feature_extractor = processor()
    theirs.set_ip_adapter_scale(0.7)
    wanted = theirs("a person", ip_adapter_image=STYLE, generator=torch.Generator().manual_seed(0), **FAST).images
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    nowhere = Layout(reference=Reference(LAYOUT.reference.image, 1.0, np.zeros((5, 5, 3), np.uint8)))
    theirs.set_ip_adapter_scale(1.0)
    silent = ours("a person", layout=nowhere, generator=seeded(0), **FAST).images
    torch.testing.assert_close(silent, make()("a person", generator=seeded(0), **FAST).images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["interact", "gligen", "migc", "ip-adapter"])
def test_layouts_alone_and_in_a_batch(make: Callable, kind: str) -> None:
    other = Layout((THINGS[1],), (), Reference(np.asarray(STYLE.rotate(90)), 0.2))
    pipe = make(kind)
    both = pipe(["a person", "a ball"], layout=[LAYOUT, other], generator=seeded(0, 1), **FAST).images
    for place, (prompt, layout) in enumerate((("a person", LAYOUT), ("a ball", other))):
        alone = pipe(prompt, layout=layout, generator=seeded(place), **FAST).images
        torch.testing.assert_close(alone[0], both[place], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(both[0], pipe("a person", layout=other, generator=seeded(0), **FAST).images[0], atol=1e-2)


def test_what_helpers_find_reaches_the_picture_and_only_through_the_shared_steps(make: Callable) -> None:
    first, helper = make("interact"), make("migc")
    call = {"layout": LAYOUT, "generator": seeded(0), **FAST}
    alone = first("a person", **call).images
    for steps, weights, same in ((0, 0.5, True), (3, 1.0, False), (3, 0.5, False)):
        both = counterpoint.aggregate([first, helper], weights, steps)
        found = both("a person", **{**call, "generator": seeded(0)}).images
        assert torch.equal(found, alone) == same, (steps, weights)
    assert torch.equal(first("a person", **{**call, "generator": seeded(0)}).images, alone), "the parts are untouched"
    twins = counterpoint.aggregate([first, make("interact")], 0.5, 3)
    torch.testing.assert_close(
        twins("a person", **{**call, "generator": seeded(0)}).images, alone, atol=1e-4, rtol=1e-4
    )


def test_helpers_are_asked_in_the_shared_steps_only(make: Callable) -> None:
    models = [make("interact"), make("migc"), make("ip-adapter")]
    counts = [0, 0, 0]

    def counting(place: int) -> Callable:
        def hook(*_: object) -> None:
            counts[place] += 1

        return hook

    handles = [one.unet.register_forward_pre_hook(counting(place)) for place, one in enumerate(models)]
    try:
        counterpoint.aggregate(models, (0.47, 0.5), 3)("a person", layout=LAYOUT, generator=seeded(0), **FAST)
    finally:
        for handle in handles:
            handle.remove()
    assert counts == [10, 3, 3]


def test_stacks_of_controls_work_together_with_adapters(parts: dict, make: Callable) -> None:
    pose, seg = parts["networks"]
    stack, grounded = make(controls={"pose": pose, "seg": seg}), make("interact")
    for models in ([grounded, stack], [stack, grounded]):
        both = counterpoint.aggregate(models, 0.5, 3)
        assert both.labels == ["pose", "seg"]
        call = {"layout": LAYOUT, "fusion": "pix", "control_image": [HINT, HINT.rotate(90)], **FAST}
        found = both("a person", generator=seeded(0), **call).images
        weaker = both("a person", controlnet_conditioning_scale=[0.0, 0.5], generator=seeded(0), **call).images
        assert not torch.allclose(found, weaker, atol=1e-3)
    with pytest.raises(UserError, match="no model has every control"):
        counterpoint.aggregate([make(controls={"pose": pose}), make(controls={"seg": seg})], 0.5, 3)(
            "a person", [HINT, HINT], fusion="cross", subject="person", **FAST
        )


def test_helpers_leave_and_come_back(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator nothing can move: that what would move is the helper's own."""
    first, helper = make("interact"), make("migc")
    moved = own_tensors([helper], first)
    assert {tensor.data_ptr() for tensor in moved} == {
        value.data_ptr() for value in instance_state(helper.unet).values()
    }
    painter = make("ip-adapter")
    read = {tensor.data_ptr() for tensor in painter.adapter.image_encoder.parameters()}
    assert read <= {tensor.data_ptr() for tensor in own_tensors([painter], first)}, "also what reads its reference"
    with monkeypatch.context() as patch:
        patch.setattr("counterpoint.sampling.aggregated.own_tensors", None)
        leave([helper], first), come_back([helper], first)  # on a CPU nothing is so much as looked for
    sent: list[tuple[int, str]] = []
    monkeypatch.setattr(Pipeline, "device", torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "to", lambda one, place: sent.append((one.data_ptr(), str(place))) or one)
    leave([helper], first), come_back([helper], first)
    assert sent == [(tensor.data_ptr(), place) for place in ("cpu", "meta") for tensor in moved]


def test_what_models_read_alike_is_read_once(make: Callable, parts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    both, read = counterpoint.aggregate([make("interact"), make("migc")], 0.5, 3), []
    handle = parts["text_encoder"].register_forward_hook(lambda *_: read.append(1))
    try:
        found = both("a person", layout=LAYOUT, generator=seeded(0), **FAST).images
        assert len(read) == 3, "prompts, negative prompts, phrases"
        monkeypatch.setattr(PromptEncoder, "__eq__", lambda *_: False)
        apart = both("a person", layout=LAYOUT, generator=seeded(0), **FAST).images
        assert len(read) == 3 + 6
    finally:
        handle.remove()
    torch.testing.assert_close(found, apart, atol=1e-6, rtol=1e-6)
    other = replace(make("migc"), text_encoder=copy.deepcopy(parts["text_encoder"]))
    assert other.prompt_encoder() != both.prompt_encoder(), "one of its own reads for itself"


def test_too_long_a_phrase_is_named(make: Callable) -> None:
    things = (Instance("a ball " + "red " * 22 + "meadow", (0, 0, 1, 1)), THINGS[0])
    both = counterpoint.aggregate([make("interact"), make("migc")], 0.5, 1)
    with pytest.warns(PromptCut) as caught:
        both("a person", layout=Layout(things), **{**FAST, "num_inference_steps": 1})
    assert [str(one.message) for one in caught if one.category is PromptCut] == [
        'the phrase "a ball red red red red red red red red r..." is longer than the 22 tokens this model reads, so '
        'this was cut: "red red meadow"; shorten it'
    ]


@pytest.mark.filterwarnings("error::counterpoint.sampling.guides.Unseen")
def test_a_thing_that_is_too_small_for_migc_is_named(make: Callable) -> None:
    """The others read a box as numbers, so it is no mistake."""
    small = Layout((THINGS[0], Instance("a red ball", (0.5, 0.5, 0.54, 0.9))))
    call = {**FAST, "num_inference_steps": 1, "layout": small}
    make("interact")("a person", **call)
    with pytest.raises(Unseen, match=r"the box of 'a red ball' is too small for migc to see at 64 x 64 pixels: make"):
        make("migc")("a person", **call)
    make("migc")("a person", **{**call, "layout": LAYOUT})


def test_helpers_are_back_when_a_call_ends(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it ends badly: a helper that was left on another device would be broken alone."""
    events: list[str] = []
    monkeypatch.setattr("counterpoint.sampling.pipeline.leave", lambda *_: events.append("leave"))
    monkeypatch.setattr("counterpoint.sampling.pipeline.come_back", lambda *_: events.append("back"))
    both = counterpoint.aggregate([make("interact"), make("migc")], 0.5, 1)
    call = {"layout": LAYOUT, **FAST, "num_inference_steps": 2}
    both("a person", generator=seeded(0), **call)
    assert events == ["leave", "back"]

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both("a person", generator=seeded(0), callback_on_step_end=fail, **call)
    assert events[-1] == "back"


def test_starts_of_separate_noise_lie_where_the_picture_is_taken_up(
    make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image-to-image: every helper starts from the picture and its own noise, and keeps what is not repainted."""
    seen: dict = {}
    plain = pipeline.sample_aggregated

    def watched(denoisers: object, scheduler: object, starts: list, *rest: object, **more: object) -> object:
        seen.update(starts=starts, settles=more["settles"])
        return plain(denoisers, scheduler, starts, *rest, **more)

    monkeypatch.setattr(pipeline, "sample_aggregated", watched)
    both = counterpoint.aggregate([make("interact"), make("migc")], **vars(PRESETS["authors"]))
    call = {"layout": LAYOUT, **FAST, "image": STYLE.resize((64, 64)), "strength": 0.2}
    both("a person", generator=seeded(0), mask_image=Image.new("L", (64, 64)), **call)
    first, second = seen["starts"]
    noisy = (1 - both.scheduler.alphas_cumprod[both.scheduler.timesteps[-2]]).sqrt()
    assert (first - second).std() == pytest.approx(math.sqrt(2) * float(noisy), rel=0.15), "one picture, two noises"
    assert len(seen["settles"]) == 2
    assert all(seen["settles"])


def test_what_cannot_be_aggregated_is_said(make: Callable, parts: dict) -> None:
    first = make("interact")
    with pytest.raises(UserError, match="at least two models, got 1"):
        counterpoint.aggregate([first])
    with pytest.raises(UserError, match="2 weights for 2 models"):
        counterpoint.aggregate([first, first], (0.5, 0.5))
    other = make("migc")
    other.scheduler = DDIMScheduler.from_config(parts["scheduler"].config, prediction_type="v_prediction")
    with pytest.raises(UserError, match="noise schedule: prediction_type v_prediction where the first has epsilon"):
        counterpoint.aggregate([first, other])
    other.scheduler = DDIMScheduler.from_config(parts["scheduler"].config, beta_end=0.02)
    with pytest.raises(UserError, match=r"beta_end 0\.02 where the first has 0\.012"):
        counterpoint.aggregate([first, other])
    hasty = replace(first, scheduler=make_scheduler("unipc", parts["scheduler"].config))
    with pytest.raises(UserError, match="UniPCMultistepScheduler would undo or misread: load the first model with"):
        counterpoint.aggregate([hasty, first])
    same = copy.deepcopy(parts["vae"])
    counterpoint.aggregate([first, replace(first, vae=same)])
    for name, value in same.named_parameters():
        value.data += name.startswith("decoder")
    counterpoint.aggregate([first, replace(first, vae=same)])
    for name, value in same.named_parameters():
        value.data += name.startswith("encoder")
    with pytest.raises(UserError, match="the encoders of their VAEs have other weights"):
        counterpoint.aggregate([first, replace(first, vae=same)])
    half = replace(first, unet=copy.deepcopy(first.unet).bfloat16())
    with pytest.raises(UserError, match=r"torch\.bfloat16 where the first has torch\.float32: load both with the"):
        counterpoint.aggregate([first, half])
    far = replace(first, unet=copy.deepcopy(first.unet).to("meta"))
    with pytest.raises(UserError, match="another device: meta where the first has cpu"):
        counterpoint.aggregate([first, far])
    with pytest.raises(UserError, match=r"model 2 is a str; pipelines of counterpoint\.load are aggregated"):
        counterpoint.aggregate([first, "base"])
    inner = counterpoint.aggregate([first, make("migc")])
    assert len(counterpoint.aggregate([make(), inner]).models) == 3, "an aggregate counts as its models"
    with pytest.raises(UserError, match="has an adapter already"):
        first.adapted("style")
    with pytest.raises(UserError, match="interact reads a layout, and there is none"):
        first("a person", **FAST)
    with pytest.raises(UserError, match="nothing here reads a layout"):
        make()("a person", layout=LAYOUT, **FAST)
    for wrong, kind in (({"instances": []}, "dict"), ("layout.json", "str"), ([LAYOUT, Path()], "PosixPath")):
        with pytest.raises(UserError, match=f"a layout is what read_layout or Layout makes, got a {kind}"):
            all_layouts(wrong, 2)
    with pytest.raises(UserError, match="2 layouts for 1 pictures"):
        first("a person", layout=[LAYOUT, LAYOUT], **FAST)
    with pytest.raises(UserError, match="reads a layout's instances, and there are none"):
        first("a person", layout=Layout(reference=LAYOUT.reference), **FAST)
    with pytest.raises(UserError, match="reads a layout's reference picture, and there is none: give the layout one"):
        make("ip-adapter")("a person", layout=Layout(THINGS), **FAST)
    with pytest.raises(UserError, match=r"4 interactions, .*counted as one; interact takes at most 3: leave out 1"):
        first("a person", layout=Layout(THINGS * 2), **FAST)
    with pytest.raises(UserError, match="has 30 things; migc takes at most 28: leave out 2"):
        make("migc")("a person", layout=Layout(THINGS * 15), **FAST)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_another_sampler_is_no_other_schedule(parts: dict, make: Callable, name: str) -> None:
    """Some have no word for a setting that others have switched off."""
    helper = replace(make("migc"), scheduler=make_scheduler(name, parts["scheduler"].config))
    counterpoint.aggregate([make("interact"), helper])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.vae.register_to_config(scaling_factor=0.5), "another VAE: scaling factor 0.5"),
        (lambda p: p.scheduler.register_to_config(num_train_timesteps=500), "schedule: num_train_timesteps 500"),
        (lambda p: p.unet.register_to_config(in_channels=9), "latents of other shape 9"),
    ],
)
def test_what_differs_is_named(parts: dict, make: Callable, change: Callable, said: str) -> None:
    first, other = make(), make()
    other = replace(other, vae=copy.deepcopy(other.vae), unet=copy.deepcopy(other.unet))
    change(other)
    with pytest.raises(UserError, match=said):
        counterpoint.aggregate([first, other])
