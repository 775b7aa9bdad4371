"""MIGC (arXiv:2402.05408) and MIGC++ (arXiv:2407.02329): every thing is shaded by itself, then all are joined.

In a few cross-attention layers each instance is read with its own phrase, inside its own box, and a small network
decides at every place how much of the whole prompt, of each instance and of a layout template becomes the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttentionProcessor
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from jaxtyping import Bool, Float
from safetensors import safe_open
from torch import Tensor, nn

from counterpoint.models.sharing import ldm_block, sharing_copy
from counterpoint.models.weights import check_fit, shapes
from counterpoint.types import Box, UserError

INSTANCES = 28
"""Things a layout can have: thirty slots less those of the background and the template."""
SITES = ("mid_block.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.1.attentions.2")
"""Transformers of Stable Diffusion 1.5 that have the network."""
NAIVE = 10.0
"""How much more an instance counts than the whole prompt inside its box, where there is no network."""
_HEADS, _FREQUENCIES = 8, 8


@dataclass(frozen=True, eq=False)
class Told:
    """What a layout says, for each row of a batch.

    Attributes:
        phrases: ``(b, n, t, d)``, embeddings of the instances' phrases.
        pooled: ``(b, n, d)``, one vector a phrase.
        boxes: ``(b, n, 4)`` as x0, y0, x1, y1 in 0..1.
        there: ``(b, n)``, false for padding; a row without instances, such as an unconditional one, stays plain.
        size: height and width of the picture in pixels.
    """

    phrases: Float[Tensor, "b n t d"]
    pooled: Float[Tensor, "b n d"]
    boxes: Float[Tensor, "b n 4"]
    there: Bool[Tensor, "b n"]
    size: tuple[int, int]
    _masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    @cached_property
    def busy(self) -> tuple[Tensor, Told] | None:
        """Which rows have instances, ``(b,)``, and those alone; ``None`` if none has. Found out once for all layers:
        on an accelerator everything waits for the answer."""
        rows = self.there.any(1)
        if not rows.any():
            return None
        few = {name: getattr(self, name)[rows] for name in ("phrases", "pooled", "boxes", "there")}
        return rows, replace(self, **few)

    def masks(self, tokens: int) -> tuple[Tensor, Tensor]:
        """:func:`box_masks` of layers of a size, made once."""
        if tokens not in self._masks:
            self._masks[tokens] = box_masks(self, tokens)
        return self._masks[tokens]


class InstanceShading(nn.Module):
    """The network of one layer. Sub-modules have the published names.

    Args:
        width: of the layer.
        text_width: of the phrases' embeddings.
        refined: as in MIGC++, where it corrects what :data:`NAIVE` weights give.
        hidden: width of the perceptron that reads boxes.
    """

    def __init__(self, width: int, text_width: int = 768, *, refined: bool = False, hidden: int = 512) -> None:
        super().__init__()
        self.ea = _Attention(width, text_width)
        self.la = _Attention(width, width)
        self.norm = nn.LayerNorm(width)
        self.sac = _Aggregation(width, refined=refined)
        self.pos_net = nn.Module()
        self.pos_net.linears_position = nn.Sequential(
            nn.Linear(2 * 4 * _FREQUENCIES, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, text_width),
        )
        if refined:
            self.gamma = nn.Parameter(torch.zeros(1))

    @property
    def refined(self) -> bool:
        """Whether it is MIGC++'s."""
        return hasattr(self, "gamma")

    def forward(
        self,
        hidden: Float[Tensor, "b s c"],
        whole: Float[Tensor, "b s c"],
        read: Float[Tensor, "b n s c"],
        inside: Float[Tensor, "b n h w"],
        outside: Float[Tensor, "b 1 h w"],
        told: Told,
    ) -> Float[Tensor, "b s c"]:
        """Joined features.

        Args:
            hidden: what goes into the layer.
            whole: the layer's cross-attention with the whole prompt.
            read: the same with each instance's phrase.
            inside: how much of each place is inside which box; zero for padding.
            outside: how much is inside none.
            told: the layout.
        """
        b, n, s, c = read.shape
        height, width = inside.shape[2:]
        masks, rest = inside.reshape(b, n, s, 1), outside.reshape(b, 1, s, 1)
        swapped = told.boxes[..., [0, 2, 1, 3]]  # the published network reads x0, x1, y0, y1
        places = get_fourier_embeds_from_boundingbox(_FREQUENCIES, swapped).to(hidden)
        context = torch.stack([told.pooled, self.pos_net.linears_position(places)], 2).flatten(0, 1)
        queries = self.norm(hidden)[:, None].expand(-1, n, -1, -1).flatten(0, 1)
        enhanced = self.ea(queries, context).view(b, n, s, c) * masks
        # The published MIGC's regions leave out its first instance, whose places then see the mean of all places; its
        # weights were made with that.
        regions = torch.cat([masks if self.refined else masks[:, 1:], rest], 1)[..., 0]
        together = torch.einsum("brs,brt->bst", regions, regions) > 0
        apart = torch.zeros_like(together, dtype=hidden.dtype).masked_fill(~together, torch.finfo(hidden.dtype).min)
        template = self.la(hidden, hidden, apart[:, None])[:, None]
        there = told.there
        if self.refined:
            made = self.sac(torch.cat([enhanced, template], 1), None, there, (height, width))
            return naively(whole, read, inside) + made * self.gamma.tanh()
        shaded = torch.cat([whole[:, None] * rest, read * masks + enhanced, template], 1)
        guides = torch.cat([rest, masks, torch.ones_like(rest)], 1)
        return self.sac(shaded, guides, there, (height, width))


class _Aggregation(nn.Module):
    """The shading aggregation controller: at every place a share for each of the features that could be there.

    The published one shuffles its slots by the global generator; here they keep their order, so that a seed means one
    picture.
    """

    slots = INSTANCES + 2

    def __init__(self, width: int, *, refined: bool) -> None:
        super().__init__()
        if not refined:
            self.conv1 = nn.Conv2d(width + 1, width, 1)
            self.cbam1 = _Gates(width, 16)
        self.conv2 = nn.Conv2d(width, 1, 1)
        self.cbam2 = _Gates(self.slots, 1)

    def forward(
        self,
        features: Float[Tensor, "b k s c"],
        guides: Float[Tensor, "b k s 1"] | None,
        there: Bool[Tensor, "b n"],
        size: tuple[int, int],
    ) -> Float[Tensor, "b s c"]:
        """Features weighed and summed.

        Args:
            features: of the background (only with ``guides``), then the instances, then the template.
            guides: where each is meant to be.
            there: which instances are no padding: padding gets no share.
            size: height and width of the layer.
        """
        b, k = features.shape[:2]
        rows = F.pad(features, (0, 0, 0, 0, 0, 1))  # one more, empty: what padding looks like
        if guides is not None:
            rows = torch.cat([rows, F.pad(guides, (0, 0, 0, 0, 0, 1))], -1)
        maps = rows.flatten(0, 1).transpose(1, 2).unflatten(2, size)
        if guides is not None:
            maps = self.cbam1(self.conv1(maps))
        scores = self.conv2(maps).view(b, k + 1, *size)
        empty = scores[:, -1:].expand(-1, self.slots - k, -1, -1)
        scores = self.cbam2(torch.cat([scores[:, : k - 1], empty, scores[:, k - 1 : k]], 1))
        scores = torch.cat([scores[:, : k - 1], scores[:, -1:]], 1).flatten(2)
        real = torch.ones(b, k, dtype=torch.bool, device=features.device)
        real[:, k - 1 - there.shape[1] : k - 1] = there
        shares = scores.masked_fill(~real[..., None], -torch.inf).softmax(1)
        return torch.einsum("bks,bksc->bsc", shares, features)


class _Gates(nn.Module):
    """CBAM (arXiv:1807.06521): a gate for each channel, then one for each place."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = channels // reduction
        self.ChannelGate = nn.Module()
        self.ChannelGate.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels)
        )
        self.SpatialGate = nn.Module()
        self.SpatialGate.spatial = nn.Module()
        self.SpatialGate.spatial.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        gate = self.ChannelGate.mlp(x.mean((2, 3))) + self.ChannelGate.mlp(x.amax((2, 3)))
        x = x * gate.sigmoid()[..., None, None]
        seen = torch.stack([x.amax(1), x.mean(1)], 1)
        gated: Tensor = x * self.SpatialGate.spatial.conv(seen).sigmoid()
        return gated


class _Attention(nn.Module):
    """Plain attention, no part of the UNet's own: it must not be found among its processors."""

    def __init__(self, width: int, context_width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (one.unflatten(-1, (_HEADS, -1)).transpose(1, 2)
                   for one in (self.to_q(x), self.to_k(context), self.to_v(context)))  # fmt: skip
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        made: Tensor = self.to_out(seen.transpose(1, 2).flatten(2))
        return made


class InstanceProcessor(nn.Module):
    """A cross-attention's processor that shades instances while a layout is told, and else is the one it replaced."""

    def __init__(self, plain: AttentionProcessor, migc: InstanceShading | None) -> None:
        super().__init__()
        self.plain, self.migc = plain, migc
        self.told: Told | None = None
        self.shaded = True

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The layer's output."""
        whole: Tensor = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        told = self.told
        if told is None or told.busy is None:
            return whole
        busy, told = told.busy
        hidden = hidden_states[busy]
        b, n = told.there.shape
        repeated = hidden[:, None].expand(-1, n, -1, -1).flatten(0, 1)
        read = self.plain(attn, repeated, told.phrases.flatten(0, 1)).unflatten(0, (b, n))
        inside, outside = (masks.to(hidden) for masks in told.masks(hidden.shape[1]))
        if self.migc is None or not self.shaded:
            made = naively(whole[busy], read, inside)
        else:
            made = self.migc(hidden, whole[busy], read, inside, outside, told)
        return whole.masked_scatter(busy[:, None, None], made.to(whole.dtype))


def naively(
    whole: Float[Tensor, "b s c"], read: Float[Tensor, "b n s c"], inside: Float[Tensor, "b n h w"]
) -> Float[Tensor, "b s c"]:
    """A mean of the whole prompt and the instances, which count :data:`NAIVE` times inside their boxes."""
    weights = NAIVE * inside.flatten(2)[..., None]
    return (whole + (read * weights).sum(1)) / (1 + weights.sum(1))


def box_masks(told: Told, tokens: int) -> tuple[Float[Tensor, "b n h w"], Float[Tensor, "b 1 h w"]]:
    """Which places of a layer are inside which box, and which inside none, as the published code finds out: filled in
    pixels, brought to the latents' size and then to the layer's, by bilinear interpolation; padding has no inside."""
    height, width = told.size
    x = torch.arange(width, device=told.boxes.device)
    y = torch.arange(height, device=told.boxes.device)
    ends = (told.boxes * told.boxes.new_tensor([width, height, width, height])).long()[..., None]
    across = (x >= ends[..., 0, :]) & (x < ends[..., 2, :])
    down = (y >= ends[..., 1, :]) & (y < ends[..., 3, :])
    filled = (down[..., None] & across[..., None, :] & told.there[..., None, None]).float()
    across_layer, down_layer = width, height
    while across_layer * down_layer > tokens:  # as convolutions of stride 2 halve: what is odd is rounded up
        across_layer, down_layer = -(-across_layer // 2), -(-down_layer // 2)
    both = torch.cat([filled, 1 - filled.amax(1, keepdim=True)], 1)
    latents = F.interpolate(both, (height // 8, width // 8), mode="bilinear")
    masks = F.interpolate(latents, (down_layer, across_layer), mode="bilinear")
    return masks[:, :-1], masks[:, -1:]


def is_seen(box: Box, size: tuple[int, int]) -> bool:
    """Whether anything of a box is left in :func:`box_masks`: interpolation looks at the middle two of eight pixels."""
    x0, y0, x1, y1 = box
    height, width = size
    sides = (range(int(x0 * width), int(x1 * width)), range(int(y0 * height), int(y1 * height)))
    return all(any(pixel % 8 in {3, 4} for pixel in side) for side in sides)


def with_instances(
    unet: UNet2DConditionModel, sites: Sequence[str] = SITES, *, refined: bool = False, hidden: int = 512
) -> UNet2DConditionModel:
    """A UNet that shares all weights with another and can be told a layout.

    Args:
        unet: stays as it is.
        sites: its transformers that have the network, new and untrained.
        refined: MIGC++'s.
        hidden: width of the perceptrons that read boxes.

    Raises:
        UserError: it has no such transformer.
    """
    grown = sharing_copy(unet)
    layers = _cross_attentions(grown)
    if unknown := [site for site in sites if site not in layers]:
        raise UserError(f"this UNet has no transformer {unknown[0]}; it has {', '.join(layers)}")
    text = int(grown.config.cross_attention_dim)
    for site, attention in layers.items():
        network = None
        if site in sites:
            network = InstanceShading(attention.query_dim, text, refined=refined, hidden=hidden)
            network.to(attention.to_q.weight)
        attention.set_processor(InstanceProcessor(attention.processor, network))
    return grown


@contextmanager
def telling(unet: UNet2DConditionModel, told: Told, *, shaded: bool = True) -> Iterator[None]:
    """Tell a UNet of :func:`with_instances` a layout for as long as the block lasts; not ``shaded``, its networks rest
    and every layer joins instances by :data:`NAIVE` weights."""
    processors = [attention.processor for attention in _cross_attentions(unet).values()]
    for processor in processors:
        processor.told, processor.shaded = told, shaded
    try:
        yield
    finally:
        for processor in processors:
            processor.told = None


def is_refined(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet's instance layers are MIGC++'s."""
    return any(isinstance(module, InstanceShading) and module.refined for module in unet.modules())


def instance_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """What :func:`with_instances` added, under MIGC++'s names."""
    return {name: value for name, value in unet.state_dict().items() if ".processor.migc." in name}


def load_instances(unet: UNet2DConditionModel, file: Path) -> UNet2DConditionModel:
    """A UNet with the instance layers of a safetensors file: MIGC's in LDM's names (of a converted ``.ckpt``),
    MIGC++'s, or as trained here.

    Raises:
        UserError: the file is missing, a pickle, damaged, of another UNet, or holds no instance layers.
    """
    held = shapes(file)
    names = {old: _renamed(old) for old in held}
    sites = dict.fromkeys(new.partition(_PROCESSOR)[0] for new in names.values() if _PROCESSOR in new)
    if not sites:
        raise UserError(f"{file} holds no instance layers (migc.ea, migc.sac)")
    found = {new: held[old] for old, new in names.items()}
    refined = any(name.endswith(".migc.gamma") for name in names)
    hidden = next((shape[0] for name, shape in found.items() if name.endswith("linears_position.0.weight")), 512)
    grown = with_instances(unet, list(sites), refined=refined, hidden=hidden)
    check_fit(instance_state(grown), found, file, "this UNet")
    with safe_open(file, "pt") as content:
        tensors = {new: content.get_tensor(old).to(unet.device, unet.dtype) for old, new in names.items()}
    grown.load_state_dict(tensors, strict=False)
    return grown


_PROCESSOR = ".transformer_blocks.0.attn2.processor."


def _renamed(name: str) -> str:
    name = ldm_block(re.sub(r"^(state_dict\.)?(model\.)?(diffusion_model\.)?", "", name))
    return re.sub(r"\.transformer_blocks\.0\.(?:[^.]+\.)*?migc\.", f"{_PROCESSOR}migc.", name)


def _cross_attentions(unet: UNet2DConditionModel) -> Mapping[str, Attention]:
    """Transformer -> its cross-attention."""
    end = ".transformer_blocks.0.attn2"
    return {name.removesuffix(end): module for name, module in unet.named_modules() if name.endswith(end)}
