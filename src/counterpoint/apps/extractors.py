"""From a photo to a condition image: without a model where that can be done, with the user's model elsewhere."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from counterpoint.apps.annotators import pose_annotator, segment_annotator
from counterpoint.apps.readers import control_readers, of_one
from counterpoint.conditions.normals import normals
from counterpoint.conditions.plain import PLAIN, Extract
from counterpoint.conditions.recognise import WrongPicture
from counterpoint.conditions.scribble import strokes
from counterpoint.evaluation.suite import stack, unstack
from counterpoint.models.edge_networks import load_edge_network
from counterpoint.models.load import locate
from counterpoint.types import Image, UserError, known_kind

_HED = "ControlNetHED.safetensors (counterpoint models convert ControlNetHED.pth --trust-pickle)"
_DEPTH = "Intel/dpt-hybrid-midas or depth-anything/Depth-Anything-V2-Small-hf"
MODELS = {
    "hed": _HED,
    "scribble": _HED,
    "lineart": "sk_model.safetensors (counterpoint models convert sk_model.pth --trust-pickle), or netG for anime",
    "depth": _DEPTH,
    "normal": f"{_DEPTH}, whose depth becomes normals",
    "seg": "openmmlab/upernet-convnext-small",
    "pose": "usyd-community/vitpose-base-simple, or two with a comma: PekingU/rtdetr_r50vd as well, which finds people",
    "sam": "facebook/sam-vit-base",
}
"""Kind -> models that make its image better, or at all."""
JUDGED = ("depth", "normal", "seg", "pose")
"""Kinds that a family's judge reads from its scenes."""


def extractor(kind: str, source: str | None = None, model: str | None = None) -> Extract:
    """What makes the condition image of a kind.

    Args:
        kind: of control.
        source: for ``hed``, ``scribble`` and ``lineart`` a safetensors file, for the others a folder or hub id of
            transformers, for ``pose`` one or two with a comma, or a family with a judge, such as ``tiny``, which reads
            its own scenes; without one, the way that needs no model, or the judge of ``model``.
        model: what the image is for, if anything.

    Raises:
        UserError: there is no such kind, or nothing that makes its image; the message names models that do.
    """
    known_kind(kind)
    if source is None and kind in PLAIN:
        return PLAIN[kind]
    if source is None:
        judged = {} if model is None else _judged(locate(model))
        if kind not in judged:
            option = "--model " if model is None else f"--extractor {kind}="
            scenes = f"; {option}tiny reads the tiny family's scenes" if kind in JUDGED else ""
            raise UserError(
                f"nothing makes {kind} images of photos without a model: fetch {MODELS[kind]}, and name it with "
                f"{option}MODEL{scenes}"
            )
        warnings.warn(
            f"{kind} is read by {model}'s own judge, which knows its family's scenes only: name a model for other "
            f"photos, --extractor {kind}=MODEL",
            WrongPicture,
            stacklevel=2,
        )
        return judged[kind]
    if kind not in MODELS:
        raise UserError(f"no model makes {kind} images here; leave it out")
    if kind in {"hed", "scribble", "lineart"}:
        drawn = _drawn(load_edge_network("hed" if kind == "scribble" else kind, Path(source)))
        return (lambda photo: strokes(drawn(photo))) if kind == "scribble" else drawn
    first, _, second = source.partition(",") if kind == "pose" else (source, "", "")
    folder = locate(first)
    if kind in JUDGED and (folder / "judges" / "a").is_dir():
        return _judged(folder)[kind]
    if kind == "pose":
        return pose_annotator(folder, locate(second) if second else None)
    if kind == "sam":
        return segment_annotator(folder)
    read = "depth" if kind == "normal" else kind
    made = of_one(control_readers(folder, {read: folder})[read])
    return (lambda photo: normals(made(photo))) if kind == "normal" else made


def _judged(folder: Path) -> dict[str, Extract]:
    """What the judge of a model's folder reads, if it has one."""
    made = {read: of_one(reader) for read, reader in control_readers(folder, {}).items() if read in JUDGED}
    if "depth" in made:
        depth = made["depth"]
        made["normal"] = lambda photo: normals(depth(photo))
    return made


def _drawn(network: torch.nn.Module) -> Extract:
    """Sides are padded to what the networks halve: multiples of 4, and at least 16."""

    @torch.no_grad()
    def extract(photo: Image) -> Image:
        picture = stack([photo])
        height, width = picture.shape[2:]
        more = (0, max(16 - width, -width % 4), 0, max(16 - height, -height % 4))
        drawn: Tensor = network(torch.nn.functional.pad(picture, more, mode="replicate"))
        return unstack(drawn[..., :height, :width].expand(-1, 3, -1, -1))[0]

    return extract
