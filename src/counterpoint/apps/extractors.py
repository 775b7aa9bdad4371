"""From a photo to a condition image: without a model where that can be done, with the user's model elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from counterpoint.apps.readers import control_readers, of_one
from counterpoint.conditions.plain import PLAIN, Extract
from counterpoint.evaluation.suite import stack, unstack
from counterpoint.models.edge_networks import EDGE_NETWORKS, load_edge_network
from counterpoint.models.load import locate
from counterpoint.types import CONTROL_KINDS, Image, UserError

MODELS = {
    "hed": "ControlNetHED.safetensors (counterpoint models convert ControlNetHED.pth)",
    "lineart": "sk_model.safetensors (counterpoint models convert sk_model.pth)",
    "depth": "Intel/dpt-hybrid-midas or depth-anything/Depth-Anything-V2-Small-hf",
    "seg": "openmmlab/upernet-convnext-small",
}
"""Kind -> models that make its image better, or at all."""


def extractor(kind: str, source: str | None = None, model: str = "tiny") -> Extract:
    """What makes the condition image of a kind.

    Args:
        kind: of control.
        source: for ``hed`` and ``lineart`` a safetensors file, for ``depth`` and ``seg`` a folder or hub id of
            transformers; without one, the way that needs no model, or the judge of ``model``'s folder.
        model: what the image is for: the tiny family's judge reads its scenes.

    Raises:
        UserError: there is no such kind, or nothing that makes its image; the message names models that do.
    """
    if kind not in CONTROL_KINDS:
        raise UserError(f"unknown control {kind!r}; there are {', '.join(CONTROL_KINDS)}")
    if source is None and kind in PLAIN:
        return PLAIN[kind]
    if source is not None and kind not in MODELS:
        raise UserError(f"no model makes {kind} images here; leave it out" if kind in PLAIN else _nothing(kind))
    if source is not None and kind in EDGE_NETWORKS:
        return _drawn(load_edge_network(kind, Path(source)))
    named = {kind: locate(source)} if source is not None else {}
    readers = control_readers(locate(model), named)
    if kind not in readers:
        raise UserError(_nothing(kind))
    return of_one(readers[kind])


def _nothing(kind: str) -> str:
    known = f": name one with --extractor {kind}=MODEL, such as {MODELS[kind]}" if kind in MODELS else ""
    return f"nothing here makes {kind} images from photos{known}"


def _drawn(network: torch.nn.Module) -> Extract:
    @torch.no_grad()
    def extract(photo: Image) -> Image:
        picture = stack([photo])
        height, width = picture.shape[2:]
        drawn: Tensor = network(torch.nn.functional.pad(picture, (0, -width % 4, 0, -height % 4), mode="replicate"))
        return unstack(drawn[..., :height, :width].expand(-1, 3, -1, -1))[0]

    return extract
