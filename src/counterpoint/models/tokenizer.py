"""A CLIP tokenizer that knows given words as one token each and spells everything else in bytes."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def word_tokenizer(words: Iterable[str], length: int) -> CLIPTokenizer:
    """Build the byte-pair vocabulary by hand, so that it is the same on every machine.

    Args:
        words: lower-case words that become one token each.
        length: tokens a prompt is padded or cut to, start and end included.
    """
    letters = _byte_letters()
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        pieces = _apply(merges, [*word[:-1], f"{word[-1]}</w>"])
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            vocabulary.append(pieces[0] + pieces[1])
            pieces = _apply(merges, pieces)
    vocabulary += [START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        model_max_length=length,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )


def _apply(merges: list[tuple[str, str]], pieces: list[str]) -> list[str]:
    """Byte-pair encoding: the merge that was learned first goes first, everywhere in the word."""
    for left, right in merges:
        joined, position = [], 0
        while position < len(pieces):
            if pieces[position : position + 2] == [left, right]:
                joined.append(left + right)
                position += 2
            else:
                joined.append(pieces[position])
                position += 1
        pieces = joined
    return pieces


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(rest))]
