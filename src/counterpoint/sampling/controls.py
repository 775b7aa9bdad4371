"""What a call says about its controls, held against the controls there are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from os import PathLike
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import FluxControlNetModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from counterpoint.control.coverage import covered, gates, warn_of_names
from counterpoint.control.keys import Lending
from counterpoint.control.stack import Branch, attention_widths
from counterpoint.control.weight import Weight
from counterpoint.fusion.minimal_impact import BalancedInjection, trained_injection
from counterpoint.models.compiling import closed_by
from counterpoint.sampling.prompt import plain_words, subject_places
from counterpoint.types import Fusion, Notice, UserError

MODES = {
    "balanced": "as trained",
    "prompt": "weaker at fine sites, so that the prompt decides the rest",
    "control": "the same, and absent from the unconditional prediction, so that guidance strengthens it",
}
"""How a control and the prompt share the picture: the control modes of sd-webui-controlnet."""
_DECAY = {"balanced": 1.0, "prompt": 0.825, "control": 0.825}


def listed(images: Any) -> list[Any]:
    """One picture a control, from one picture or several.

    Raises:
        UserError: it is no picture.
    """
    if isinstance(images, (PIL.Image.Image, np.ndarray, Tensor)):
        return [images]
    if isinstance(images, (str, PathLike, Mapping)) or not isinstance(images, Iterable):
        raise UserError(f"a {type(images).__name__} is no picture: give PIL pictures, arrays or tensors")
    return list(images)


def each(what: str, value: Any, names: Sequence[str]) -> list[Any]:
    """One value a control, from one for all or one each.

    Raises:
        UserError: there are more or fewer.
    """
    if value is None or isinstance(value, (Real, str, Weight)):
        return [value] * len(names)
    if len(value) != len(names):
        raise UserError(
            f"{len(value)} values of {what} for {len(names)} controls ({', '.join(names)}); a list has one for each "
            "control"
        )
    return list(value)


def all_weights(value: Any, hints: Mapping[str, Tensor]) -> dict[str, tuple[Weight, ...]]:
    """How strongly each control speaks, one for all pictures or one each.

    Args:
        value: one for all controls, or one each; and of each control one for all pictures, or a list of one each.
        hints: control -> its condition images, one a picture.

    Raises:
        UserError: there are more or fewer, or one makes no sense.
    """
    several = zip(hints, each("weight", value, list(hints)), strict=True)
    return {
        name: tuple(weight if isinstance(weight, Weight) else Weight.parse(weight)
                    for weight in _pictures(one, len(hints[name]), name))
        for name, one in several
    }  # fmt: skip


def where_heard(
    hints: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Sequence[Weight]],
    gated: bool | None,
    fusion: Fusion,
) -> dict[str, Tensor | None]:
    """Where each control speaks, ``(b, 1, h, w)`` in 0..1; ``None`` is everywhere.

    Args:
        hints: control -> its condition images.
        masks: control -> the user's mask, where there is one.
        weights: control -> its weight, one for all pictures or one each; a control of 0 is no control of the picture.
        gated: whether controls without a mask speak only where their image is not silent, if their kind tells that;
            ``None`` leaves that to :func:`counterpoint.control.coverage.gates`, for every picture by itself.
        fusion: the rule, or the schedule of several.
    """
    if gated is None:
        warn_of_names(fusion, list(hints))
    pictures = [
        [name for name, several in weights.items() if several[min(picture, len(several) - 1)].speaks]
        for picture in range(max(map(len, hints.values()), default=0))
    ]
    rows = [gates(gated, fusion, names) for names in pictures]
    found = {name: covered(name, hint) if any(rows) and name not in masks else None for name, hint in hints.items()}
    if not all(rows):
        found = {name: one if one is None else _of_rows(one, rows) for name, one in found.items()}
    return {**found, **masks}


def _of_rows(region: Tensor, rows: Sequence[bool]) -> Tensor:
    """A region in some pictures, everywhere in the others."""
    return region.where(torch.tensor(rows, device=region.device)[:, None, None, None], 1)


def make_branches(
    networks: Mapping[str, nn.Module],
    hints: Mapping[str, Tensor],
    regions: Mapping[str, Tensor | None],
    guided: bool,
    weights: Mapping[str, tuple[Weight, ...]],
    *,
    modes: Any,
    starts: Any,
    ends: Any,
) -> list[Branch]:
    """A model's stack.

    Args:
        networks: of the model, by control.
        hints: of the call, which may have controls that this model lacks.
        regions: likewise.
        guided: whether the batch has an unconditional half.
        weights: likewise, from :func:`all_weights`.
        modes: one for all controls of the call, or one each.
        starts: likewise; and each is one for all pictures, or one each.
        ends: likewise.

    Raises:
        UserError: there are more or fewer of a setting, or one makes no sense.
    """
    names = list(hints)
    modes, starts, ends = (
        each(what, value, names) for what, value in (("control mode", modes), ("start", starts), ("end", ends))
    )
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"unknown control mode {unknown[0]!r}; there are {', '.join(MODES)}")
    return [
        Branch(
            name=name,
            network=networks[name],
            hint=torch.cat([hints[name]] * (2 if guided else 1)),
            weights=weights[name],
            windows=tuple(zip(*_alike(start, end), strict=True)),
            region=_for_both_halves(regions[name], guided),
            decay=_DECAY[mode],
            conditional_only=guided and mode == "control",
        )
        for name, mode, start, end in zip(
            names,
            modes,
            *(
                [_pictures(one, len(hints[name]), name) for name, one in zip(names, several, strict=True)]
                for several in (starts, ends)
            ),
            strict=True,
        )
        if name in networks
    ]


def _for_both_halves(region: Tensor | None, guided: bool) -> Tensor | None:
    return region if region is None or not guided else torch.cat([region] * 2)


def _pictures(value: Any, count: int, name: str) -> list[Any]:
    """A setting of a control: one for all pictures, or one each."""
    if isinstance(value, (Real, str, Weight)):
        return [value]
    if not hasattr(value, "__len__"):
        raise UserError(f"{value!r} is no setting of {name}")
    if len(value) != count:
        raise UserError(f"{len(value)} settings of {name} for {count} pictures; give one for all, or one each")
    return list(value)


def _alike(one: list[Any], other: list[Any]) -> tuple[list[Any], list[Any]]:
    """Two lists, of which one may stand for all, equally long."""
    return one * (len(other) if len(one) == 1 else 1), other * (len(one) if len(other) == 1 else 1)


def check_injection(fusion: Fusion, networks: Mapping[str, nn.Module]) -> None:
    """Hold a rule against the networks that were trained with one way of being taken in, as their configuration says.

    Raises:
        UserError: the rule takes one of them in otherwise.
    """
    for label, network in networks.items():
        wanted = trained_injection(network)
        if isinstance(wanted, BalancedInjection) and any(rule.inject != wanted for rule in fusion.rules):
            raise UserError(
                f"the control {label} was trained to be taken in by {wanted.rule}, and {fusion.name} does otherwise: "
                "choose that rule"
            )


def check_reach(fusion: Fusion, lending: Lending | None, networks: Iterable[nn.Module]) -> None:
    """Hold a rule against networks that cannot be reached into.

    Raises:
        UserError: the rule would have to.
    """
    closed = next(filter(None, map(closed_by, networks)), None)
    if closed and (fusion.walks or fusion.injects or lending is not None):
        raise UserError(f"{fusion.name} reaches into the networks, {closed}")


def check_foreground(
    rule: Fusion, networks: Mapping[str, nn.Module], foreground: Sequence[str], told: int
) -> list[str]:
    """The controls that show the subject; default the first.

    Args:
        rule: the fusion.
        networks: control -> its network.
        foreground: as the user names them.
        told: how many subjects are named or shown.

    Raises:
        UserError: the rule lends no keys, or foregrounds, subjects and controls do not fit.
    """
    if not rule.keys:
        if foreground or told:
            raise UserError(f"the fusion {rule.name} lends no keys: foreground and subject belong to cross")
        return []
    front = list(foreground) or list(networks)[:1]
    if unknown := [name for name in front if name not in networks]:
        raise UserError(f"the foreground {unknown[0]!r} is no control; there are {', '.join(networks)}")
    if len(set(front)) < len(front):
        raise UserError(f"a foreground is named twice: {', '.join(front)}")
    if len(front) == len(networks) > 1:
        raise UserError(f"every control ({', '.join(networks)}) is a foreground; {rule.name} needs one that is not")
    if rule.walks and len(set(map(id, networks.values()))) < len(networks):
        raise UserError(f"{rule.name} runs the controls side by side: two of them cannot share one network")
    if told and told != len(front):
        raise UserError(f"{told} subjects for {len(front)} foregrounds ({', '.join(front)}); give one each")
    if told or any(isinstance(network, FluxControlNetModel) for network in networks.values()):
        _check_layers(networks, front)
    return front


def _check_layers(networks: Mapping[str, nn.Module], front: Sequence[str]) -> None:
    """Whatever attends to lent keys must find them."""
    layers = {name: attention_widths(network) for name, network in networks.items()}
    for name in networks:
        for lender in front if name not in front else ():
            missing = [layer for layer, width in layers[name].items() if layers[lender].get(layer) != width]
            if missing:
                raise UserError(
                    f"the foreground {lender} has no keys for {len(missing)} of the {len(layers[name])} self-attention "
                    f"layers of {name} ({missing[0]} is the first): make {name} the foreground, or fuse by pix+channel"
                )


class NoSubject(Notice):
    """A rule that lends keys was not told where the subject is."""


NO_SUBJECT = "lends keys only where it knows the subject: name its words with subject, or give a subject_mask"


def find_lending(
    rule: Fusion,
    networks: Mapping[str, nn.Module],
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    foreground: str | Sequence[str] | None,
    subject: str | Sequence[str] | None,
    masks: Sequence[Tensor],
) -> Lending | None:
    """KV-injection, if the rule has it, there are two controls and somebody says where the subject is.

    Args:
        rule: the fusion.
        networks: control -> its network.
        tokenizer: of the model's first text encoder.
        prompts: one an image.
        foreground: names of the controls that show the subject; default the first.
        subject: words of the prompt, one for each foreground.
        masks: in place of ``subject``: where each foreground is, ``(b, 1, h, w)``.

    Raises:
        UserError: the rule lends no keys, or the settings do not fit the controls.
    """
    if subject and masks:
        raise UserError("subject and subject_mask both say where the subject is: give one of them")
    front, words = ([text] if isinstance(text, str) else list(text or ()) for text in (foreground, subject))
    told = masks or words
    front = check_foreground(rule, networks, front, len(told))
    if not rule.keys or len(networks) < 2:
        return None
    if not told:
        warnings.warn(f"{rule.name} {NO_SUBJECT}", NoSubject, stacklevel=4)
        return None
    if masks:
        return Lending({}, dict(zip(front, masks, strict=True)))
    places = [[subject_places(tokenizer, plain_words(prompt), one) for prompt in prompts] for one in words]
    return Lending(dict(zip(front, places, strict=True)))
