"""Maps of a subject from the host's cross-attention."""

from __future__ import annotations

import pytest
import torch

from counterpoint.control.subject import SubjectMap, watching
from counterpoint.sampling.prompt import plain_words, subject_places
from counterpoint.types import UserError


@torch.no_grad()
def test_maps_are_the_mean_of_the_probabilities(parts: dict) -> None:
    """Beside a slow reading: diffusers' own attention scores of every layer at the level nearest to 16."""
    unet = parts["unet"]
    latents, text = torch.randn(4, 4, 8, 8), torch.randn(4, 24, 32)  # two samples, guided
    plain = unet(latents, torch.tensor(300), text, return_dict=False)[0]
    layers = [m for n, m in unet.named_modules() if n.endswith("attn2") and not n.startswith("mid")]
    seen: list[torch.Tensor] = []
    handles = []
    for layer in layers:

        def note(module, args, kwargs, output, layer=layer) -> None:
            hidden, words = args[0], kwargs["encoder_hidden_states"]
            query, key = layer.head_to_batch_dim(layer.to_q(hidden)), layer.head_to_batch_dim(layer.to_k(words))
            scores = layer.get_attention_scores(query, key).reshape(4, layer.heads, -1, 24)
            seen.append(scores[2:].mean(1)[..., [2, 3]].mean(-1))

        handles.append(layer.register_forward_hook(note, with_kwargs=True))
    unet(latents, torch.tensor(300), text)
    for handle in handles:
        handle.remove()
    with watching(unet, [[2, 3], [2, 3]], (8, 8)) as found:
        got = unet(latents, torch.tensor(300), text, return_dict=False)[0]
    assert torch.equal(got, plain)
    torch.testing.assert_close(found.total, sum(seen), rtol=1e-4, atol=1e-6)
    assert not any(module._forward_hooks for module in unet.modules())
    mask = found.mask()
    assert mask.shape == (2, 1, 8, 8)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_mask_of_a_blob() -> None:
    found = SubjectMap([[1]], (16, 16), 0)
    found.total = torch.zeros(1, 256)
    found.total.reshape(16, 16)[4:8, 4:8] = 1
    mask = found.mask()[0, 0]
    assert mask[5:7, 5:7].all()
    assert mask.sum() <= 16
    found.total = torch.ones(1, 256)
    assert not found.mask().any()  # nowhere more than elsewhere


def test_places_of_words(parts: dict) -> None:
    tokenizer = parts["tokenizer"]
    assert subject_places(tokenizer, "a person on a meadow", "person") == [2]
    assert subject_places(tokenizer, "a red ball on a red meadow", "red") == [2, 6]
    assert subject_places(tokenizer, plain_words("a (red ball)1.3 on meadow"), "red ball") == [2, 3]
    assert subject_places(tokenizer, plain_words("a person++ on meadow"), "person") == [2]
    assert plain_words("a well-dressed man (left) - and a dog") == "a well-dressed man (left) - and a dog"
    assert plain_words("a well-dressed man++ (left)1.2 and a t-shirt-") == "a well-dressed man left and a t-shirt"
    with pytest.raises(UserError, match="give a subject_mask"):
        plain_words('("a person", "a dog").and()')
    with pytest.raises(UserError, match="its words are: a person"):
        subject_places(tokenizer, "a person", "ball")
    with pytest.raises(UserError, match="beyond"):
        subject_places(tokenizer, "a red " * 20 + "ball", "ball")
