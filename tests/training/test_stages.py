"""Stages and losses: equations against float64, gradients where they belong, exports that load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from counterpoint.models.perception import PerceptionModel, heat_of
from counterpoint.models.strength import strength_of, strengthen
from counterpoint.models.tokenizer import END, START, word_tokenizer
from counterpoint.training.losses.contrastive import contrastive_loss
from counterpoint.training.losses.diffusion import add_noise, diffusion_loss, snr_weight, target
from counterpoint.training.order import Draws
from counterpoint.training.stages.codec import CodecStage
from counterpoint.training.stages.diffusion import ControlNetStage, DiffusionStage, add_lora
from counterpoint.training.stages.judge import JudgeStage
from counterpoint.training.stages.towers import TowersStage


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_targets_recover_the_clean_sample(kind: str) -> None:
    x0, noise = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    a = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    xt, said = add_noise(x0, noise, a), target(x0, noise, a, kind)
    root, rest = a.sqrt()[:, None, None, None], (1 - a).sqrt()[:, None, None, None]
    back = (xt - rest * said) / root if kind == "epsilon" else root * xt - rest * said
    torch.testing.assert_close(back, x0)


def test_snr_weights() -> None:
    a = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)
    torch.testing.assert_close(snr_weight(a, 5.0, "epsilon"), a.new_tensor([1.0, 1.0, 5 / 99]))
    torch.testing.assert_close(snr_weight(a, 5.0, "epsilon", debiased=True), a.new_tensor([99**0.5, 1.0, 5 / 99]))
    torch.testing.assert_close(
        snr_weight(a, 5.0, "v_prediction"), a.new_tensor([0.01 / 0.99 / (1 + 0.01 / 0.99), 0.5, 5 / 100])
    )
    with pytest.raises(ValueError, match="prediction_type"):
        target(a, a, a, "sample")


def test_loss_is_per_sample() -> None:
    x, y = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(diffusion_loss(x, y), ((x - y) ** 2).mean((1, 2)))


def test_contrastive_loss_by_its_equation() -> None:
    images, texts, scale = (
        torch.randn(5, 7, dtype=torch.float64),
        torch.randn(5, 7, dtype=torch.float64),
        torch.tensor(3.0, dtype=torch.float64),
    )
    cosines = torch.stack([torch.stack([i @ t / (i.norm() * t.norm()) for t in texts]) for i in images]) * scale
    rows = torch.stack([-torch.log(torch.exp(cosines[k, k]) / torch.exp(cosines[k]).sum()) for k in range(5)]).mean()
    columns = torch.stack(
        [-torch.log(torch.exp(cosines[k, k]) / torch.exp(cosines[:, k]).sum()) for k in range(5)]
    ).mean()
    torch.testing.assert_close(contrastive_loss(images, texts, scale), (rows + columns) / 2)


def small_codec() -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 0),
    )


def gradients(stage: torch.nn.Module, batch: dict, count: int) -> list[str]:
    """Names of trained parameters without a gradient."""
    loss, extra = stage(batch, Draws(0, range(count)), 0)
    assert torch.isfinite(loss)
    halves = {name: extra.pop(name) for name in ("late", "early") if name in extra}
    assert all(torch.isfinite(value) for value in extra.values())
    assert not halves or any(torch.isfinite(value) for value in halves.values()), "one of them may have no sample"
    loss.backward()
    return [
        name
        for root, module in stage.trained_modules().items()
        for name, p in module.named_parameters(root)
        if p.grad is None or not p.grad.abs().sum() > 0
    ]


def test_codec_stage(tmp_path: Path) -> None:
    stage = CodecStage(small_codec(), crop=32)
    batch = {"image": torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8)}
    silent = gradients(stage, batch, 2)
    assert all(".conv.0." in name or ".conv.2." in name for name in silent), (
        "only what lies behind a silent residual branch may be without a gradient at the start"
    )
    stage.export(tmp_path)
    assert AutoencoderTiny.from_pretrained(tmp_path).config.latent_channels == 4


def test_towers_stage(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["a", "red", "ball"], 8)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(START),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
    }
    clip = CLIPModel(
        CLIPConfig(
            text_config={
                **shape,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 8,
                "pad_token_id": ends["eos_token_id"],
                **ends,
            },
            vision_config={**shape, "image_size": 128, "patch_size": 32},
            projection_dim=8,
        )
    )
    stage = TowersStage(clip, tokenizer)
    batch = {
        "image": torch.randint(0, 256, (3, 128, 128, 3), dtype=torch.uint8),
        "caption": ["a red ball", "a ball", "red"],
    }
    assert not [
        name for name in gradients(stage, batch, 3) if "position_embedding" not in name and "k_proj.bias" not in name
    ]
    stage.export(tmp_path)
    assert CLIPModel.from_pretrained(tmp_path).config.projection_dim == 8


@pytest.fixture
def host(parts: dict) -> tuple:
    return parts["unet"], parts["text_encoder"], parts["tokenizer"], DDPMScheduler(num_train_timesteps=1000)


BATCH = {
    "latents": torch.randn(3, 4, 8, 8),
    "caption": ["a person", "a red ball", ""],
    "control:pose": torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8),
}


def test_diffusion_stage(host: tuple, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_config(host[0].config)
    stage = DiffusionStage(unet, *host[1:])
    assert not [name for name in gradients(stage, BATCH, 3) if not name.endswith("to_k.bias")]
    stage.export(tmp_path)
    UNet2DConditionModel.from_pretrained(tmp_path)


def test_controlnet_stage_trains_the_controlnet_only(host: tuple, parts: dict, tmp_path: Path) -> None:
    network = ControlNetModel.from_config(parts["networks"][0].config)
    network.load_state_dict(parts["networks"][0].state_dict())
    stage = ControlNetStage(network, "pose", *host)
    stage.unet.requires_grad_(False)
    assert not gradients(stage, BATCH, 3)
    assert all(p.grad is None for p in stage.unet.parameters())
    stage.export(tmp_path)
    ControlNetModel.from_pretrained(tmp_path)


def test_several_noises_a_sample_encode_its_condition_once(host: tuple, parts: dict) -> None:
    def network() -> ControlNetModel:
        copy = ControlNetModel.from_config(parts["networks"][0].config)
        copy.load_state_dict(parts["networks"][0].state_dict())
        return copy

    plain = ControlNetStage(network(), "pose", *host)
    twice = ControlNetStage(network(), "pose", *host, noises_per_sample=2)
    noisy = twice._noisy(BATCH, Draws(0, range(3)))
    assert noisy.x0.shape[0] == 6
    assert not torch.equal(noisy.noise[0], noisy.noise[1])
    assert len(set(noisy.t.tolist())) > 3
    repeated = {"control:pose": BATCH["control:pose"].repeat_interleave(2, 0)}
    found, wanted = twice._denoise(noisy, BATCH), plain._denoise(noisy, repeated)
    torch.testing.assert_close(found, wanted)
    for one in (found, wanted):
        one.square().mean().backward()
    for one, other in zip(twice.controlnet.parameters(), plain.controlnet.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_captions_are_dropped_at_the_stated_rate(host: tuple) -> None:
    stage = DiffusionStage(*host, proportion_empty_prompts=0.3)
    text = stage._text(["a red ball"] * 400, Draws(0, range(400)))
    blank = stage._text([""], Draws(0, [0]))
    dropped = (text - blank).abs().flatten(1).amax(1) < 1e-5
    assert 0.22 < dropped.float().mean() < 0.38


def test_judge_stage(tmp_path: Path) -> None:
    judge = PerceptionModel(5, widths=(8, 8, 16, 16), depth=1)
    stage = JudgeStage(judge)
    batch = {
        "image": torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8),
        "segments": torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8),
        "depth": torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8),
        "control:hed": torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8),
        "keypoints": torch.full((2, 2, 18, 2), float("nan")),
    }
    batch["keypoints"][0, 0, 3] = torch.tensor([20.0, 30.0])
    assert not gradients(stage, batch, 2)
    stage.export(tmp_path)
    again = PerceptionModel.from_pretrained(tmp_path)
    picture = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(picture).seg, judge(picture).seg)
    assert judge(picture).joints.shape == (1, 18, 64, 64)
    _, parts = stage({name: batch[name] for name in ("image", "segments")}, Draws(0, [0, 1]), 0)
    assert parts.keys() == {"seg", "accuracy"}, "a data set may know of classes alone"


def test_heat_is_where_the_joint_is() -> None:
    joints = torch.full((1, 2, 18, 2), float("nan"))
    joints[0, 1, 4] = torch.tensor([12.5, 40.5])
    heat = heat_of(joints, 64)
    assert heat[0, 4].argmax() == 40 * 64 + 12
    torch.testing.assert_close(heat[0, 4].max(), torch.tensor(1.0))
    assert not heat[0, 5].any()


def test_a_lora_learns_alone_and_is_exported_with_the_merged_network(host: tuple, parts: dict, tmp_path: Path) -> None:
    network = ControlNetModel.from_config(parts["networks"][0].config)
    network.load_state_dict(parts["networks"][0].state_dict())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    add_lora(network, 2)
    stage = ControlNetStage(network, "pose", *host)
    plain = ControlNetStage(parts["networks"][0], "pose", *host)
    assert torch.equal(stage(BATCH, Draws(0, range(3)), 0)[0], plain(BATCH, Draws(0, range(3)), 0)[0])
    learning = [p for name, p in network.named_parameters() if stage.learns(name)]
    assert 0 < sum(p.numel() for p in learning) < 0.5 * sum(value.numel() for value in before.values())
    with torch.no_grad():
        for parameter in learning:
            parameter += 0.01
    changed = stage(BATCH, Draws(0, range(3)), 0)[0]
    stage.export(tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    merged = ControlNetModel.from_pretrained(tmp_path)
    assert merged.state_dict().keys() == before.keys()
    again = ControlNetStage(merged, "pose", *host)(BATCH, Draws(0, range(3)), 0)[0]
    torch.testing.assert_close(again, changed, rtol=1e-5, atol=1e-6)
    assert all(plain.learns(name) for name, _ in plain.controlnet.named_parameters())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_strengthened_network_goes_on_as_it_was_trained(host: tuple, parts: dict, tmp_path: Path, rank: int) -> None:
    """The loss is that of the network before; what comes out, with its LoRA too, is as strong as what came in."""
    first = parts["networks"][0]

    def fresh(factor: float) -> ControlNetModel:
        network = ControlNetModel.from_config(first.config)
        network.load_state_dict(first.state_dict())
        strengthen(network, factor)
        return network

    strong = fresh(2.5)
    if rank:
        add_lora(strong, rank)
    stage = ControlNetStage(strong, "pose", *host)
    wanted = ControlNetStage(fresh(1.0), "pose", *host)(BATCH, Draws(0, range(3)), 0)[0]
    torch.testing.assert_close(stage(BATCH, Draws(0, range(3)), 0)[0], wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for name, parameter in strong.named_parameters():
            if rank == 0 or "lora_" in name:
                parameter += 0.01
    stage.export(tmp_path)
    out = ControlNetModel.from_pretrained(tmp_path)
    assert strength_of(out) == pytest.approx(2.5)
    given = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 32), torch.rand(1, 3, 64, 64)
    found = out(*given, return_dict=False)
    bare = strong(*given, conditioning_scale=2.5, return_dict=False)
    for one, other in zip((*found[0], found[1]), (*bare[0], bare[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if rank:
        again = fresh(2.5)
        again.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix=None)
        said = again(*given, return_dict=False)
        for one, other in zip((*found[0], found[1]), (*said[0], said[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
