"""KV-injection in FLUX ControlNets (Cross-ControlNet, section 3.3 and appendix A.5).

The paper begins at step 3, with masks of ones, and leaves open who sees whom. Ours: text tokens keep their own
attention; for image tokens the text's keys stay visible inside the mask too, because without them a background would no
longer hear the prompt there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import FluxControlNetModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from counterpoint.control.keys import KeyValues, Masks, Part, attending, from_layer, inject, keeping, split_levels


def attention_layers(network: FluxControlNetModel, first: int = 0) -> dict[str, Any]:
    """Its attention layers by name, those of the double blocks first, from layer ``first`` on."""
    layers = {
        f"{kind}.{number}": block.attn
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for number, block in enumerate(getattr(network, kind))
    }
    return from_layer(network, layers, first)


def keeping_flux_keys(network: FluxControlNetModel, kept: KeyValues, first: int = 0) -> AbstractContextManager[None]:
    """Let a foreground branch leave its keys, before rotation, and its values; what it computes does not change."""
    sources = {name: (layer.norm_k, layer.to_v) for name, layer in attention_layers(network, first).items()}
    return keeping(network, sources, kept)


def injecting_flux_keys(
    network: FluxControlNetModel, foregrounds: Sequence[KeyValues], masks: Masks, first: int = 0
) -> AbstractContextManager[None]:
    """Let a background branch attend to what foreground branches left, inside and outside their masks."""
    tokens = masks.shape[-2] * masks.shape[-1]  # one a place of the masks
    parts = split_levels(masks)(tokens)
    return attending(attention_layers(network, first), lambda name: _Injected(name, foregrounds, tokens, parts))


class _Injected:
    """An attention processor for one layer, of a double block (image and text apart) or a single one (joined)."""

    def __init__(self, name: str, foregrounds: Sequence[KeyValues], tokens: int, parts: Sequence[Part]) -> None:
        self.name, self.foregrounds, self.tokens, self.parts = name, foregrounds, tokens, parts

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        del attention_mask  # FLUX has none

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], -1, attn.head_dim)

        query, key = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text_query = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
            text_key = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
            text_value = heads(attn.add_v_proj(encoder_hidden_states))
            query, key, value = (
                torch.cat(pair, 1) for pair in ((text_query, query), (text_key, key), (text_value, value))
            )
        tokens = self.tokens
        text = query.shape[1] - tokens
        query, key = _rotated(query, image_rotary_emb), _rotated(key, image_rotary_emb)
        places = None if image_rotary_emb is None else tuple(part[text:] for part in image_rotary_emb)
        kept = []
        for foreground in self.foregrounds:
            theirs, values = foreground[self.name]
            turned = _rotated(theirs[:, -tokens:], places)
            kept.append((turned.transpose(1, 2), heads(values)[:, -tokens:].transpose(1, 2)))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        said = torch.nn.functional.scaled_dot_product_attention(query[:, :, :text], key, value)
        heard = inject(
            query[:, :, text:],
            (key[:, :, text:], value[:, :, text:]),
            kept,
            self.parts,
            (key[:, :, :text], value[:, :, :text]),
        )
        mixed = torch.cat([said, heard], 2).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return mixed
        image: Tensor = attn.to_out[1](attn.to_out[0](mixed[:, text:].contiguous()))
        words: Tensor = attn.to_add_out(mixed[:, :text].contiguous())
        return image, words


def _rotated(x: Tensor, rotary: Any) -> Tensor:
    rotated: Tensor = x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)
    return rotated
