"""The networks that look at finished pictures: a family's own, or a user's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    AutoTokenizer,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from counterpoint import models
from counterpoint.apps.detectors import by_classes, load_detector, load_mask_generator
from counterpoint.conditions.openpose import draw_pose
from counterpoint.conditions.plain import PLAIN, Extract
from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.data.scenes.maps import SEG_PALETTE
from counterpoint.data.scenes.vocabulary import PERSON, SEG_INDEX
from counterpoint.evaluation.suite import Readers, stack, unstack
from counterpoint.metrics.maps import nearest_colour
from counterpoint.metrics.niqe import Pristine
from counterpoint.models.inception import load_inception
from counterpoint.models.load import load_diffusers, locate
from counterpoint.models.perception import Reading
from counterpoint.models.weights import weight_files
from counterpoint.types import Image, UserError

READ = ("depth", "seg")
"""Kinds of control whose reader a user names; canny and soft edges need no network."""
_CPU = torch.device("cpu")
FIND = ("detect", "segment")
"""What else a user names a network for: what finds things, and what cuts them out."""
Read = Callable[[Tensor], Tensor]
"""What reads condition images back from pictures, both ``(b, 3, h, w)`` in 0..1."""
Maps = dict[str, Read]
"""Kind -> what reads it."""


def of_many(extract: Extract) -> Read:
    """An extractor as a reader of batches."""
    return lambda pictures: stack([extract(image) for image in unstack(pictures)])


def of_one(read: Read) -> Extract:
    """A reader of batches as an extractor."""
    return lambda photo: unstack(read(stack([photo])))[0]


_EDGES = {kind: of_many(PLAIN[kind]) for kind in ("canny", "hed", "lineart")}


def check_named(named: Mapping[str, object], known: Sequence[str] = READ) -> None:
    """Hold what readers are named for against what they can be.

    Raises:
        UserError: there is no reader of such a kind.
    """
    if unknown := sorted(set(named) - set(known)):
        raise UserError(f"--reader {unknown[0]}: readers are named for {', '.join(known)}")


def control_readers(folder: Path, named: Mapping[str, Path]) -> Maps:
    """Whatever can read controls back: extractors, the judge of a model's folder if it has one, networks by name.

    Raises:
        UserError: a named folder holds no such model, or there is no reader of such a kind.
    """
    check_named(named)
    own = _judge(folder, "a", _CPU).maps if (folder / "judges" / "a").is_dir() else {}
    makers = {"depth": _depths, "seg": lambda path, device: _coloured(_segmenter(path, device), ADE20K_PALETTE)}
    return {**_EDGES, **own, **{kind: makers[kind](path, _CPU) for kind, path in named.items()}}


class _Judge(NamedTuple):
    """A family's judge as readers of controls, of classes, and of a person's joints."""

    maps: Maps
    classes: Read
    joints: Read


def _judge(folder: Path, name: str, device: torch.device) -> _Judge:
    judge = load_diffusers(folder / "judges" / name).eval().to(device)

    def read(pictures: Tensor) -> Reading:
        height, width = pictures.shape[2:]
        whole = F.pad(pictures.to(device), (0, -width % 16, 0, -height % 16), mode="replicate")
        return Reading(*(one[..., :height, :width] for one in judge(whole * 2 - 1)))

    def classes(pictures: Tensor) -> Tensor:
        return read(pictures).seg.argmax(1).cpu()

    def pose(pictures: Tensor) -> Tensor:
        size = pictures.shape[2:]
        return stack([draw_pose([one.numpy()], *size) for one in _points(read(pictures).joints, 0.3)])

    maps = {
        "depth": lambda pictures: read(pictures).depth.expand(-1, 3, -1, -1).cpu(),
        "seg": _coloured(classes, SEG_PALETTE),
        "pose": pose,
    }
    return _Judge(maps, classes, lambda pictures: _points(read(pictures).joints, 0.1))


def family_readers(folder: Path, device: torch.device = _CPU, *, judge: str = "a") -> Readers:
    """A judge and the towers of a family's folder as readers of its pictures."""
    maps, classes, joints = _judge(folder, judge, device)
    embed_pictures, embed_texts = load_clip(
        *(folder / part for part in ("image_encoder", "text_encoder", "tokenizer")), device
    )
    detect, segment = by_classes(classes, SEG_INDEX)
    return Readers(
        maps={**_EDGES, **maps},
        person=lambda pictures: classes(pictures) == PERSON,
        joints=joints,
        classes=classes,
        classes_of=partial(_classes_of, SEG_PALETTE),
        embed_pictures=embed_pictures,
        embed_texts=embed_texts,
        pristine=load_pristine(),
        features=embed_pictures,
        features_of="tower",
        detect=detect,
        segment=segment,
    )


def user_readers(
    folders: Mapping[str, Path], clip: Path, inception: Path | None = None, device: torch.device = _CPU
) -> Readers:
    """Networks in transformers' folders as readers of pictures of any size.

    Args:
        folders: ``depth`` -> a depth estimator whose output grows towards the viewer (DPT, Depth Anything), stretched
            to 0..1 a picture; ``seg`` -> a segmenter with ADE20K's 150 classes; ``detect`` -> GroundingDINO;
            ``segment`` -> SAM. One that is not named is missed when it is needed.
        clip: a CLIP model.
        inception: file with the Inception weights, for distances between sets; without it they stand on CLIP.
        device: where the networks run.

    Raises:
        UserError: a folder holds no such model.
    """
    made: dict[str, Any] = {
        kind: make(folders[kind], device) if kind in folders else _absent(kind)
        for kind, make in {
            "depth": _depths,
            "seg": _segmenter,
            "detect": load_detector,
            "segment": load_mask_generator,
        }.items()
    }
    embed_pictures, embed_texts = load_clip(clip, clip, clip, device)
    features = embed_pictures
    if inception is not None:
        network = load_inception(inception).to(device)
        features = torch.no_grad()(lambda pictures: network(pictures.to(device)).cpu())
    return Readers(
        maps={**_EDGES, "depth": made["depth"], "seg": _coloured(made["seg"], ADE20K_PALETTE)},
        person=lambda pictures: made["seg"](pictures) == _PERSON_OF_ADE20K,
        joints=_absent("joints"),
        classes=made["seg"],
        classes_of=partial(_classes_of, ADE20K_PALETTE),
        embed_pictures=embed_pictures,
        embed_texts=embed_texts,
        pristine=load_pristine(),
        features=features,
        features_of="clip" if inception is None else "inception",
        detect=made["detect"],
        segment=made["segment"],
    )


def weights_file(source: Path) -> Path:
    """A file of weights, or the only one of a folder or a hub id.

    Raises:
        UserError: it is not there, or there are several.
    """
    place = locate(str(source))
    files = weight_files(place) if place.is_dir() else [place]
    if len(files) != 1:
        raise UserError(f"{source} holds {len(files)} files of weights: name one")
    return files[0]


def _classes_of(palette: np.ndarray, images: Sequence[Image]) -> Tensor:
    """Classes by colour; -1 where it is black and no class is."""
    pixels = torch.from_numpy(np.stack(images))
    unlabelled = (pixels == 0).all(-1) & bool(palette.any(-1).all())
    return torch.where(unlabelled, -1, nearest_colour(pixels, torch.tensor(palette)))


def _coloured(classes: Read, palette: np.ndarray) -> Read:
    """What reads classes as a reader of segmentation images."""
    return lambda pictures: stack(list(palette[classes(pictures).numpy()]))


def _depths(folder: Path, device: torch.device) -> Read:
    """A depth estimator in transformers' folder as a reader, stretched to 0..1 a picture."""
    depth = _load(folder, device, AutoModelForDepthEstimation)

    def depths(pictures: Tensor) -> Tensor:
        near = depth(pictures, "post_process_depth_estimation", "predicted_depth")[:, None]
        low, high = near.amin((2, 3), keepdim=True), near.amax((2, 3), keepdim=True)
        return ((near - low) / (high - low).clamp(min=torch.finfo(near.dtype).tiny)).expand(-1, 3, -1, -1)

    return depths


_PERSON_OF_ADE20K = 12


def _segmenter(folder: Path, device: torch.device) -> Read:
    read = _load(folder, device, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation)
    return lambda pictures: read(pictures, "post_process_semantic_segmentation", None)


def _load(folder: Path, device: torch.device, *kinds: Any) -> Callable[[Tensor, str, str | None], Tensor]:
    """A network with its own pre- and post-processing: ``(pictures, name of the latter, its key) -> (b, h, w)``."""
    for kind in kinds:
        try:
            network = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval().to(device)
            break
        except ValueError:
            continue
        except OSError as error:
            raise UserError(f"{folder} is not a model: {str(error).splitlines()[0]}") from None
    else:
        raise UserError(f"{folder} holds no model for {' or '.join(kind.__name__ for kind in kinds)}")
    if AutoModelForDepthEstimation not in kinds and network.config.num_labels != len(ADE20K_PALETTE):
        raise UserError(f"{folder} tells {network.config.num_labels} classes apart; ADE20K's 150 are needed")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise UserError(f"{folder} does not say how it wants its pictures: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def read(pictures: Tensor, finish: str, key: str | None) -> Tensor:
        given = processor(images=unstack(pictures), return_tensors="pt").to(device)
        sizes = [tuple(pictures.shape[2:])] * len(pictures)
        found = getattr(processor, finish)(network(**given), target_sizes=sizes)
        return torch.stack([one[key] if key else one for one in found]).cpu()

    return read


def _absent(kind: str) -> Callable[..., Tensor]:
    def complain(*_: object) -> Tensor:
        raise UserError(f"this suite reads {kind} from pictures: name a network with --reader {kind}=FOLDER")

    return complain


def load_clip(
    vision: Path, text: Path, tokenizer: Path, device: torch.device = _CPU
) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
    """A CLIP in the folders of its parts: embeddings of pictures ``(b, 3, h, w)`` in 0..1, and of texts.

    Pictures are stretched to the tower's size.

    Raises:
        UserError: a folder holds no such part.
    """
    safe = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    try:
        see = CLIPVisionModelWithProjection.from_pretrained(vision, **safe).eval().to(device)
        read = CLIPTextModelWithProjection.from_pretrained(text, **safe).eval().to(device)
        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        settings = json.loads((vision / "preprocessor_config.json").read_text())
        mean, deviation = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{vision} and {text} are no parts of a CLIP model: {reason}") from None
    size = (see.config.image_size,) * 2

    def embed_pictures(pictures: Tensor) -> Tensor:
        small = F.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return see(pixel_values=((small - mean) / deviation).to(device)).image_embeds.cpu()

    def embed_texts(texts: Sequence[str]) -> Tensor:
        given = words(list(texts), padding="longest", truncation=True, return_tensors="pt").to(device)
        return read(**given).text_embeds.cpu()

    return embed_pictures, embed_texts


def load_pristine() -> Pristine:
    """NIQE's published model of pristine pictures, which is shipped."""
    return Pristine(**load_file(Path(models.__file__).parent / "niqe" / "pristine.safetensors"))


def _points(joints: Tensor, least: float) -> Tensor:
    """One person from joint heat maps ``(b, 18, h, w)``: the place ``(b, 18, 2)`` of each joint where it is likeliest,
    if its likelihood there is at least ``least``."""
    likely, places = joints.cpu().flatten(2).sigmoid().max(2)
    width = joints.shape[3]
    points = torch.stack([places % width, places // width], -1).double() + 0.5
    points[likely < least] = torch.nan
    return points
