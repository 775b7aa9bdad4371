"""The hand-built tokenizer: every scene word is one token, everything else is spelled."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer

from counterpoint.data.scenes.caption import words
from counterpoint.data.scenes.render import scene
from counterpoint.models.tokenizer import word_tokenizer
from counterpoint.recipes.tiny import TOKENS


def test_every_word_is_one_token() -> None:
    tokenizer = word_tokenizer(words(), TOKENS)
    assert all(len(tokenizer(word).input_ids) == 3 for word in words())


def test_it_is_the_same_every_time_and_survives_saving(tmp_path: Path) -> None:
    text = "a photo of a Red striped ball on a meadow, zebra 7!"
    one, two = word_tokenizer(words(), 24), word_tokenizer(reversed(words()), 24)
    one.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert one(text).input_ids == two(text).input_ids == again(text).input_ids
    assert again.model_max_length == 24
    assert "zebra" in one.decode(one(text).input_ids)


def test_captions_fit() -> None:
    tokenizer = word_tokenizer(words(), TOKENS)
    captions = [scene(number, content="things").caption for number in range(300)]
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= TOKENS
