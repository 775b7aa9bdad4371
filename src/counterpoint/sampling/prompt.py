"""Prompts become embeddings: plain ones exactly as diffusers does, weighted and long ones through compel."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from counterpoint.types import UserError

_WEIGHTED = re.compile(r"[\w)\"'][+-]{2,}|\)[+-]|\)\d|\w[+](?:\s|$|,)|\"\)\.(and|blend)\(")
"""Compel's syntax: ``ball++``, ``(a red ball)1.3``, ``meadow-- ``, ``("part one", "part two").and()``."""


class PromptCut(UserWarning):
    """Part of a prompt did not fit and was left out."""


@torch.no_grad()
def encode_prompts(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]
) -> Float[Tensor, "b t d"]:
    """Embeddings of prompts, all equally long.

    A plain prompt that is longer than the tokenizer takes is cut, with a :class:`PromptCut` warning that names what
    was lost. Weights (``ball++``, ``(a red ball)1.3``) and long prompts (``("part one", "part two").and()``) are
    compel's.
    """
    if not any(_WEIGHTED.search(prompt) for prompt in prompts):
        return _plain(tokenizer, text_encoder, prompts)
    from compel import Compel

    compel = Compel(tokenizer=tokenizer, text_encoder=text_encoder, truncate_long_prompts=False)
    rows = [
        compel(prompt) if _WEIGHTED.search(prompt) else _plain(tokenizer, text_encoder, [prompt]) for prompt in prompts
    ]
    return torch.cat(compel.pad_conditioning_tensors_to_same_length(rows))


def match_length(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, short: Tensor, length: int) -> Tensor:
    """Lengthen embeddings ``(b, t, d)`` to ``length`` tokens with those of the empty prompt."""
    if short.shape[1] >= length:
        return short
    blank = _plain(tokenizer, text_encoder, [""]).repeat(len(short), -(-length // short.shape[1]), 1)
    return torch.cat([short, blank[:, : length - short.shape[1]]], 1)


def _plain(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    limit = tokenizer.model_max_length
    tokens = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    for prompt in prompts:
        whole = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(whole) > limit:
            lost = tokenizer.decode(whole[limit - 1 : -1]).strip()
            warnings.warn(
                f'the prompt is longer than the {limit - 2} tokens this model reads, so this was cut: "{lost}"; '
                'write ("first part", "second part").and() to keep all of it',
                PromptCut,
                stacklevel=4,
            )
    mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    embeddings = text_encoder(
        tokens.input_ids.to(text_encoder.device), attention_mask=None if mask is None else mask.to(text_encoder.device)
    )[0]
    return cast(Tensor, embeddings.to(text_encoder.dtype))


def unweighted(prompt: str) -> str:
    """A prompt without compel's syntax."""
    return re.sub(r"[()\"]|(?<=\w)[+-]+|(?<=\))[\d.]+", "", prompt)


def subject_places(tokenizer: CLIPTokenizer, prompt: str, subject: str) -> list[int]:
    """Positions of a subject's tokens in the embeddings of a prompt without weights.

    Raises:
        UserError: the prompt does not have these words, or has them beyond what the model reads.
    """
    tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
    wanted = tokenizer(subject, add_special_tokens=False).input_ids
    starts = [i for i in range(len(tokens) - len(wanted) + 1) if tokens[i : i + len(wanted)] == wanted]
    if not wanted or not starts:
        raise UserError(f"the subject {subject!r} is not in the prompt; its words are: {prompt}")
    places = [start + i for start in starts for i in range(len(wanted))]
    if max(places) >= tokenizer.model_max_length - 1:
        raise UserError(
            f"the subject {subject!r} stands beyond the {tokenizer.model_max_length - 2} tokens that are read"
        )
    return places
