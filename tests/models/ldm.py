"""The published LDM layout of Stable Diffusion 1.5, as a rule from diffusers' names. Facts of the format, for tests."""

from __future__ import annotations

import re

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _resnet(rest: str) -> str:
    head, _, tail = rest.partition(".")
    return f"{_RESNET[head]}.{tail}"


def _part(kind: str, rest: str) -> str:
    return f"0.{_resnet(rest)}" if kind == "resnets" else f"1.{rest}"


def unet_name(name: str, layers: int, attention: tuple[bool, ...]) -> str:
    """LDM's name of a diffusers UNet tensor.

    Args:
        name: diffusers' name.
        layers: layers per block.
        attention: whether each up block has attention.
    """
    fixed = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for ours, theirs in fixed.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", name):
        i, j = int(match[1]), int(match[3])
        if match[2] == "downsamplers":
            return f"input_blocks.{(i + 1) * (layers + 1)}.0.op.{match[4].removeprefix('conv.')}"
        return f"input_blocks.{1 + i * (layers + 1) + j}.{_part(match[2], match[4])}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        rest = _resnet(match[3]) if match[1] == "resnets" else match[3]
        return f"middle_block.{2 * int(match[2]) if match[1] == 'resnets' else 1}.{rest}"
    match = re.fullmatch(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", name)
    assert match, name
    i, j = int(match[1]), int(match[3])
    if match[2] == "upsamplers":
        return f"output_blocks.{i * (layers + 1) + layers}.{2 if attention[i] else 1}.{match[4]}"
    return f"output_blocks.{i * (layers + 1) + j}.{_part(match[2], match[4])}"


def controlnet_name(name: str, layers: int, hints: int) -> str:
    """LDM's name of a diffusers ControlNet tensor; ``hints`` is the number of the hint encoder's inner convolutions."""
    if match := re.fullmatch(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d+))\.(.*)", name):
        place = {"conv_in": 0, "conv_out": 2 + 2 * hints}.get(match[1], 2 + 2 * int(match[2] or 0))
        return f"control_model.input_hint_block.{place}.{match[3]}"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.*)", name):
        return f"control_model.zero_convs.{match[1]}.0.{match[2]}"
    if name.startswith("controlnet_mid_block."):
        return f"control_model.middle_block_out.0.{name.removeprefix('controlnet_mid_block.')}"
    return f"control_model.{unet_name(name, layers, ())}"


def vae_name(name: str, levels: int) -> str:
    """LDM's name of a diffusers AutoencoderKL tensor."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for ours, theirs in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
