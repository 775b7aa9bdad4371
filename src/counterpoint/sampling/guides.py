"""What a layout means to a model that has an adapter: grounding tokens, instances told, a picture as prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from counterpoint.conditions.layout import Interaction, Layout, Reference
from counterpoint.models import gligen, migc
from counterpoint.sampling.prompt import PromptEncoder
from counterpoint.types import Moment, Notice, UserError

Guide = Callable[[Moment], AbstractContextManager[Mapping[str, Any]]]
"""For one step: what the UNet's call wants besides, and whatever else must hold while it runs."""
UNTIL = {"interact": 1.0, "gligen": 0.3, "migc": 0.5, "ip-adapter": 1.0}
"""Kind of adapter -> the share of the steps after which its networks are not asked any more, as its authors sample.
MIGC++ goes on telling phrases in their boxes without them, to the end; MIGC, as AMDM uses it, does not."""
INTERACTIONS = 30
"""What InteractDiffusion is shown of a layout; padding is seen, so tables with more rows, as some files have, are not
filled further than its authors do."""
TOGETHER = "and"
"""The action of things that do nothing to each other (AMDM's own use of InteractDiffusion for COCO-MIG)."""


class Unseen(Notice):
    """A thing of a layout that an adapter does not see."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A kind of adapter (a key of :data:`UNTIL`), and what reads its reference picture if it has one."""

    kind: str
    image_encoder: CLIPVisionModelWithProjection | None = None
    image_processor: CLIPImageProcessor | None = None


def make_guide(
    adapter: Adapter,
    unet: UNet2DConditionModel,
    encode: PromptEncoder,
    layouts: Sequence[Layout],
    guided: bool,
    size: tuple[int, int],
) -> Guide:
    """A guide for a batch.

    Args:
        adapter: which.
        unet: has it.
        encode: reads phrases.
        layouts: one a picture.
        guided: whether the batch has an unconditional half, before the other; it is told nothing.
        size: height and width of the pictures.

    Raises:
        UserError: a layout has more than the adapter takes.
    """
    if adapter.kind == "ip-adapter":
        told = _pictured(adapter, layouts, guided, size, unet)
        return lambda _: _constant(told)
    if adapter.kind == "interact":
        return _interacting(unet, encode, layouts, guided)
    if adapter.kind == "gligen":
        return _grounded(unet, encode, layouts, guided)
    return _instances(unet, encode, layouts, guided, size)


def warn_if_unseen(kinds: Sequence[str], layout: Layout, size: tuple[int, int]) -> None:
    """Say of which things MIGC will see nothing; the other adapters read boxes as numbers, however small."""
    for one in layout.instances if "migc" in kinds else ():
        if not migc.is_seen(one.box, size):
            warnings.warn(
                f"the box of {one.phrase!r} is too small for migc to see at {size[1]} x {size[0]} pixels: make it 8 or "
                "more wide and high",
                Unseen,
                stacklevel=4,
            )


@contextmanager
def _constant(told: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield told


def _tokens(kind: str, given: dict[str, Tensor], guided: bool) -> Guide:
    """Grounding tokens, as diffusers' UNet takes them; the unconditional half has padding only."""
    rows = {name: torch.cat([torch.zeros_like(value), value]) if guided else value for name, value in given.items()}

    def guide(moment: Moment) -> AbstractContextManager[Mapping[str, Any]]:
        speaks = moment.index < int(UNTIL[kind] * moment.total)  # rounded down, as diffusers' pipelines do
        return _constant({"cross_attention_kwargs": {"gligen": rows}} if speaks else {})

    return guide


def _interacting(unet: UNet2DConditionModel, encode: PromptEncoder, layouts: Sequence[Layout], guided: bool) -> Guide:
    most = min(INTERACTIONS, unet.position_net.interactions)
    several = [_with_bystanders(layout) for layout in layouts]
    _check_count("interact", "interactions, a thing that does nothing counted as one", map(len, several), most)
    read = _reader(encode, [one.phrase for layout in layouts for one in layout.instances]
                   + [one.action for actions in several for one in actions])  # fmt: skip
    boxes = torch.zeros(len(layouts), most, 2, 4)
    phrases = torch.zeros(len(layouts), most, 3, read("").shape[-1])
    there = torch.zeros(len(layouts), most)
    for row, (layout, actions) in enumerate(zip(layouts, several, strict=True)):
        for place, one in enumerate(actions):
            pair = layout.instances[one.subject], layout.instances[one.object]
            boxes[row, place] = torch.tensor([thing.box for thing in pair])
            phrases[row, place] = torch.stack([read(pair[0].phrase), read(pair[1].phrase), read(one.action)])
            there[row, place] = 1
    return _tokens("interact", _placed(unet, boxes=boxes, phrases=phrases, there=there), guided)


def _with_bystanders(layout: Layout) -> tuple[Interaction, ...]:
    """A layout's interactions; whatever takes no part in one is together with itself."""
    busy = {place for one in layout.interactions for place in (one.subject, one.object)}
    others = (place for place in range(len(layout.instances)) if place not in busy)
    return (*layout.interactions, *(Interaction(place, TOGETHER, place) for place in others))


def _grounded(unet: UNet2DConditionModel, encode: PromptEncoder, layouts: Sequence[Layout], guided: bool) -> Guide:
    _check_count("gligen", "things", [len(layout.instances) for layout in layouts], gligen.INSTANCES)
    boxes, there, pooled, _ = _things(encode, layouts, gligen.INSTANCES)
    given = _placed(unet, boxes=boxes, masks=there.float(), positive_embeddings=pooled)
    return _tokens("gligen", given, guided)


def _instances(
    unet: UNet2DConditionModel, encode: PromptEncoder, layouts: Sequence[Layout], guided: bool, size: tuple[int, int]
) -> Guide:
    counts = [len(layout.instances) for layout in layouts]
    _check_count("migc", "things", counts, migc.INSTANCES)
    boxes, there, pooled, phrases = _things(encode, layouts, max(counts))
    given = _placed(unet, phrases=phrases, pooled=pooled)
    given["boxes"] = boxes.to(unet.device)  # whole: half precision would move their edges by pixels
    there = there.to(unet.device)
    if guided:
        given = {name: torch.cat([torch.zeros_like(value), value]) for name, value in given.items()}
        there = torch.cat([torch.zeros_like(there), there])
    told = migc.Told(given["phrases"], given["pooled"], given["boxes"], there, size)
    to_the_end = migc.is_refined(unet)

    @contextmanager
    def guide(moment: Moment) -> Iterator[Mapping[str, Any]]:
        shaded = moment.progress <= UNTIL["migc"]  # as published: 25 of 50 includes the step of index 25
        if not shaded and not to_the_end:
            yield {}
            return
        with migc.telling(unet, told, shaded=shaded):
            yield {}

    return guide


def _pictured(
    adapter: Adapter, layouts: Sequence[Layout], guided: bool, size: tuple[int, int], unet: UNet2DConditionModel
) -> dict[str, Any]:
    """Embeddings of the reference pictures, zeros where there is none, and masks that hold their weights."""
    if adapter.image_encoder is None or adapter.image_processor is None:
        raise UserError("an IP-Adapter wants an image encoder to read its reference with")
    encoder = adapter.image_encoder
    blank = Reference(np.zeros((*size, 3), np.uint8))
    found = [layout.reference or blank for layout in layouts]
    pixels = adapter.image_processor([one.image for one in found], return_tensors="pt").pixel_values
    embeds = encoder(pixels.to(encoder.device, encoder.dtype)).image_embeds[:, None]
    there = torch.tensor([layout.reference is not None for layout in layouts], device=embeds.device)
    embeds = torch.where(there[:, None, None], embeds, 0)
    masks = torch.stack([_weights(one, size) for one in found])
    if guided:
        embeds, masks = torch.cat([torch.zeros_like(embeds), embeds]), torch.cat([masks] * 2)
    return {
        "added_cond_kwargs": {"image_embeds": [embeds.to(unet.device, unet.dtype)]},
        "cross_attention_kwargs": {"ip_adapter_masks": [masks.to(unet.device, unet.dtype)]},
    }


def _weights(reference: Reference, size: tuple[int, int]) -> Tensor:
    """``(1, h, w)``, the reference's weight where it counts."""
    if reference.mask is None:
        return torch.full((1, *size), reference.weight)
    grey = torch.from_numpy(reference.mask.mean(-1, dtype=np.float32) / 255)[None, None]
    return reference.weight * F.interpolate(grey, size, mode="bilinear", antialias=True)[0]


def _things(encode: PromptEncoder, layouts: Sequence[Layout], count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes ``(b, n, 4)``, whether they are there ``(b, n)``, and their phrases' pooled ``(b, n, d)`` and whole
    embeddings ``(b, n, t, d)``; zeros for padding."""
    texts = list(dict.fromkeys(["", *(one.phrase for layout in layouts for one in layout.instances)]))
    whole, pooled = encode.phrases(texts)
    boxes, there = torch.zeros(len(layouts), count, 4), torch.zeros(len(layouts), count, dtype=torch.bool)
    short, long = (
        pooled.new_zeros(len(layouts), count, pooled.shape[1]),
        whole.new_zeros(len(layouts), count, *whole.shape[1:]),
    )
    for row, layout in enumerate(layouts):
        for place, one in enumerate(layout.instances):
            number = texts.index(one.phrase)
            boxes[row, place] = torch.tensor(one.box)
            there[row, place], short[row, place], long[row, place] = True, pooled[number], whole[number]
    return boxes, there, short, long


def _reader(encode: PromptEncoder, texts: Sequence[str]) -> Callable[[str], Tensor]:
    """A phrase -> its one vector; each is encoded once."""
    known = list(dict.fromkeys(["", *texts]))
    pooled = dict(zip(known, encode.phrases(known)[1].cpu(), strict=True))
    return lambda text: pooled[text]


def _placed(unet: UNet2DConditionModel, **tensors: Tensor) -> dict[str, Tensor]:
    return {name: value.to(unet.device, unet.dtype) for name, value in tensors.items()}


def _check_count(kind: str, what: str, counts: Iterable[int], most: int) -> None:
    if (found := max(counts)) > most:
        raise UserError(f"the layout has {found} {what}; {kind} takes at most {most}: leave out {found - most}")
