"""Prompts become embeddings: plain ones exactly as diffusers does, weighted and long ones through compel."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from counterpoint.types import Notice, UserError

_WEIGHTED = re.compile(r"[\w)\"'][+-]{2,}|\)[+-]|\)\d|\w[+](?:\s|$|,)|\"\)\.(and|blend)\(")
"""Compel's syntax: ``ball++``, ``(a red ball)1.3``, ``meadow-- ``, ``("part one", "part two").and()``."""


_PARTS = re.compile(r"\"\)\.(and|blend)\(")


def unweighted(prompt: str) -> str:
    """A prompt's words without compel's weights; a plain prompt is left as it is.

    Raises:
        UserError: compel cannot read them.
    """
    if not _WEIGHTED.search(prompt):
        return prompt
    from compel.prompt_parser import Blend, PromptParser

    try:
        parts = PromptParser().parse_conjunction(prompt).prompts
    except Exception as error:  # of many kinds, which the grammar's own library names
        raise UserError(f"the weights in the prompt {prompt!r} cannot be read: {error}") from None
    flat = [one for part in parts for one in (part.prompts if isinstance(part, Blend) else [part])]
    words = " ".join(fragment.text for one in flat for fragment in one.children)
    return re.sub(r"\s+([,.;:!?])", r"\1", words)


class PromptCut(Notice):
    """Part of a prompt did not fit and was left out."""


class Text(NamedTuple):
    """What a model reads of prompts: a row of embeddings a token, and of models with two text encoders one more row."""

    embeddings: Float[Tensor, "b t d"]
    pooled: Float[Tensor, "b p"] | None = None

    def repeated(self, copies: int) -> Text:
        """Each row several times."""
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(copies, 0)
        return Text(self.embeddings.repeat_interleave(copies, 0), pooled)


@dataclass(frozen=True)
class PromptEncoder:
    """The text encoders of a model: one as Stable Diffusion 1.5 reads it, or two as SDXL does. It remembers what it has
    read, so it is made for one call; models that are aggregated mostly share one."""

    tokenizers: Sequence[CLIPTokenizer]
    text_encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection]
    _prompts: dict[tuple[str, ...], Text] = field(default_factory=dict, init=False, repr=False, compare=False)
    _phrases: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Embeddings of prompts, all equally long.

        A plain prompt that is longer than the tokenizer takes is cut, with a :class:`PromptCut` warning that names
        what was lost. Weights (``ball++``, ``(a red ball)1.3``) and long prompts (``("part one", "part two").and()``)
        are compel's.

        Raises:
            UserError: prompts are not equally long.
        """
        asked = tuple(prompts)
        if asked not in self._prompts:
            self._prompts[asked] = self._encoded(asked)
        return self._prompts[asked]

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str]) -> Text:
        if not any(_WEIGHTED.search(prompt) for prompt in prompts):
            return self._plain(prompts)
        compel = self._compel()
        rows = [self._weighted(compel, [p]) if _WEIGHTED.search(p) else self._plain([p]) for p in prompts]
        if len({row.embeddings.shape[1] for row in rows}) > 1:
            raise UserError(
                "prompts in different numbers of parts cannot share a batch: padding would change the shorter ones"
            )
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return Text(torch.cat([row.embeddings for row in rows]), torch.cat(pooled) if pooled else None)

    @torch.no_grad()
    def phrases(self, texts: Sequence[str]) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p"]]:
        """Plain phrases of things as adapters read them: embeddings, and one vector a phrase. One that is too long is
        cut, with a :class:`PromptCut` warning that names it."""
        new = [text for text in dict.fromkeys(texts) if text not in self._phrases]
        if new:
            read = _read(self.tokenizers[0], self.text_encoders[0], new)
            self._phrases.update(zip(new, zip(read.last_hidden_state, read.pooler_output, strict=True), strict=True))
            for text in new:
                _warn_if_cut(self.tokenizers[0], text, f'the phrase "{text[:40]}..."', "shorten it")
        whole, pooled = zip(*(self._phrases[text] for text in texts), strict=True)
        return torch.stack(whole), torch.stack(pooled)

    def match(self, text: Text, length: int) -> Text:
        """Lengthen embeddings to ``length`` tokens with those of the empty prompt."""
        count, short = text.embeddings.shape[:2]
        if short >= length:
            return text
        blank = self._plain([""]).embeddings.repeat(count, -(-length // short), 1)
        return text._replace(embeddings=torch.cat([text.embeddings, blank[:, : length - short]], 1))

    @staticmethod
    def blank(text: Text, rows: Sequence[bool]) -> Text:
        """Zeros in place of some rows."""
        gone = torch.tensor(rows, device=text.embeddings.device)[:, None]
        pooled = None if text.pooled is None else torch.where(gone, 0, text.pooled)
        return Text(torch.where(gone[..., None], 0, text.embeddings), pooled)

    def _plain(self, prompts: Sequence[str]) -> Text:
        read = [_read(*one, prompts) for one in zip(self.tokenizers, self.text_encoders, strict=True)]
        for prompt in prompts:
            _warn_if_cut(self.tokenizers[0], prompt, "the prompt", _IN_PARTS)
        if len(read) == 1:
            return Text(read[0][0].to(self.text_encoders[0].dtype))
        # SDXL reads the layer before the last of both, and the second one's summary of the prompt.
        return Text(torch.cat([one.hidden_states[-2] for one in read], -1), read[-1][0])

    def _compel(self) -> Any:
        from compel import Compel, ReturnedEmbeddingsType

        if len(self.tokenizers) == 1:
            (tokenizer,), (text_encoder,) = self.tokenizers, self.text_encoders
            return Compel(tokenizer=tokenizer, text_encoder=text_encoder, truncate_long_prompts=False)
        return Compel(
            tokenizer=list(self.tokenizers),
            text_encoder=list(self.text_encoders),
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
            requires_pooled=[False, True],
            truncate_long_prompts=False,
        )

    def _weighted(self, compel: Any, prompts: list[str]) -> Text:
        found = compel(prompts)
        return Text(*found) if isinstance(found, (tuple, list)) else Text(found)


_IN_PARTS = 'write ("first part", "second part").and() to keep all of it'


def _warn_if_cut(tokenizer: CLIPTokenizer, text: str, what: str, advice: str) -> None:
    limit = tokenizer.model_max_length
    whole = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(whole) > limit:
        lost = tokenizer.decode(whole[limit - 1 : -1]).strip()
        warnings.warn(
            f'{what} is longer than the {limit - 2} tokens this model reads, so this was cut: "{lost}"; {advice}',
            PromptCut,
            stacklevel=7,
        )


def _read(tokenizer: CLIPTokenizer, text_encoder: Any, prompts: Sequence[str]) -> Any:
    """A text encoder's output for plain prompts."""
    limit = tokenizer.model_max_length
    tokens = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    return text_encoder(
        tokens.input_ids.to(text_encoder.device),
        attention_mask=None if mask is None else mask.to(text_encoder.device),
        output_hidden_states=True,
    )


def plain_words(prompt: str) -> str:
    """A prompt as its tokens are read: a weighted one without its weights, any other as it is.

    Raises:
        UserError: the prompt is in several parts, whose tokens are read apart.
    """
    if not _WEIGHTED.search(prompt):
        return prompt
    if _PARTS.search(prompt):
        raise UserError("the words of a prompt in several parts cannot be found in the picture: give a subject_mask")
    return re.sub(r"(?<=\))[\d.]+|(?<=[\w)])[+-]+(?!\w)|[()]", "", prompt)


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
