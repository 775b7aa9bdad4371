"""A rule inside a stock pipeline: neutral where it should be, ours where it is the same model, and gone afterwards."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from peft import LoraConfig
from PIL import Image

from counterpoint import attach
from counterpoint.fusion import FLUX_DELTA, FUSIONS
from counterpoint.sampling.prompt import subject_places
from counterpoint.types import Fusion, UserError
from tests.parity import families
from tests.parity.test_stock import hints, ours, stock

FAMILIES = {name: getattr(families, name) for name in ("sdxl", "union", "flux", "adapters")}
CALL = {
    "num_inference_steps": 4,
    "negative_prompt": "red",
    "guidance_scale": 5.0,
    "width": 64,
    "height": 64,
    "output_type": "latent",
    "num_images_per_prompt": 2,
}
PROMPT = "a person on meadow"


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "cross.* lends keys only", UserWarning)
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, parts: dict) -> tuple[Any, families.Call]:
    return FAMILIES[request.param](parts)


def test_sum_is_stock_in_every_family(family: tuple[Any, families.Call]) -> None:
    pipe, call = family
    wanted = call()
    with attach(pipe, "sum"):
        assert torch.equal(call(), wanted)
    with attach(pipe, "pix"):
        other = call()
    assert torch.isfinite(other).all()
    assert not torch.equal(other, wanted), "the controls do speak, and pix chooses between them"
    assert torch.equal(call(), wanted), "afterwards nothing is left"


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_control_is_stock_under_every_rule(parts: dict, kind: str) -> None:
    pipe, call = FAMILIES[kind](parts, count=1)
    wanted = call()
    for rule in FUSIONS.values():
        if rule.inject is torch.add and (rule.exchange is None or kind == "sdxl"):
            with attach(pipe, rule):
                assert torch.equal(call(), wanted), rule.name


@pytest.mark.parametrize("fusion", ["cross", "cross-authors", "maxfusion", "minimal-impact", "0:sum,0.5:maxfusion"])
def test_every_mechanism_runs_in_sdxl(parts: dict, fusion: str) -> None:
    pipe, call = families.sdxl(parts)
    plain = call()
    with attach(pipe, fusion, subject="person" if "cross" in fusion else ()):
        fused = call()
    assert torch.isfinite(fused).all()
    assert not torch.equal(fused, plain)
    assert torch.equal(call(), plain)


def test_a_union_network_is_asked_for_one_control_at_a_time(parts: dict) -> None:
    pipe, call = families.union(parts, -2)
    seen: list[list[float]] = []
    handle = pipe.controlnet.control_add_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with attach(pipe, "sum", controls=["pose", "depth"]):
        fused = call()
    handle.remove()
    assert len(seen) == 2 * 3, "two controls in three steps"
    assert torch.isfinite(fused).all()
    with attach(pipe, "cross", subject="person"):
        assert torch.isfinite(call()).all()
    single, alone = families.union(parts, -1)
    wanted = alone()
    with attach(single, "pix"):
        assert torch.equal(alone(), wanted)


@pytest.mark.parametrize("fusion", [*FUSIONS, "0:sum,0.5:cross", "0:minimal-impact,0.5:mean"])
def test_it_is_our_own_pipeline(parts: dict, fusion: str) -> None:
    """Two ways to the same numbers: our loop, and a rule inside diffusers' loop."""
    more, images = {"subject": "person"} if "cross" in fusion else {}, hints(2)
    scales = {"controlnet_conditioning_scale": [0.7, 1.3], "control_guidance_end": [1.0, 0.8]}
    mine = ours(parts, 2)(PROMPT, images, fusion=fusion, generator=torch.manual_seed(3), **scales, **more, **CALL)
    pipe = stock(parts, 2)
    with attach(pipe, fusion, **more):
        theirs = pipe(PROMPT, image=images, generator=torch.manual_seed(3), **scales, **CALL)
    assert torch.equal(mine.images, theirs.images)


def test_masks_and_gates_are_those_of_our_pipeline(parts: dict) -> None:
    left = Image.fromarray(np.repeat([[255] * 32 + [0] * 32], 64, 0).astype(np.uint8))
    lines = Image.new("RGB", (64, 64))
    lines.paste((255, 255, 255), (4, 4, 6, 20))
    pipe = stock(parts, 2)

    def run(given: dict, **how: Any) -> torch.Tensor:
        with attach(pipe, "sum", **how):
            return pipe(PROMPT, image=given, generator=torch.manual_seed(3), **CALL).images

    own = ours(parts, 2)
    own.controls = dict(zip(("pose", "seg"), own.controls.values(), strict=True))
    noise = hints(2)
    for images, here, there in (
        (noise, {"control_mask": {"1": left}}, {"control_mask": [None, left]}),
        (noise, {"control_mask": [None, left]}, {"control_mask": [None, left]}),
        ([lines, noise[1]], {"controls": ["pose", "seg"], "gate_silence": True}, {"gate_silence": True}),
    ):
        wanted = own(PROMPT, images, generator=torch.manual_seed(3), fusion="sum", **there, **CALL).images
        assert torch.equal(run(images, **here), wanted)
    assert not torch.equal(run(noise, control_mask={"1": left}), run(noise))


def test_flux_takes_features_in_by_a_rule(parts: dict) -> None:
    def plus(host: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
        return host + control

    pipe, call = families.flux(parts)
    wanted = call()
    with attach(pipe, Fusion("mine", "", FUSIONS["sum"].combine, inject=plus)):
        assert torch.equal(call(), wanted)
    with attach(pipe, "minimal-impact"):
        other = call()
    assert torch.isfinite(other).all()
    assert not torch.equal(other, wanted)
    assert torch.equal(call(), wanted)


def test_flux_has_the_papers_threshold_where_none_is_named(parts: dict) -> None:
    pipe, call = families.flux(parts)

    def run(fusion: str) -> torch.Tensor:
        with attach(pipe, fusion):
            return call()

    for rule in ("pix", "cross"):
        assert torch.equal(run(rule), run(f"{rule}:delta={FLUX_DELTA}"))
        assert not torch.equal(run(rule), run(f"{rule}:delta=0.1"))
    assert torch.equal(run("channel"), run("channel:delta=0.7")), "ChannelFusion's threshold stays"
    assert not torch.equal(run("channel"), run(f"channel:delta={FLUX_DELTA}"))


def test_a_flux_union_hears_every_control_or_says_so(parts: dict) -> None:
    """One network with several kinds: diffusers takes one window for all, and drops every control but the first."""
    pipe, call = families.flux(parts, count=1, kinds=3)
    two = {"control_image": families.hints(2), "control_mode": [0, 2], "controlnet_conditioning_scale": [1.0, 0.5]}
    with pytest.raises(UserError, match=r"hears 1 of 2 controls \(0, 1\)"), attach(pipe, "sum"):
        call(**two)
    two |= {"control_guidance_start": [0.0, 0.0], "control_guidance_end": [1.0, 1.0]}
    wanted = call(**two)
    with attach(pipe, "sum"):
        assert torch.equal(call(**two), wanted)


@pytest.mark.parametrize("kind", ["sdxl", "union", "flux", "flux union"])
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_image_to_image_and_inpainting_in_every_family(parts: dict, kind: str, task: str) -> None:
    pipe, call = families.from_picture(parts, kind, task)
    wanted = call()
    with attach(pipe, "sum"):
        assert torch.equal(call(), wanted)
    with attach(pipe, "pix"):
        assert not torch.equal(call(), wanted)
    assert torch.equal(call(), wanted)


@pytest.mark.parametrize("kind", FAMILIES)
def test_rules_work_where_no_versions_are_counted(parts: dict, kind: str) -> None:
    pipe, call = FAMILIES[kind](parts)
    with attach(pipe, "pix"):
        wanted = call()
        with torch.inference_mode():
            assert torch.equal(call(), wanted)


def test_keys_are_lent_in_flux(parts: dict) -> None:
    """By default everywhere, as the paper has it; an empty mask lends as if the subject were nowhere, not nothing."""
    pipe, call = families.flux(parts)

    def run(fusion: str, **how: Any) -> torch.Tensor:
        with attach(pipe, fusion, **how):
            return call(num_inference_steps=4)

    left = torch.zeros(1, 1, 8, 12)
    left[..., :6] = 1
    plain, everywhere = run("pix+channel"), run("cross")
    assert torch.isfinite(everywhere).all()
    assert not torch.equal(everywhere, plain)
    assert torch.equal(run("cross", subject_mask=torch.ones(1, 1, 8, 12)), everywhere)
    half = run("cross", subject_mask=left)
    assert not torch.equal(half, everywhere)
    assert not torch.equal(half, run("cross", subject_mask=1 - left))
    assert not torch.equal(half, run("cross", subject_mask=left, foreground="1"))
    assert torch.equal(run("pix+channel"), plain), "processors are back"


def test_a_pipeline_with_the_same_networks_is_none_of_it(parts: dict) -> None:
    """Inside the block, before and after the attached pipeline has run: the other one's pictures are its own."""
    pipe = stock(parts, 2)
    other = StableDiffusionControlNetImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    call = families.caller(pipe, PROMPT, image=hints(2))
    start = Image.new("RGB", (64, 64), (90, 120, 60))
    theirs = families.caller(other, "a night sky", image=start, control_image=hints(2))
    wanted, alone = theirs(), call()
    with attach(pipe, "cross", subject="person"):
        assert torch.equal(theirs(), wanted)
        assert not torch.equal(call(), alone)
        assert torch.equal(theirs(), wanted)


def test_a_word_of_several_vectors_moves_the_subject(parts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A textual inversion takes as many places as it has vectors; the subject is looked for behind them."""
    pipe = stock(parts, 2)
    pipe.tokenizer, pipe.text_encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion({"<red>": torch.zeros(3, width)}, token="<red>")
    found: list[list[int]] = []

    def spy(*given: Any) -> list[int]:
        found.append(subject_places(*given))
        return found[-1]

    monkeypatch.setattr("counterpoint.sampling.stock.subject_places", spy)
    with attach(pipe, "cross", subject="person"):
        assert torch.isfinite(families.caller(pipe, "a <red> person", image=hints(2))()).all()
    assert found == [[5]], "behind a beginning, an a and three vectors"


@pytest.mark.parametrize("more", [{"guess_mode": True}, {"embeds": True}])
def test_what_stock_takes_is_heard_inside(parts: dict, more: dict) -> None:
    """Also what our own pipeline does not take."""
    pipe = stock(parts, 2)
    prompt: dict[str, Any] = {"prompt": PROMPT}
    if more.get("embeds"):
        text, negative = pipe.encode_prompt(PROMPT, pipe.device, 1, True, "red")
        prompt, more = {"prompt_embeds": text, "negative_prompt_embeds": negative}, {}
    call = families.caller(pipe, image=hints(2), **prompt, **more)
    plain, wanted = families.caller(pipe, PROMPT, image=hints(2))(), call()
    assert not torch.equal(plain, wanted), "it does change the picture"
    with attach(pipe, "sum"):
        assert torch.equal(call(), wanted)
    with attach(pipe, "pix"):
        assert torch.isfinite(call()).all()


def test_more_rows_than_pictures(parts: dict) -> None:
    """Perturbed-attention guidance and films: rules run, and what is told for each picture is refused."""
    plain = stock(parts, 2)
    pipe = StableDiffusionControlNetPAGPipeline(**plain.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = families.caller(pipe, PROMPT, image=hints(2), pag_scale=3.0)
    wanted = call()
    with attach(pipe, "sum", controls=["pose", "seg"]):
        assert torch.equal(call(), wanted)
    with attach(pipe, "pix", controls=["pose", "seg"]):
        assert torch.isfinite(call()).all()
    for how in ({"fusion": "cross", "subject": "person"}, {"fusion": "pix", "control_mask": [None, np.ones((8, 8))]}):
        with (
            pytest.raises(UserError, match="more rows than pictures"),
            attach(pipe, controls=["pose", "seg"], **how),
        ):
            pass


def test_after_an_exception_nothing_is_left(parts: dict) -> None:
    pipe = stock(parts, 2)
    call = families.caller(pipe, PROMPT, image=hints(2))
    wanted = call()
    owners = (pipe, pipe.controlnet, pipe.unet)
    before = [set(owner.__dict__) for owner in owners]

    def stop(*_: Any) -> Any:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), attach(pipe, "cross", subject="person"):
        call(callback_on_step_end=stop)
    assert [set(owner.__dict__) for owner in owners] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert torch.equal(call(), wanted)


def test_silent_controls_are_not_run(parts: dict) -> None:
    pipe = stock(parts, 2)
    seen: list[torch.nn.Module] = []
    handles = [net.register_forward_hook(lambda module, *_: seen.append(module)) for net in pipe.controlnet.nets]
    with attach(pipe, "pix"):
        pipe(PROMPT, image=hints(2), controlnet_conditioning_scale=[1.0, 0.0], **CALL)
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    assert set(seen) == {pipe.controlnet.nets[0]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_channels_last(parts: dict, dtype: torch.dtype) -> None:
    pipe = stock(parts, 2)
    call = families.caller(pipe, PROMPT, image=hints(2))
    pipe.to(dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    try:
        wanted = call()
        with attach(pipe, "sum"):
            assert torch.equal(call(), wanted)
        with attach(pipe, "cross", subject="person"):
            fused = call()
    finally:
        pipe.to(torch.float32)
        pipe.unet.to(memory_format=torch.contiguous_format)
    assert fused.dtype == dtype
    assert torch.isfinite(fused).all()


def narrow(pipe: Any) -> None:
    """A second network of another width."""
    _second(pipe, block_out_channels=(8, 16), norm_num_groups=4)


def shallow(pipe: Any) -> None:
    """A second network with more blocks."""
    shape = pipe.controlnet.nets[0].config
    more = {key: (*shape[key], shape[key][-1]) for key in ("down_block_types", "block_out_channels")}
    _second(pipe, **more, only_cross_attention=False)


def inattentive(pipe: Any) -> None:
    """A first network that attends to nothing; its residuals have the same shapes."""
    _second(pipe, down_block_types=("DownBlock2D",) * 2, mid_block_type="UNetMidBlock2D")
    pipe.controlnet = MultiControlNetModel(reversed(pipe.controlnet.nets))


def _second(pipe: Any, **changed: Any) -> None:
    first = pipe.controlnet.nets[0]
    second = families.speak(ControlNetModel(**{**first.config, **changed}))
    pipe.controlnet = MultiControlNetModel([first, second])


def compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet)


@pytest.mark.parametrize(
    ("spoil", "how", "message"),
    [
        (None, {"fusion": "sum", "subject": "person"}, "lends no keys"),
        (None, {"fusion": "cross", "subject": "ball"}, "'ball' is not in the prompt"),
        (
            None,
            {"fusion": "cross", "subject": "person", "foreground": "depth"},
            "'depth' is no control; there are 0, 1",
        ),
        (
            None,
            {"fusion": "cross", "subject": ["a", "person"], "foreground": ["0", "1"]},
            "is a foreground; cross needs",
        ),
        (None, {"controls": ["pose"]}, "1 names .pose. for 2 controls"),
        (None, {"controls": "pose"}, r"a list such as \['pose'\]"),
        (None, {"controls": ["a", "b"], "control_mask": [None]}, "1 values of control mask for 2 controls"),
        (None, {"controls": ["pose", "pose"]}, "two controls have one name"),
        (None, {"fusion": "sum", "foreground": "0"}, "lends no keys"),
        (None, {"fusion": "cross", "subject_mask": torch.ones(3, 1, 8, 8)}, "3 subject masks and 2 images"),
        (None, {"fusion": "pix", "control_mask": {"0": torch.ones(4, 1, 8, 8)}}, "4 masks for 0 and 2 images"),
        (None, {"control_mask": {"2": Image.new("L", (8, 8))}}, "no control '2'"),
        (None, {"fusion": "pix", "control_mask": {"0": torch.ones(1, 1, 7, 31)}}, "31 x 7 and its picture 64 x 64"),
        (None, {"fusion": "pix", "control_mask": {"0": torch.full((1, 1, 8, 8), float("nan"))}}, "numbers in 0..1"),
        (None, {"fusion": "pix", "control_mask": {"0": 255 * torch.ones(1, 1, 8, 8)}}, "numbers in 0..1"),
        (None, {"fusion": "pix", "gate_silence": True}, "wants to know what the controls show"),
        (None, {"fusion": "cross", "subject": "person", "subject_mask": torch.ones(1, 1, 8, 8)}, "give one of them"),
        (
            None,
            {"fusion": "cross", "subject_mask": torch.ones(1, 1, 7, 31)},
            "mask for 0 is 31 x 7 and the latents 8 x 8",
        ),
        (narrow, {"fusion": "maxfusion"}, r"fit together at conv_in \(0 \(4, 16, 8, 8\), 1 \(4, 8, 8, 8\)\)"),
        (narrow, {"fusion": "pix"}, r"fit together at down.0 \("),
        (shallow, {"fusion": "maxfusion"}, r"cannot walk side by side \("),
        (
            inattentive,
            {"fusion": "cross", "subject": "person"},
            "foreground 0 has no keys for 2 of the 2 self-attention",
        ),
        (None, {"fusion": "channel:delta=1.5"}, "a ratio in 0..1"),
        (compiled, {"fusion": "cross", "subject": "person"}, "UNet2DConditionModel, which is compiled"),
    ],
)
def test_what_does_not_fit_is_said(parts: dict, spoil: Callable[[Any], None] | None, how: dict, message: str) -> None:
    pipe = stock(parts, 2)
    if spoil is not None:
        spoil(pipe)
    with pytest.raises(UserError, match=message), attach(pipe, **how):
        pipe(PROMPT, image=hints(2), **CALL)


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("flux", {"fusion": "cross", "subject": "person"}, "show it with subject_mask"),
        ("adapters", {"fusion": "cross", "subject": "person"}, "MultiAdapter has no keys to lend"),
        ("flux", {"fusion": "maxfusion"}, "cannot walk FluxMultiControlNetModel"),
        ("flux", {"fusion": "pix", "gate_silence": True}, "sees encoded images"),
        ("adapters", {"fusion": "minimal-impact"}, "MultiAdapter is none: try mgda"),
        ("adapters", {"fusion": "0:pix,0.5:sum"}, "it can have one rule only"),
        ("union", {"fusion": "cross-authors"}, "cannot walk MultiControlNetUnionModel"),
    ],
)
def test_what_a_family_cannot_give(parts: dict, kind: str, how: dict, message: str) -> None:
    pipe, _ = FAMILIES[kind](parts)
    with pytest.raises(UserError, match=message), attach(pipe, **how):
        pass


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")  # of diffusers to itself
def test_blocks_that_do_not_pair_are_named(parts: dict) -> None:
    pipe, call = families.flux(parts)
    other = FluxControlNetModel(**{**pipe.controlnet.nets[0].config, "num_layers": 4, "num_single_layers": 0})
    pipe.controlnet.nets[1] = families.speak(other)
    with pytest.raises(UserError, match=r"double and single blocks \(0 \(2, 2\), 1 \(4, None\)\)"), attach(pipe, "pix"):
        call()


@pytest.mark.parametrize("fusion", ["sum", "cross", "minimal-impact"])
def test_loras_and_gradient_checkpointing_stay(parts: dict, fusion: str) -> None:
    pipe, images = stock(parts, 2), hints(2)
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.unet.enable_gradient_checkpointing()
    plain = pipe(PROMPT, image=images, generator=torch.manual_seed(3), **CALL).images
    with attach(pipe, fusion, subject="person" if fusion == "cross" else ()):
        fused = pipe(PROMPT, image=images, generator=torch.manual_seed(3), **CALL).images
    assert torch.equal(fused, plain) == (fusion == "sum")
    assert torch.isfinite(fused).all()
    assert torch.equal(pipe(PROMPT, image=images, generator=torch.manual_seed(3), **CALL).images, plain)


def test_condition_images_are_encoded_once(parts: dict) -> None:
    pipe, seen = stock(parts, 2), []
    for network in pipe.controlnet.nets:
        network.controlnet_cond_embedding.register_forward_hook(lambda *_: seen.append(1))
    with attach(pipe, "sum"):
        for _ in range(2):
            pipe(PROMPT, image=hints(2), **CALL)
            assert not any(network.controlnet_cond_embedding.seen for network in pipe.controlnet.nets)
    assert len(seen) == 4


def test_a_pipeline_without_controls(parts: dict) -> None:
    pipe = stock(parts, 0, kind=StableDiffusionPipeline)
    with pytest.raises(UserError, match="holds no ControlNets"), attach(pipe):
        pass


def test_a_rule_of_ones_own(parts: dict) -> None:
    pipe = stock(parts, 2)
    call = families.caller(pipe, PROMPT, image=hints(2))
    wanted = call(controlnet_conditioning_scale=[1.0, 0.0])
    with attach(pipe, Fusion("first", "the first control", lambda features: features[0])):
        assert torch.equal(call(), wanted)


class Counting(ModelHook):
    """Stands for offloading: something of accelerate's that must run around every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self.count += 1
        return args, kwargs


@pytest.mark.parametrize("when", ["before", "inside"])
def test_offloading_hooks_keep_working(parts: dict, when: str) -> None:
    pipe = stock(parts, 2)
    call = families.caller(pipe, PROMPT, image=hints(2))
    wanted, hooks = call(), [Counting(), Counting()]

    def offload() -> None:
        for module, hook in zip((pipe.controlnet, pipe.unet), hooks, strict=True):
            add_hook_to_module(module, hook)

    if when == "before":
        offload()
    try:
        with attach(pipe, "cross", subject="person"):
            if when == "inside":
                offload()
            fused = call()
        assert [hook.count for hook in hooks] == [3, 3]
        assert torch.equal(call(), wanted)
        assert [hook.count for hook in hooks] == [6, 6]
    finally:
        for module in (pipe.controlnet, pipe.unet):
            remove_hook_from_module(module)
    assert torch.equal(call(), wanted)
    assert not torch.equal(fused, wanted)


def test_offloading_switched_off_inside(parts: dict) -> None:
    pipe = stock(parts, 2)
    call = families.caller(pipe, PROMPT, image=hints(2))
    wanted = call()
    add_hook_to_module(pipe.controlnet, Counting())
    with attach(pipe, "pix"):
        remove_hook_from_module(pipe.controlnet)
        assert not torch.equal(call(), wanted)
    assert not {"forward", "_old_forward"} & set(pipe.controlnet.__dict__)
    assert torch.equal(call(), wanted)


def test_one_rule_at_a_time(parts: dict) -> None:
    pipe = stock(parts, 2)
    with attach(pipe, "pix"), pytest.raises(UserError, match="attached to this pipeline already"), attach(pipe, "sum"):
        pass


def test_gates_work_on_several_union_networks(parts: dict) -> None:
    pipe, call = families.union(parts)
    with attach(pipe, "sum", controls=["canny", "hed"]):
        plain = call()
    with attach(pipe, "sum", controls=["canny", "hed"], gate_silence=True):
        assert not torch.equal(call(control_image=[Image.new("RGB", (64, 64))] * 2), plain)


@pytest.mark.parametrize("scheduler", ["ddim", "unipc"])
def test_schedules_in_image_to_image_are_those_of_our_pipeline(parts: dict, scheduler: str) -> None:
    """Some schedulers say where image-to-image begins, some do not; progress counts from there in either."""
    images, how = hints(3), {"strength": 0.5, "num_inference_steps": 8, "controlnet_conditioning_scale": [1.0, 0.5]}
    call = {**CALL, **how, "num_images_per_prompt": 1}
    mine = ours(parts, 2, scheduler)(
        PROMPT, images[:2], image=images[2], fusion="0:pix,0.5:sum", generator=torch.manual_seed(3), **call
    )
    pipe = stock(parts, 2, scheduler, kind=StableDiffusionControlNetImg2ImgPipeline)
    with attach(pipe, "0:pix,0.5:sum"):
        theirs = pipe(PROMPT, image=images[2], control_image=images[:2], generator=torch.manual_seed(3), **call)
    assert torch.equal(mine.images, theirs.images)


@pytest.mark.parametrize("kind", [StableDiffusionControlNetImg2ImgPipeline, StableDiffusionControlNetInpaintPipeline])
def test_image_to_image_and_inpainting(parts: dict, kind: type) -> None:
    pipe, images = stock(parts, 2, kind=kind), hints(3)
    mask = {"mask_image": Image.new("L", (64, 64), 255)} if "Inpaint" in kind.__name__ else {}
    call = families.caller(pipe, PROMPT, image=images[2], control_image=images[:2], strength=0.7, **mask)
    wanted = call()
    with attach(pipe, "sum"):
        assert torch.equal(call(), wanted)
    with attach(pipe, "cross", subject="person"):
        assert not torch.equal(call(), wanted)


def test_networks_may_be_compiled_where_nothing_reaches_inside(parts: dict) -> None:
    pipe = stock(parts, 2)
    call = families.caller(pipe, PROMPT, image=hints(2))
    nets = list(pipe.controlnet.nets)
    with attach(pipe, "pix"):
        wanted = call()
    for i, net in enumerate(nets):
        pipe.controlnet.nets[i] = torch.compile(net, backend="eager")
    with attach(pipe, "pix"):
        torch.testing.assert_close(call(), wanted)
    with pytest.raises(UserError, match="ControlNetModel, which is compiled"), attach(pipe, "cross", subject="person"):
        pass
