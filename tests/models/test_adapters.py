"""Adapters: the published tables at full size, small ones for real, and files of every form."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path, PurePosixPath

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection
from peft import LoraConfig
from safetensors.torch import save_file

from counterpoint.conditions.layout import Instance, Interaction, Layout
from counterpoint.models import migc
from counterpoint.models.adapter import load_adapter
from counterpoint.models.gligen import fuser_state, renamed, with_fusers
from counterpoint.models.interact import InteractionEmbedding
from counterpoint.models.ip_adapter import adapter_state, attention_names, check_encoder, load_ip_adapter
from counterpoint.models.migc import (
    INSTANCES,
    InstanceShading,
    Told,
    _renamed,
    box_masks,
    instance_state,
    is_seen,
    load_instances,
    naively,
    telling,
    with_instances,
)
from counterpoint.models.weights import read_pickle
from counterpoint.sampling.guides import Adapter, _with_bystanders, make_guide
from counterpoint.sampling.prompt import PromptEncoder
from counterpoint.types import Moment, UserError
from tests.models.ldm import unet_name

SMALL = {"sample_size": 8, "block_out_channels": (16, 16, 32, 32), "cross_attention_dim": 32, "attention_head_dim": 8,
         "norm_num_groups": 4}  # fmt: skip
"""As many blocks as Stable Diffusion 1.5 has, so that LDM's numbers mean what they mean there."""
ATTENTION = (False, True, True, True)
SITES = ("mid_block.attentions.0", "up_blocks.1.attentions.0")
GATES = ("ChannelGate.mlp.1.weight", "ChannelGate.mlp.1.bias", "ChannelGate.mlp.3.weight", "ChannelGate.mlp.3.bias",
         "SpatialGate.spatial.conv.weight")  # fmt: skip


def published_migc(width: int = 1280, *, refined: bool = False) -> dict[str, tuple[int, ...]]:
    """Name under ``migc.`` -> shape of one layer of the published files."""
    small, slots = width // 16, 30
    table = {
        "ea.to_q.weight": (width, width), "ea.to_k.weight": (width, 768), "ea.to_v.weight": (width, 768),
        "ea.to_out.0.weight": (width, width), "ea.to_out.0.bias": (width,),
        **{f"la.{name}.weight": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")},
        "la.to_out.0.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
        "sac.conv2.weight": (1, width, 1, 1), "sac.conv2.bias": (1,),
        **{f"sac.cbam2.{name}": shape for name, shape in
           zip(GATES, ((slots, slots), (slots,), (slots, slots), (slots,), (1, 2, 7, 7)), strict=True)},
        **{f"pos_net.linears_position.{layer}.weight": shape
           for layer, shape in ((0, (512, 64)), (2, (512, 512)), (4, (768, 512)))},
        **{f"pos_net.linears_position.{layer}.bias": (size,) for layer, size in ((0, 512), (2, 512), (4, 768))},
    }  # fmt: skip
    if refined:
        return {**table, "gamma": (1,)}
    first = zip(GATES, ((small, width), (small,), (width, small), (width,), (1, 2, 7, 7)), strict=True)
    return {**table, "sac.conv1.weight": (width, width + 1, 1, 1), "sac.conv1.bias": (width,),
            **{f"sac.cbam1.{name}": shape for name, shape in first}}  # fmt: skip


@pytest.mark.parametrize("refined", [False, True])
def test_every_published_tensor_of_migc_lands_at_full_size(refined: bool) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        grown = with_instances(unet, refined=refined)
    wanted = {name: tuple(value.shape) for name, value in instance_state(grown).items()}
    ldm = [f"model.diffusion_model.{place}.1.transformer_blocks.0.attn2.migc"
           for place in ("middle_block", "output_blocks.3", "output_blocks.4", "output_blocks.5")]  # fmt: skip
    theirs = [f"{site}.transformer_blocks.0.attn2.processor.migc"
              for site in ("mid_block.attentions.0", *(f"up_blocks.1.attentions.{i}" for i in range(3)))]  # fmt: skip
    table = published_migc(refined=refined)
    found = {
        _renamed(f"{place}.{name}"): shape for place in (theirs if refined else ldm) for name, shape in table.items()
    }
    assert found == wanted
    assert len(found) == 4 * len(table)


SDXL = {
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
WIDTHS = {
    768: [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
    2048: [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
}
"""Width of the text -> those of the cross-attentions in the order of published files: down, up, middle."""
PLAIN = {"proj.weight": (4, 1), "proj.bias": (4, 0), "norm.weight": (1, 0), "norm.bias": (1, 0)}
"""Rows as multiples of the text's width, and whether there are columns for an embedding."""


def published_ip_adapter(text: int, embedding: int) -> dict[str, tuple[int, ...]]:
    """``ip-adapter_sd15`` is (768, 1024), ``ip-adapter_sdxl`` (2048, 1280), ``ip-adapter_sdxl_vit-h`` (2048, 1024)."""
    return {
        **{f"image_proj.{name}": (rows * text, *[embedding] * columns) for name, (rows, columns) in PLAIN.items()},
        **{f"ip_adapter.{2 * number + 1}.to_{layer}_ip.weight": (width, text)
           for number, width in enumerate(WIDTHS[text]) for layer in "kv"},
    }  # fmt: skip


def published_plus(text: int = 768, inner: int = 768) -> dict[str, tuple[int, ...]]:
    """``ip-adapter-plus_sd15``: a resampler that reads all of ViT-H's places."""
    square = (inner, inner)
    layers = {
        "0.norm1.weight": (inner,), "0.norm1.bias": (inner,), "0.norm2.weight": (inner,), "0.norm2.bias": (inner,),
        "0.to_q.weight": square, "0.to_kv.weight": (2 * inner, inner), "0.to_out.weight": square,
        "1.0.weight": (inner,), "1.0.bias": (inner,),
        "1.1.weight": (4 * inner, inner), "1.3.weight": (inner, 4 * inner),
    }  # fmt: skip
    attentions = {name: shape for name, shape in published_ip_adapter(text, 1024).items() if "_ip." in name}
    return {
        "image_proj.latents": (1, 16, inner), "image_proj.proj_in.weight": (inner, 1280),
        "image_proj.proj_in.bias": (inner,), "image_proj.proj_out.weight": (text, inner),
        "image_proj.proj_out.bias": (text,), "image_proj.norm_out.weight": (text,), "image_proj.norm_out.bias": (text,),
        **{f"image_proj.layers.{i}.{name}": shape for i in range(4) for name, shape in layers.items()}, **attentions,
    }  # fmt: skip


def hollow(path: Path, table: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of half-precision zeros that takes no room on a disk."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in table.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_every_published_tensor_of_the_ip_adapter_lands_at_full_size(tmp_path: Path) -> None:
    with torch.device("meta"):
        unets = {768: UNet2DConditionModel(cross_attention_dim=768), 2048: UNet2DConditionModel(**SDXL)}
    for text, embedding in ((768, 1024), (2048, 1280), (2048, 1024)):
        table = published_ip_adapter(text, embedding)
        kind, grown = load_adapter(unets[text], hollow(tmp_path / "a.safetensors", table))
        assert kind == "ip-adapter"
        assert {name: tuple(value.shape) for name, value in adapter_state(grown).items()} == table
        assert len(table) == 4 + 2 * len(WIDTHS[text])
        check_encoder(grown, embedding, tmp_path)
        with pytest.raises(
            UserError, match=r"do not fit this UNet: ip_adapter\.1\.to_k_ip\.weight is \(\d+, \d+\), want"
        ):
            load_adapter(unets[2816 - text], tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"no plain IP-Adapter, it has no image_proj\.proj\.weight: those called plus"):
        load_adapter(unets[768], hollow(tmp_path / "plus.safetensors", published_plus()))


def test_gligen_names_in_both_forms() -> None:
    assert renamed("output_blocks.11.1.transformer_blocks.0.fuser.alpha_attn") == (
        "up_blocks.3.attentions.2.transformer_blocks.0.fuser.alpha_attn"
    )
    assert renamed("down_blocks.0.attentions.1.transformer_blocks.0.fuser.norm1.bias").startswith("down_blocks.0.")
    assert renamed("position_net.linears.0.weight") == "position_net.linears.0.weight"
    assert renamed("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight") is None


@pytest.fixture
def unet(parts: dict) -> UNet2DConditionModel:
    return parts["unet"]


def told(unet: UNet2DConditionModel, there: list[list[bool]], **more: object) -> Told:
    generator = torch.Generator().manual_seed(0)
    rows, count, width = len(there), len(there[0]), unet.config.cross_attention_dim
    low = torch.rand(rows, count, 2, generator=generator) / 2
    return Told(
        phrases=torch.randn(rows, count, 7, width, generator=generator),
        pooled=torch.randn(rows, count, width, generator=generator),
        boxes=torch.cat([low, low + 0.4], -1),
        there=torch.tensor(there),
        size=(64, 64),
        **more,
    )


def run(unet: UNet2DConditionModel, layout: Told | None = None, rows: int = 3, **more: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    text = torch.randn(rows, 7, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        if layout is None:
            return unet(latents, 10, text, **more).sample
        with telling(unet, layout):
            return unet(latents, 10, text, **more).sample


@pytest.mark.parametrize("refined", [False, True])
def test_what_is_not_told_a_layout_is_the_unet_that_it_was(unet: UNet2DConditionModel, refined: bool) -> None:
    before = set(unet.state_dict())
    grown = with_instances(unet, SITES, refined=refined)
    assert set(unet.state_dict()) == before
    plain = run(unet)
    assert torch.equal(run(grown), plain)
    layout = told(unet, [[False, False], [True, False], [True, True]])
    found = run(grown, layout)
    assert torch.equal(found[0], plain[0]), "a row without instances"
    assert not torch.allclose(found[1], plain[1])
    assert torch.equal(run(grown), plain), "nothing is remembered"


@pytest.mark.parametrize("refined", [False, True])
def test_padding_and_batch_mates_change_nothing(unet: UNet2DConditionModel, refined: bool) -> None:
    torch.manual_seed(0)
    grown = with_instances(unet, SITES, refined=refined)
    if refined:
        for name, value in instance_state(grown).items():
            if name.endswith("gamma"):
                value += 1
    layout = told(unet, [[True, True, False]] * 3)
    found = run(grown, layout)
    short = Told(layout.phrases[:, :2], layout.pooled[:, :2], layout.boxes[:, :2], layout.there[:, :2], layout.size)
    torch.testing.assert_close(run(grown, short), found, atol=1e-5, rtol=1e-4)
    mixed = Told(layout.phrases, layout.pooled, layout.boxes, layout.there.clone(), layout.size)
    mixed.there[0] = False
    torch.testing.assert_close(run(grown, mixed)[1:], found[1:], atol=1e-5, rtol=1e-4)


def test_instances_are_read_inside_their_boxes_only() -> None:
    layout = Told(
        torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 8), torch.tensor([[[0, 0, 0.5, 1], [0.75, 0.5, 1, 1]]]),
        torch.ones(1, 2, dtype=torch.bool), (64, 64),
    )  # fmt: skip
    inside, outside = box_masks(layout, 64)
    assert inside[0, 0].equal(torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8))
    assert inside[0, 1, 4:, 6:].min() == 1
    assert inside[0, 1].sum() == 8
    assert torch.equal(inside.sum(1, keepdim=True) + outside, torch.ones(1, 1, 8, 8))
    whole, read = torch.zeros(1, 64, 4), torch.stack([torch.full((64, 4), 11.0), torch.full((64, 4), 22.0)])[None]
    joined = naively(whole, read, inside).view(8, 8, 4)
    torch.testing.assert_close(joined[0, 0], torch.full((4,), 10.0))
    torch.testing.assert_close(joined[7, 7], torch.full((4,), 20.0))
    assert torch.equal(joined[0, 7], torch.zeros(4))


def test_a_box_is_seen_where_something_is_left_of_it() -> None:
    """The smallest that always is: seven pixels. In smaller ones it depends on where they are."""
    ends = [(low, low + side) for side in range(1, 8) for low in range(0, 64 - side)]
    boxes = torch.tensor([[x0, 0, x1, 128] for x0, x1 in ends] + [[0, y0, 64, y1] for y0, y1 in ends])
    boxes = boxes / torch.tensor([64, 128, 64, 128])
    layout = Told(torch.zeros(1, len(boxes), 1, 8), torch.zeros(1, len(boxes), 8), boxes[None],
                  torch.ones(1, len(boxes), dtype=torch.bool), (128, 64))  # fmt: skip
    left = box_masks(layout, 16 * 8)[0][0].flatten(1).any(1).tolist()
    seen = [is_seen(tuple(box), (128, 64)) for box in boxes.tolist()]
    assert seen == left
    assert not all(seen)
    assert all(one for one, (low, high) in zip(seen, ends * 2, strict=True) if high - low == 7)


@pytest.mark.parametrize(("width", "grids"), [(136, ((16, 17), (8, 9), (4, 5))), (72, ((16, 9), (8, 5), (4, 3)))])
def test_sides_that_do_not_halve_evenly_are_rounded_up(width: int, grids: tuple) -> None:
    """As a UNet's own convolutions do."""
    layout = Told(
        torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 8), torch.tensor([[[0, 0, 0.5, 1]]]),
        torch.ones(1, 1, dtype=torch.bool), (128, width),
    )  # fmt: skip
    for height, across in grids:
        inside, _ = box_masks(layout, height * across)
        assert inside.shape[2:] == (height, across)
        assert inside[0, 0, :, 0].min() == 1


def test_half_precision_moves_no_box(parts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = migc.telling
    monkeypatch.setattr(migc, "telling", lambda unet, told, **how: seen.append(told) or plain(unet, told, **how))
    layout = Layout((Instance("a ball", (0.1, 0.2, 0.303, 0.7)),))
    half = with_instances(copy.deepcopy(parts["unet"]), SITES).bfloat16()
    encode = PromptEncoder([parts["tokenizer"]], [parts["text_encoder"]])
    guide = make_guide(Adapter("migc"), half, encode, [layout], False, (512, 512))
    told = []
    for index in range(50):
        with guide(Moment(index, 50, torch.tensor(1))):
            told.append(len(seen) > len(told))
    assert sum(told) == 26, "the published code tells up to the step of index 25, it included"
    assert seen[0].boxes[0, 0].tolist() == pytest.approx([0.1, 0.2, 0.303, 0.7], abs=1e-6)
    assert seen[0].phrases.dtype == torch.bfloat16


def test_the_refined_one_tells_phrases_to_the_end(parts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its authors sample: networks for the first half of the steps, then boxes alone, in every layer."""
    grown = with_instances(copy.deepcopy(parts["unet"]), SITES, refined=True)
    layers = [module.processor for name, module in grown.named_modules() if name.endswith(".attn2")]
    networks = [one for one in layers if one.migc is not None]
    assert 0 < len(networks) < len(layers)
    encode = PromptEncoder([parts["tokenizer"]], [parts["text_encoder"]])
    layout = Layout((Instance("a ball", (0.1, 0.2, 0.5, 0.7)),))
    guide = make_guide(Adapter("migc"), grown, encode, [layout], False, (64, 64))
    shaded, joined = [], []
    for one in networks:
        monkeypatch.setattr(one.migc, "forward", lambda *given: shaded.append(given) or given[1])
    monkeypatch.setattr(migc, "naively", lambda whole, *rest: joined.append(rest) or whole)
    text = torch.zeros(1, 7, grown.config.cross_attention_dim)
    for index, asked in ((0, len(networks)), (25, len(networks)), (26, 0), (49, 0)):
        shaded.clear(), joined.clear()
        with torch.no_grad(), guide(Moment(index, 50, torch.tensor(1))) as more:
            grown(torch.zeros(1, 4, 8, 8), 1, text, **more)
        assert (len(shaded), len(joined)) == (asked, len(layers) - asked)
    assert all(one.told is None for one in layers)


def test_layout_attention_is_as_published() -> None:
    """MIGC's regions leave out the first instance, MIGC++'s leave out none; a place in no region sees all."""
    torch.manual_seed(0)
    inside = torch.zeros(1, 2, 2, 2)
    inside[0, 0, 0, 0] = inside[0, 1, 0, 1] = 1
    outside = 1 - inside.sum(1, keepdim=True)
    layout = Told(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 8), torch.rand(1, 2, 4),
                  torch.ones(1, 2, dtype=torch.bool), (16, 16))  # fmt: skip
    hidden = torch.randn(1, 4, 16)
    seen: list[torch.Tensor] = []
    for refined, groups in ((False, ((0, 1, 2, 3), (1,), (2, 3), (2, 3))), (True, ((0,), (1,), (2, 3), (2, 3)))):
        network = InstanceShading(16, 8, refined=refined).eval()
        plain = network.la.forward
        network.la.forward = lambda *given, plain=plain: seen.append(plain(*given)) or seen[-1]  # type: ignore[method-assign]
        with torch.no_grad():
            network(hidden, hidden, hidden[:, None].expand(-1, 2, -1, -1), inside, outside, layout)
            q, k, v = (
                one(hidden)[0].unflatten(-1, (8, 2)) for one in (network.la.to_q, network.la.to_k, network.la.to_v)
            )
            wanted = []
            for place, group in enumerate(groups):
                sim = torch.einsum("hd,khd->hk", q[place], k[list(group)]) * 2**-0.5
                if not refined and place == 0:
                    sim = torch.zeros_like(sim)  # masked everywhere, all alike
                wanted.append(torch.einsum("hk,khd->hd", sim.softmax(-1), v[list(group)]).flatten())
            torch.testing.assert_close(seen[-1][0], network.la.to_out(torch.stack(wanted)))


@torch.no_grad()
def test_shading_written_out() -> None:
    """MIGC's layer, instance by instance: enhancement, layout template, and shares of all of them at every place."""
    torch.manual_seed(0)
    c, n, h, w = 16, 2, 3, 4
    net = InstanceShading(c, 8).double().eval()
    inside = torch.zeros(1, n, h, w, dtype=torch.float64)
    inside[0, 0, :2, :2], inside[0, 1, 1:, 2:] = 1, 0.5
    outside = 1 - inside.amax(1, keepdim=True)
    layout = Told(torch.zeros(1, n, 3, 8), torch.randn(1, n, 8).double(), torch.rand(1, n, 4).double(),
                  torch.ones(1, n, dtype=torch.bool), (16, 16))  # fmt: skip
    hidden, whole = torch.randn(2, 1, h * w, c, dtype=torch.float64)
    read = torch.randn(1, n, h * w, c, dtype=torch.float64)
    found = net(hidden, whole, read, inside, outside, layout)[0]

    def attend(layer: torch.nn.Module, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (one.unflatten(-1, (8, -1)) for one in (layer.to_q(x), layer.to_k(context), layer.to_v(context)))
        seen = (torch.einsum("qhd,khd->hqk", q, k) * (c // 8) ** -0.5).softmax(-1)
        return layer.to_out(torch.einsum("hqk,khd->qhd", seen, v).flatten(1))

    slots, guides = [whole[0] * outside[0, 0].flatten()[:, None]], [outside[0, 0]]
    for i in range(n):
        x0, y0, x1, y1 = layout.boxes[0, i]
        box = torch.stack([x0, x1, y0, y1])
        waves = [wave(100 ** (k / 8) * box) for k in range(8) for wave in (torch.sin, torch.cos)]
        context = torch.stack([layout.pooled[0, i], net.pos_net.linears_position(torch.cat(waves))])
        more = attend(net.ea, net.norm(hidden[0]), context)
        slots.append((read[0, i] + more) * inside[0, i].flatten()[:, None])
        guides.append(inside[0, i])
    regions = [inside[0, 1].flatten(), outside[0, 0].flatten()]  # the first instance has none
    template = []
    for place in range(h * w):
        group = [other for other in range(h * w) if any(one[place] * one[other] > 0 for one in regions)]
        seen = attend(net.la, hidden[0, [place]], hidden[0, group]) if group else None
        alike = net.la.to_out(net.la.to_v(hidden[0]).mean(0, keepdim=True))
        template.append(alike if seen is None else seen)
    slots.append(torch.cat(template))
    guides.append(torch.ones(h, w))

    def gate(maps: torch.Tensor, block: torch.nn.Module) -> torch.Tensor:
        mlp, spatial = block.ChannelGate.mlp, block.SpatialGate.spatial.conv
        maps = maps * (mlp(maps.mean((1, 2))[None]) + mlp(maps.amax((1, 2))[None])).sigmoid()[0, :, None, None]
        return maps * spatial(torch.stack([maps.amax(0), maps.mean(0)])[None]).sigmoid()[0]

    def score(features: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        maps = torch.cat([features.T.unflatten(1, (h, w)), guide[None].double()])
        return net.sac.conv2(gate(net.sac.conv1(maps[None])[0], net.sac.cbam1)[None])[0, 0]

    scores = [score(*pair) for pair in zip(slots, guides, strict=True)]
    empty = score(torch.zeros(h * w, c).double(), torch.zeros(h, w))
    full = torch.stack([*scores[:-1], *[empty] * (30 - n - 2), scores[-1]])
    shares = gate(full, net.sac.cbam2)[[*range(n + 1), 29]].flatten(1).softmax(0)
    wanted = sum(share[:, None] * slot for share, slot in zip(shares, slots, strict=True))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_interactions_fill_thirty_rows_at_most(parts: dict) -> None:
    """As the authors' samplers do; padding takes part in the attention."""
    encode = PromptEncoder([parts["tokenizer"]], [parts["text_encoder"]])
    layout = Layout((Instance("a ball", (0.1, 0.2, 0.5, 0.7)),))
    width, text = parts["unet"].config.cross_attention_dim, parts["text_encoder"].config.hidden_size
    for rows, filled in ((32, 30), (30, 30), (8, 8)):
        grown = with_fusers(parts["unet"], InteractionEmbedding(text, width, rows))
        guide = make_guide(Adapter("interact"), grown, encode, [layout], False, (64, 64))
        with torch.no_grad(), guide(Moment(0, 50, torch.tensor(1))) as more:
            given = more["cross_attention_kwargs"]["gligen"]
            assert grown.position_net(**given).shape[1] == 3 * filled


@pytest.mark.parametrize("total", [1, 5, 7, 10, 25, 50])
def test_gligen_is_told_as_long_as_in_diffusers(parts: dict, total: int) -> None:
    encode = PromptEncoder([parts["tokenizer"]], [parts["text_encoder"]])
    layout = Layout((Instance("a ball", (0.1, 0.2, 0.5, 0.7)),))
    guide = make_guide(Adapter("gligen"), parts["unet"], encode, [layout], False, (64, 64))
    told = []
    for index in range(total):
        with guide(Moment(index, total, torch.tensor(1))) as more:
            told.append(bool(more))
    assert told == [index < int(0.3 * total) for index in range(total)]


@pytest.mark.parametrize("refined", [False, True])
def test_published_names_at_small_size(tmp_path: Path, refined: bool) -> None:
    """MIGC in LDM's names within ``state_dict``, MIGC++ flat in diffusers': every tensor lands."""
    torch.manual_seed(0)
    small = UNet2DConditionModel(**SMALL)
    state = instance_state(with_instances(small, refined=refined))
    for value in state.values():
        value.copy_(torch.randn_like(value))

    def published(name: str) -> str:
        return "model.diffusion_model." + unet_name(name, 2, ATTENTION).replace("attn2.processor.", "attn2.")

    named = {name if refined else published(name): value.clone() for name, value in state.items()}
    torch.save(named if refined else {"state_dict": named}, tmp_path / "migc.ckpt")
    save_file(read_pickle(tmp_path / "migc.ckpt"), tmp_path / "migc.safetensors")
    kind, loaded = load_adapter(small, tmp_path / "migc.safetensors")
    assert kind == "migc"
    found = instance_state(loaded)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("rows", [30, 32])
def test_interact_diffusion_as_published_at_small_size(tmp_path: Path, rows: int) -> None:
    """The whole ``.pth``: LDM's names without a prefix, the other networks, and a configuration of foreign objects."""
    torch.manual_seed(0)
    small = UNet2DConditionModel(**SMALL)
    state = fuser_state(with_fusers(small, InteractionEmbedding(24, 32, rows)))
    for value in state.values():
        value.copy_(torch.randn_like(value))
    ldm = {
        name if name.startswith("position_net") else unet_name(name, 2, ATTENTION): value.clone()
        for name, value in {**small.state_dict(), **state}.items()
    }
    torch.save(
        {
            "model": ldm, "autoencoder": {"x": torch.zeros(1)}, "text_encoder": {"y": torch.zeros(1)},
            "diffusion": {"betas": torch.zeros(3)}, "config_dict": {"_content": {"a": PurePosixPath("b")}},
        },
        tmp_path / "interact.pth",
    )  # fmt: skip
    save_file(read_pickle(tmp_path / "interact.pth"), tmp_path / "interact.safetensors")
    kind, loaded = load_adapter(small, tmp_path / "interact.safetensors")
    assert kind == "interact"
    assert loaded.position_net.interactions == rows
    found = fuser_state(loaded)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def touch(path: Path) -> None:
    path.touch()


class Trap:
    """Pickled as a call that leaves a trace."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


def test_objects_in_a_pickle_are_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"x": torch.ones(1), "config": Trap(touch, trace)}, tmp_path / "a.pth")
    assert read_pickle(tmp_path / "a.pth")["x"].tolist() == [1]
    torch.save({"x": torch.ones(1), "config": Trap(os.system, f"touch {trace}")}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"or is damaged: it names posix\.system") as e:
        read_pickle(tmp_path / "a.pth")
    assert "\x1b" not in str(e.value)
    torch.save(Trap(touch, trace), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="it names tests"):
        read_pickle(tmp_path / "a.pth")
    assert not trace.exists()


def test_shares_sum_to_one_and_padding_gets_none() -> None:
    torch.manual_seed(0)
    network = InstanceShading(16, 8).double()
    features = torch.randn(2, 5, 9, 16, dtype=torch.float64)  # background, three instances, template
    there = torch.tensor([[True, True, False], [True, True, True]])
    guides = torch.rand(2, 5, 9, 1, dtype=torch.float64)
    same = network.sac(torch.ones_like(features), guides, there, (3, 3))
    torch.testing.assert_close(same, torch.ones_like(same))
    changed = features.clone()
    changed[:, 3] += 100
    before, after = (network.sac(x, guides, there, (3, 3)) for x in (features, changed))
    assert not torch.allclose(before[1], after[1])
    empty = features.clone()
    empty[0, 3], guides[0, 3] = 0, 0
    short = network.sac(empty[:1, [0, 1, 2, 4]], guides[:1, [0, 1, 2, 4]], there[:1, :2], (3, 3))
    torch.testing.assert_close(network.sac(empty, guides, there, (3, 3))[:1], short)
    assert network.sac.slots == INSTANCES + 2


@pytest.mark.parametrize("refined", [False, True])
def test_instance_layers_from_files_of_every_form(unet: UNet2DConditionModel, tmp_path: Path, refined: bool) -> None:
    torch.manual_seed(0)
    trained = with_instances(unet, SITES, refined=refined)
    for value in instance_state(trained).values():
        value.add_(0.1 * torch.randn_like(value))
    layout = told(unet, [[True, True]] * 3)
    wanted = run(trained, layout)
    state = {name: value.clone() for name, value in instance_state(trained).items()}
    save_file(state, tmp_path / "ours.safetensors")
    torch.save({"state_dict": state}, tmp_path / "published.ckpt")
    save_file(read_pickle(tmp_path / "published.ckpt"), tmp_path / "published.safetensors")
    for form in ("ours", "published"):
        kind, loaded = load_adapter(unet, tmp_path / f"{form}.safetensors")
        assert kind == "migc"
        assert torch.equal(run(loaded, layout), wanted), form
    name = next(name for name in state if "sac.conv2.weight" in name)
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "ours.safetensors")
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_instances(unet, tmp_path / "ours.safetensors")
    save_file({**state, "time_embed.0.weight": torch.zeros(1)}, tmp_path / "ours.safetensors")
    with pytest.raises(UserError, match=r"time_embed\.0\.weight is foreign"):
        load_instances(unet, tmp_path / "ours.safetensors")
    with pytest.raises(UserError, match="no transformer nowhere; it has down_blocks"):
        with_instances(unet, ["nowhere"])


def test_gligen_is_diffusers_own_gated_unet(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    width = unet.config.cross_attention_dim
    grown = with_fusers(unet, GLIGENTextBoundingboxProjection(24, width))
    for value in fuser_state(grown).values():
        value.copy_(0.3 * torch.randn_like(value))
    given = {"gligen": {
        "boxes": torch.rand(3, 4, 4), "masks": torch.ones(3, 4), "positive_embeddings": torch.randn(3, 4, 24)
    }}  # fmt: skip
    wanted = run(grown, cross_attention_kwargs=given)
    settings = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    stock = UNet2DConditionModel(**{**settings, "attention_type": "gated"})
    stock.position_net = GLIGENTextBoundingboxProjection(24, width)
    stock.load_state_dict(grown.state_dict())
    assert torch.equal(run(stock, cross_attention_kwargs=given), wanted)
    save_file({name: value.clone() for name, value in stock.state_dict().items()}, tmp_path / "whole.safetensors")
    kind, loaded = load_adapter(unet, tmp_path)
    assert kind == "gligen"
    assert torch.equal(run(loaded, cross_attention_kwargs=given), wanted)
    tuned = copy.deepcopy(unet)
    tuned.add_adapter(LoraConfig(r=1, target_modules=["to_k"]))  # of no effect yet, but it renames what it changes
    assert torch.equal(run(load_adapter(tuned, tmp_path)[1], cross_attention_kwargs=given), wanted)


def ip_adapter(unet: UNet2DConditionModel, tokens: int = 4, embedding: int = 24) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    text = unet.config.cross_attention_dim
    return {
        **{name: 0.3 * torch.randn_like(value) for name, value in attention_names(unet).items()},
        "image_proj.proj.weight": torch.randn(tokens * text, embedding),
        "image_proj.proj.bias": torch.randn(tokens * text),
        "image_proj.norm.weight": torch.ones(text),
        "image_proj.norm.bias": torch.zeros(text),
    }


def test_an_ip_adapter_loads_and_goes_back_to_its_file(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    state = ip_adapter(unet)
    save_file(state, tmp_path / "style.safetensors")
    plain = run(unet)
    kind, grown = load_adapter(unet, tmp_path / "style.safetensors")
    assert kind == "ip-adapter"
    added = {"image_embeds": [torch.randn(3, 1, 24)]}
    assert not torch.allclose(run(grown, added_cond_kwargs=added), plain)
    assert torch.equal(run(unet), plain)
    back = adapter_state(grown)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    save_file(
        {name: value for name, value in state.items() if "ip_adapter.3.to_k" not in name}, tmp_path / "b.safetensors"
    )
    with pytest.raises(UserError, match=r"ip_adapter\.3\.to_k_ip\.weight is missing"):
        load_ip_adapter(unet, tmp_path / "b.safetensors")
    plus = {name.replace("image_proj.proj", "image_proj.proj_in"): value for name, value in state.items()}
    for changed, said in (
        ({**state, "rubbish": torch.zeros(1)}, "rubbish is foreign"),
        ({name: value for name, value in state.items() if name != "image_proj.norm.bias"}, r"norm\.bias is missing"),
        (ip_adapter(unet, tokens=3), r"image_proj\.proj\.weight is \(96, 24\), wanted \(128, 24\)"),
        (plus, "no plain IP-Adapter"),
    ):
        save_file(changed, tmp_path / "b.safetensors")
        with pytest.raises(UserError, match=said):
            load_ip_adapter(unet, tmp_path / "b.safetensors")
    check_encoder(grown, 24, tmp_path)
    with pytest.raises(UserError, match="of width 24, and its image encoder makes 32: put the encoder"):
        check_encoder(grown, 32, tmp_path)


def test_a_file_of_something_else_is_said(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no adapter that is known here: interact, gligen, migc, ip-adapter"):
        load_adapter(unet, tmp_path / "x.safetensors")


@pytest.mark.parametrize("form", ["gligen", "interact"])
def test_what_belongs_to_nothing_is_named(unet: UNet2DConditionModel, tmp_path: Path, form: str) -> None:
    """Beside the grounding layers a file may hold whole published models, and nothing else."""
    width = unet.config.cross_attention_dim
    embedding = InteractionEmbedding(24, width) if form == "interact" else GLIGENTextBoundingboxProjection(24, width)
    state = {name: value.clone() for name, value in fuser_state(with_fusers(unet, embedding)).items()}
    rest = ("model.input_blocks.1.0.x", "model.out.2.bias", "autoencoder.x", "diffusion.betas")
    ldm = {"model.input_blocks.0.0.weight": unet.conv_in.weight.clone(), **{name: torch.zeros(1) for name in rest}}
    diffusers = {name: value.clone() for name, value in unet.state_dict().items()}
    for beside in ({}, ldm, diffusers):
        save_file({**state, **beside}, tmp_path / "a.safetensors")
        assert load_adapter(unet, tmp_path / "a.safetensors")[0] == form
    for beside, said in (
        ({"rubbish": torch.zeros(1)}, "rubbish is foreign"),
        ({"conv_in.weight": torch.zeros(1, 2)}, r"conv_in.weight is \(1, 2\), wanted"),
        ({"model.input_blocks.0.0.weight": torch.zeros(3)}, r"conv_in.weight is \(3,\), wanted"),
        ({"down_blocks.9.x": torch.zeros(1)}, "down_blocks.9.x is foreign"),
    ):
        save_file({**state, **beside}, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=said):
            load_adapter(unet, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="several weight files: name one of a"):
        load_adapter(unet, tmp_path)


def test_who_takes_no_part_is_told_too() -> None:
    boxes = [(0.1 * i, 0.2, 0.1 * i + 0.2, 0.9) for i in range(4)]
    things = tuple(Instance(f"a thing {i}", box) for i, box in enumerate(boxes))
    told = _with_bystanders(Layout(things, (Interaction(3, "kicking", 1),)))
    assert [(one.subject, one.action, one.object) for one in told] == [(3, "kicking", 1), (0, "and", 0), (2, "and", 2)]
    assert len(_with_bystanders(Layout(things))) == 4
