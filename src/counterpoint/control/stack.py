"""A stack of control branches: which of them run at a step, and how their features become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxControlNetModel
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.control.attach import part_of
from counterpoint.control.keys import KeyValues, Lending, injecting_keys, keeping_keys, self_attention
from counterpoint.control.keys_flux import attention_layers, injecting_flux_keys, keeping_flux_keys
from counterpoint.control.lockstep import Walk, run_lockstep, walk
from counterpoint.control.reuse import Reuse
from counterpoint.control.sites import fuse, shaped, site_names, stacked
from counterpoint.control.weight import Weight
from counterpoint.fusion.add import add
from counterpoint.types import Fusion, Latents, Moment, Residuals, UserError


@dataclass(frozen=True, eq=False)
class Branch:
    """One control: a network, the hint it reads and when it speaks.

    Attributes:
        name: how messages and reports call it.
        network: called as a diffusers ControlNet is.
        hint: condition images in 0..1, one a row of the latents that the host sees, in the network's dtype.
        weights: conditioning scale over the schedule, one for all pictures of a batch, or one each.
        windows: part of the schedule, as ``(start, end)`` in 0..1, outside which the branch is not run; likewise.
        region: how strongly it speaks where, in 0..1, one a row of the latents and at any resolution; ``None`` is
            everywhere.
        decay: what a site's residual loses for every site that is deeper.
        conditional_only: whether it is no part of the unconditional half of a guided batch.
    """

    name: str
    network: nn.Module
    hint: Float[Tensor, "b 3 _ _"]
    weights: tuple[Weight, ...] = (Weight(((0.0, 1.0),)),)
    windows: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    region: Float[Tensor, "b 1 _ _"] | None = None
    decay: float = 1.0
    conditional_only: bool = False
    _cut: dict[tuple[int, ...], Branch] = field(default_factory=dict, init=False, repr=False)
    _hints: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for start, end in self.windows:
            if not 0 <= start < end <= 1:
                raise UserError(
                    f"the window of {self.name} must be START:END with 0 <= START < END <= 1, got {start:g}:{end:g}"
                )

    def scales(self, moment: Moment) -> tuple[float, ...]:
        """The conditioning scale at a step, one for all pictures or one each; 0 means the branch is not run."""
        count = max(len(self.weights), len(self.windows))
        weights = (one.at(moment.progress) for one in self.weights * (count // len(self.weights)))
        inside = (moment.inside(one) for one in self.windows * (count // len(self.windows)))
        found = tuple(weight if speaks else 0.0 for weight, speaks in zip(weights, inside, strict=True))
        return found[:1] if len(set(found)) == 1 else found

    def hints(self, rows: Sequence[int]) -> Float[Tensor, "b 3 _ _"]:
        """The hint of some rows; of all of them, or of the same ones at the next step, the same tensor."""
        if len(rows) == len(self.hint):
            return self.hint
        if (key := tuple(rows)) not in self._hints:
            self._hints[key] = part_of(self.hint, list(rows), self.network)
        return self._hints[key]

    def conditional(self) -> Branch:
        """The branch for the conditional half of a guided batch."""
        half = slice(len(self.hint) // 2, None)
        if () not in self._cut:  # no pictures stand for all of them, halved
            hint, region = part_of(self.hint, half, self.network), None if self.region is None else self.region[half]
            self._cut[()] = replace(self, hint=hint, region=region, conditional_only=False)
        return self._cut[()]

    def rows(self, pictures: Sequence[int], count: int) -> Branch:
        """The branch for some of ``count`` pictures; the same one at every step, for what is known of its hint."""
        if tuple(pictures) not in self._cut:
            rows = _both_halves(pictures, count, len(self.hint))
            self._cut[tuple(pictures)] = replace(
                self,
                hint=part_of(self.hint, rows, self.network),
                region=None if self.region is None else self.region[rows],
                weights=self.weights if len(self.weights) == 1 else tuple(self.weights[one] for one in pictures),
                windows=self.windows if len(self.windows) == 1 else tuple(self.windows[one] for one in pictures),
            )
        return self._cut[tuple(pictures)]


Watch = Callable[[Moment, Sequence[str], Mapping[str, tuple[Tensor, Tensor]]], None]
"""Hears, at every step at which a control is active: the step, the active branches, and for each site their features
``(n, b, ...)`` and the fused one."""


def run_stack(
    branches: Sequence[Branch],
    fusion: Fusion,
    latents: Latents,
    moment: Moment,
    text: Float[Tensor, "b t d"],
    lending: Lending | None = None,
    watch: Watch | None = None,
    added: Mapping[str, Tensor] | None = None,
    reuse: Reuse | None = None,
    rows: Sequence[int] | None = None,
) -> Residuals | None:
    """Run the branches that are active at this step and fuse what they say.

    Args:
        branches: in the user's order.
        fusion: the rule.
        latents: as the host sees them: with classifier-free guidance both halves, unconditional first.
        moment: the step.
        text: prompt embeddings, one a row of ``latents``.
        lending: KV-injection, idle at steps where no foreground or no background is active.
        watch: hears what the rule makes of what the branches said.
        added: what SDXL's networks read besides: ``text_embeds`` and ``time_ids``.
        reuse: foretells what branches say; not where they exchange features or lend keys, who then run at every step.
        rows: which rows of the run's whole batch these are; default all.

    Returns:
        One residual a site, or ``None`` if no branch is active.
    """
    scales = {branch.name: branch.scales(moment) for branch in branches}
    places = list(range(len(latents))) if rows is None else list(rows)
    if any(0 in found and len(found) > 1 for found in scales.values()):
        if lending is not None or watch is not None:
            raise UserError(
                "pictures of a batch hear the same controls at a step where keys are lent or a report is made"
            )
        return _by_active(branches, scales, fusion, latents, moment, text, added, reuse, places)
    active = [branch for branch in branches if scales[branch.name][0] != 0]
    if not active:
        return None
    strengths = {branch.name: _spread(scales[branch.name], branch.hint) for branch in active}
    by_name = {branch.name: branch for branch in active}
    order = surround({name: one.network for name, one in by_name.items()}, fusion, lending, moment, latents.shape)

    def ask(branch: Branch, few: Sequence[int], strength: float | Tensor) -> list[Tensor]:
        everybody = len(few) == len(latents)
        down, mid = branch.network(
            latents if everybody else latents[few],
            moment.timestep,
            text if everybody else text[few],
            branch.hints(few),
            conditioning_scale=strength,
            added_cond_kwargs=added if everybody or added is None else {key: one[few] for key, one in added.items()},
            return_dict=False,
        )
        return [*down, mid]

    def alone(name: str) -> Residuals:
        branch = by_name[name]
        if reuse is None or lending is not None:
            sites = ask(branch, range(len(latents)), strengths[name])
        else:
            answers = reuse.ask(name, moment.time, places, lambda few: ask(branch, few, 1.0))
            sites = [answer * strengths[name] for answer in answers]
        return Residuals(tuple(sites[:-1]), sites[-1])

    def walked(name: str) -> Walk:
        one = by_name[name]
        return walk(one.network, latents, moment.timestep, text, one.hint, strengths[name], added)

    absent = {branch.name for branch in active if branch.conditional_only}
    if fusion.combine is add and not (fusion.sites or fusion.exchange or fusion.keys or watch or absent):
        return _added(fusion, active, alone)
    said = speak(order, fusion, alone, walked)
    spoken = {name: _shaped(said[name], one) for name, one in by_name.items()}
    sites = _fuse_halves(fusion, spoken, absent)
    if watch is not None:
        names = site_names(len(sites))
        heard = zip(names, zip(stacked(spoken, names), sites, strict=True), strict=True)
        watch(moment, list(by_name), dict(heard))
    return Residuals(tuple(sites[:-1]), sites[-1])


def _added(fusion: Fusion, active: Sequence[Branch], alone: Callable[[str], Residuals]) -> Residuals:
    """A sum, branch after branch as diffusers has it: what one of them said need not wait for all others."""
    first, *others = active
    sites = _shaped(alone(first.name), first)
    for branch in others:
        sites = fuse(fusion, {first.name: sites, branch.name: _shaped(alone(branch.name), branch)})
    return Residuals(tuple(sites[:-1]), sites[-1])


def _shaped(said: Residuals, branch: Branch) -> list[Tensor]:
    return shaped([*said.down, said.mid], branch.region, branch.decay)


def _fuse_halves(fusion: Fusion, spoken: Mapping[str, Sequence[Tensor]], absent: set[str]) -> list[Tensor]:
    """Fuse the branches; in the unconditional half without those that are no part of it, since a vector of zeros is
    not silence to every rule."""
    if not absent:
        return fuse(fusion, spoken)
    half = len(next(iter(spoken.values()))[0]) // 2
    with_all = fuse(fusion, {name: [site[half:] for site in sites] for name, sites in spoken.items()})
    others = {name: [site[:half] for site in sites] for name, sites in spoken.items() if name not in absent}
    without = fuse(fusion, others) if others else [torch.zeros_like(site) for site in with_all]
    return [torch.cat(both) for both in zip(without, with_all, strict=True)]


def _by_active(
    branches: Sequence[Branch],
    scales: Mapping[str, tuple[float, ...]],
    fusion: Fusion,
    latents: Latents,
    moment: Moment,
    text: Float[Tensor, "b t d"],
    added: Mapping[str, Tensor] | None,
    reuse: Reuse | None,
    places: Sequence[int],
) -> Residuals | None:
    """Pictures that hear the same controls at this step are run together, so that each is fused as it would be alone:
    a control that is silent for a picture is none of its branches."""
    count = max(len(found) for found in scales.values())
    groups: dict[tuple[bool, ...], list[int]] = {}
    for picture in range(count):
        heard = tuple(found[picture if len(found) > 1 else 0] != 0 for found in scales.values())
        groups.setdefault(heard, []).append(picture)
    whole: list[Tensor] | None = None
    for heard, pictures in groups.items():
        rows = _both_halves(pictures, count, len(latents))
        mine = [branch.rows(pictures, count) for branch, speaks in zip(branches, heard, strict=True) if speaks]
        extra = None if added is None else {name: value[rows] for name, value in added.items()}
        whose = [places[row] for row in rows]
        found = run_stack(mine, fusion, latents[rows], moment, text[rows], added=extra, reuse=reuse, rows=whose)
        if found is None:
            continue
        sites = [*found.down, found.mid]
        whole = whole or [site.new_zeros(len(latents), *site.shape[1:]) for site in sites]
        for place, site in zip(whole, sites, strict=True):
            place[rows] = site
    return None if whole is None else Residuals(tuple(whole[:-1]), whole[-1])


def _both_halves(pictures: Sequence[int], count: int, rows: int) -> list[int]:
    """Rows of a batch, guided or not, that belong to some of its ``count`` pictures."""
    return [picture + start for start in range(0, rows, count) for picture in pictures]


def _spread(scales: tuple[float, ...], hint: Tensor) -> Tensor:
    """One scale for all rows of a batch, or a column of them; no number, for which networks would be compiled anew."""
    if len(scales) == 1:
        return torch.tensor(scales[0], dtype=torch.promote_types(hint.dtype, torch.float32))
    return torch.tensor(scales, dtype=hint.dtype, device=hint.device).repeat(len(hint) // len(scales))[
        :, None, None, None
    ]


def speak(
    order: Mapping[str, AbstractContextManager[None]],
    fusion: Fusion,
    alone: Callable[[str], Any],
    walked: Callable[[str], Walk],
) -> dict[str, Any]:
    """What each branch says: one after the other, or side by side where the rule lets them exchange.

    Args:
        order: of :func:`surround`.
        fusion: the rule.
        alone: runs a branch.
        walked: starts a branch's walk.
    """
    if fusion.exchange is None:
        said = {}
        for name, around in order.items():
            with around:
                said[name] = alone(name)
        return said
    with ExitStack() as stack:
        walks = {}
        for name, around in order.items():
            stack.enter_context(around)
            walks[name] = walked(name)
        return dict(run_lockstep(walks, fusion.exchange, skips=fusion.exchange_skips))


def surround(
    networks: Mapping[str, nn.Module],
    fusion: Fusion,
    lending: Lending | None,
    moment: Moment,
    shape: Sequence[int],
) -> dict[str, AbstractContextManager[None]]:
    """In which order branches run, and what lasts while each does: foregrounds first, where keys are lent.

    Args:
        networks: branch -> its network, of those that are active.
        fusion: the rule.
        lending: KV-injection, idle where no foreground or no background is active.
        moment: the step.
        shape: of the latents that the branches see, ``(b, c, h, w)``.
    """
    keys = fusion.keys
    subjects = lending.masks if lending is not None and lending.active(keys, moment) else {}
    front = [name for name in networks if name in subjects]
    if keys is None or len(front) in {0, len(networks)}:
        return {name: nullcontext() for name in networks}
    masks = torch.stack([_sized(subjects[name], shape) for name in front])
    kept: list[KeyValues] = [{} for _ in front]

    def keeping(network: Any, mine: KeyValues) -> AbstractContextManager[None]:
        keep = keeping_flux_keys if isinstance(network, FluxControlNetModel) else keeping_keys
        return keep(network, mine, keys.layer)

    def injecting(network: Any) -> AbstractContextManager[None]:
        inject = injecting_flux_keys if isinstance(network, FluxControlNetModel) else injecting_keys
        return inject(network, kept, masks, keys.layer)

    return {
        **{name: keeping(networks[name], mine) for name, mine in zip(front, kept, strict=True)},
        **{name: injecting(network) for name, network in networks.items() if name not in subjects},
    }


def attention_widths(network: nn.Module) -> dict[str, int]:
    """A branch's self-attention layers, and how wide their keys are."""
    layers = attention_layers(network) if isinstance(network, FluxControlNetModel) else self_attention(network)
    return {name: getattr(layer.to_k, "out_features", 0) for name, layer in layers.items()}


def _sized(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask for every row of a batch, of which it may be one half, at the latents' size."""
    rows = expand_rows(mask, shape[0], "subject masks")
    return F.interpolate(rows, tuple(shape[2:]), mode="area")


def expand_rows(masks: Tensor, rows: int, what: str) -> Tensor:
    """Masks for every row of a batch: one for all, one each, or one for each row of either half of a guided batch.

    Raises:
        UserError: it is another number.
    """
    if len(masks) == 1:
        return masks.expand(rows, *masks.shape[1:])
    if len(masks) not in {rows, rows / 2}:
        raise UserError(f"{len(masks)} {what} for a batch of {rows}; give one, or one an image")
    return masks.repeat(rows // len(masks), 1, 1, 1)
