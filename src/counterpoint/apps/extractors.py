"""From a photo to a condition image: without a model where that can be done, with the user's model elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from counterpoint.apps.annotators import pose_annotator, segment_annotator
from counterpoint.apps.readers import control_readers, of_one
from counterpoint.conditions.normals import normals
from counterpoint.conditions.plain import PLAIN, Extract
from counterpoint.conditions.scribble import strokes
from counterpoint.evaluation.suite import stack, unstack
from counterpoint.models.edge_networks import load_edge_network
from counterpoint.models.load import locate
from counterpoint.types import Image, UserError, known_kind

_HED = "ControlNetHED.safetensors (counterpoint models convert ControlNetHED.pth)"
_DEPTH = "Intel/dpt-hybrid-midas or depth-anything/Depth-Anything-V2-Small-hf"
MODELS = {
    "hed": _HED,
    "scribble": _HED,
    "lineart": "sk_model.safetensors (counterpoint models convert sk_model.pth)",
    "depth": _DEPTH,
    "normal": f"{_DEPTH}, whose depth becomes normals",
    "seg": "openmmlab/upernet-convnext-small",
    "pose": "usyd-community/vitpose-base-simple, or two with a comma: PekingU/rtdetr_r50vd as well, which finds people",
    "sam": "facebook/sam-vit-base",
}
"""Kind -> models that make its image better, or at all."""


def extractor(kind: str, source: str | None = None, model: str = "tiny") -> Extract:
    """What makes the condition image of a kind.

    Args:
        kind: of control.
        source: for ``hed``, ``scribble`` and ``lineart`` a safetensors file, for the others a folder or hub id of
            transformers, for ``pose`` one or two with a comma; without one, the way that needs no model, or the judge
            of ``model``'s folder.
        model: what the image is for: the tiny family's judge reads its scenes.

    Raises:
        UserError: there is no such kind, or nothing that makes its image; the message names models that do.
    """
    known_kind(kind)
    if source is None:
        return PLAIN[kind] if kind in PLAIN else _judged(kind, model)
    if kind not in MODELS:
        raise UserError(f"no model makes {kind} images here; leave it out")
    if kind in {"hed", "scribble", "lineart"}:
        drawn = _drawn(load_edge_network("hed" if kind == "scribble" else kind, Path(source)))
        return (lambda photo: strokes(drawn(photo))) if kind == "scribble" else drawn
    if kind == "pose":
        estimator, _, detector = source.partition(",")
        return pose_annotator(locate(estimator), locate(detector) if detector else None)
    if kind == "sam":
        return segment_annotator(locate(source))
    read = "depth" if kind == "normal" else kind
    made = of_one(control_readers(locate(model), {read: locate(source)})[read])
    return (lambda photo: normals(made(photo))) if kind == "normal" else made


def _judged(kind: str, model: str) -> Extract:
    """What the judge of a model's folder reads."""
    readers = control_readers(locate(model), {})
    if kind == "normal" and "depth" in readers:
        depth = of_one(readers["depth"])
        return lambda photo: normals(depth(photo))
    if kind not in readers:
        raise UserError(
            f"nothing here makes {kind} images from photos: name one with --extractor {kind}=MODEL, such as "
            f"{MODELS[kind]}"
        )
    return of_one(readers[kind])


def _drawn(network: torch.nn.Module) -> Extract:
    @torch.no_grad()
    def extract(photo: Image) -> Image:
        picture = stack([photo])
        height, width = picture.shape[2:]
        drawn: Tensor = network(torch.nn.functional.pad(picture, (0, -width % 4, 0, -height % 4), mode="replicate"))
        return unstack(drawn[..., :height, :width].expand(-1, 3, -1, -1))[0]

    return extract
