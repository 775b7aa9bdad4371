"""Adapters learn, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from counterpoint.conditions.layout import Instance, Interaction, Layout
from counterpoint.models.adapter import load_adapter
from counterpoint.models.gligen import with_fusers
from counterpoint.models.interact import InteractionEmbedding
from counterpoint.models.ip_adapter import with_ip_adapter
from counterpoint.models.migc import with_instances
from counterpoint.training.order import Draws
from counterpoint.training.stages.adapter import FILE, STATES, AdapterStage

LAYOUT = Layout(
    (Instance("a person", (0, 0.1, 0.5, 0.9)), Instance("a ball", (0.5, 0.5, 1, 1))), (Interaction(0, "kicking", 1),)
)
KINDS = ("interact", "gligen", "migc", "ip-adapter")


def stage(parts: dict, kind: str, silent: float = 0.0) -> AdapterStage:
    torch.manual_seed(0)
    unet: UNet2DConditionModel = parts["unet"]
    text, reads = unet.config.cross_attention_dim, {}
    if kind == "interact":
        unet = with_fusers(unet, InteractionEmbedding(text, text, 3, 8))
    elif kind == "gligen":
        unet = with_fusers(unet, GLIGENTextBoundingboxProjection(text, text))
    elif kind == "migc":
        unet = with_instances(unet, ("mid_block.attentions.0",), refined=True, hidden=8)
    else:
        config = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=8, projection_dim=24,
        )  # fmt: skip
        side = {"height": 32, "width": 32}
        reads = {
            "image_encoder": CLIPVisionModelWithProjection(config).eval(),
            "image_processor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side),
        }
        unet = with_ip_adapter(unet, 24)
    scheduler = DDPMScheduler.from_config(parts["scheduler"].config)
    return AdapterStage(
        kind, (64, 64), unet, parts["text_encoder"], parts["tokenizer"], scheduler, proportion_silent=silent, **reads
    )


def batch(rows: int = 4) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(rows, 4, 8, 8, generator=generator),
        "image": torch.randint(0, 256, (rows, 64, 64, 3), generator=generator, dtype=torch.uint8),
        "caption": ["a person and a ball"] * rows,
        "layout": [LAYOUT, Layout(LAYOUT.instances[:1])] * (rows // 2),
    }


def draws(rows: int = 4) -> Draws:
    return Draws(0, list(range(rows)), torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_learns_and_all_of_it(parts: dict, kind: str) -> None:
    one = stage(parts, kind)
    own = STATES[kind](one.unet)
    assert len(one.own) == len(own)
    gates = [
        value for name, value in one.unet.named_parameters() if name.endswith(("alpha_attn", "alpha_dense", "gamma"))
    ]
    with torch.no_grad():
        for gate in gates:  # shut gates let no gradient through to what is behind them
            gate.add_(0.5)
    for name, value in one.unet.named_parameters():
        value.requires_grad_(one.learns(name))
    loss, _ = one(batch(), draws(), 0)
    loss.backward()
    parameters = dict(one.unet.named_parameters())
    idle = {name for name in one.own if parameters[name].grad is None or not parameters[name].grad.any()}
    assert not {name for name in idle if "null" not in name and "interaction_embedding" not in name}, idle
    for name, value in parameters.items():
        if name not in one.own:
            assert value.grad is None, name
            value.requires_grad_(True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_is_told_nothing(parts: dict, kind: str) -> None:
    given = {**batch(), "caption": [""] * 4}  # some of those that are told nothing have no caption either
    told, _ = stage(parts, kind)(given, draws(), 0)
    hushed, _ = stage(parts, kind, silent=1.0)(given, draws(), 0)
    if kind == "migc":
        bare, _ = stage(parts, kind)({**given, "layout": [Layout()] * 4}, draws(), 0)
        assert torch.equal(bare, hushed)
    if kind in {"migc", "ip-adapter"}:  # the others begin with shut gates
        assert not torch.equal(told, hushed)


def test_half_of_those_have_no_caption(parts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    one = stage(parts, "interact", silent=0.5)
    monkeypatch.setattr(one, "_text", lambda captions, _: heard.extend(captions) or torch.zeros(len(captions), 24, 32))
    for step in range(16):
        one(batch(), Draws(0, range(4 * step, 4 * step + 4)), step)
    assert 8 <= heard.count("") <= 24, "a quarter of 64"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_is_loaded(parts: dict, kind: str, tmp_path: Path) -> None:
    one = stage(parts, kind)
    with torch.no_grad():
        for value in STATES[kind](one.unet).values():
            value.add_(0.1)
    one.export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    found, unet = load_adapter(parts["unet"], tmp_path)
    assert found == kind
    wanted = STATES[kind](one.unet)
    assert all(torch.equal(value, wanted[name]) for name, value in STATES[kind](unet).items())
