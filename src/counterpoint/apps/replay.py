"""Pictures made again from the recipes inside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from counterpoint.apps import record
from counterpoint.apps.request import GenerateRequest, build
from counterpoint.apps.run import Listener, Result, image_hashes, run
from counterpoint.models.load import locate
from counterpoint.models.weights import fingerprint
from counterpoint.types import UserError

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Replayed:
    """A picture made again, what is not as it was, and how far its pixels are from the first one's, at most."""

    image: PIL.Image.Image
    recipe: dict[str, Any]
    differences: list[str]
    distance: int


def recipe_of(result: Result) -> dict[str, Any]:
    """Everything that decides a result's pictures, but the seed of each: data only."""
    return {
        "request": result.request.model_dump(mode="json", include=set(GenerateRequest.model_fields)),
        "controls": image_hashes(result.controls),
        "weights": weights_of(result.request),
        "adapters": [model.adapter.kind for model in result.pipe.models if model.adapter is not None],
        "versions": record.versions(),
        "platform": {**record.platform_facts(result.request.device), "pictures at once": result.batch},
    }


def weights_of(request: GenerateRequest) -> dict[str, str]:
    """Model, ControlNets, LoRAs and adapters -> fingerprints of their files."""
    controls = tuple((control.label, control.kind, control.controlnet) for control in request.controls)
    return dict(_weights(request.model, controls, request.lora, request.aggregate))


@lru_cache(maxsize=16)
def _weights(
    source: str, controls: tuple[tuple[str, str, str | None], ...], loras: tuple[str, ...], adapters: tuple[str, ...]
) -> dict[str, str]:
    model = locate(source)
    places = {"model": [model] if model.is_file() else [model / part for part in _PARTS if (model / part).is_dir()]}
    for label, kind, network in controls:
        own = model / "controls" / kind
        if network or own.is_dir():
            places[f"control {label}"] = [locate(network) if network else own]
    for lora in loras:
        path = Path(lora) if Path(lora).exists() else Path(lora.rpartition(":")[0])
        places[f"LoRA {lora}"] = [path]
    for name in adapters:
        own = model / "adapters" / name
        path = own if own.is_dir() else Path(name)
        if path.exists():
            places[f"adapter {name}"] = [path]
    return {name: fingerprint(paths) for name, paths in places.items()}


def request_of(recipe: Mapping[str, Any], images: Mapping[str, Path], origin: object) -> GenerateRequest:
    """The request of a recipe.

    Args:
        recipe: as :func:`counterpoint.apps.record.read_recipe` finds it.
        images: label -> where a control's image is now.
        origin: what messages call the recipe.

    Raises:
        UserError: it is no request of this version, or has no such control.
    """
    try:
        content = dict(recipe["request"])
        controls = [dict(one) for one in content["controls"]]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{origin} carries no recipe of generate") from None
    if unknown := sorted(set(images) - {one.get("label") for one in controls}):
        known = ", ".join(str(one.get("label")) for one in controls) or "none"
        raise UserError(f"{origin} has no control {unknown[0]!r}; it has {known}")
    content["controls"] = [{**one, "image": images.get(one.get("label"), one.get("image"))} for one in controls]
    return build(GenerateRequest, **content)


def replay(path: Path, images: Mapping[str, Path], *, listen: Listener | None = None) -> Replayed:
    """Make a picture again, with the pictures that were made beside it: a batch is what it was.

    Args:
        path: a PNG of ``generate``.
        images: label -> where a control's image is now.
        listen: hears every step.

    Raises:
        UserError: it carries no recipe of this version, or something that it names is missing.
    """
    recipe = record.read_recipe(path)
    request = request_of(recipe, images, path)
    for control in request.controls:
        if not control.image.is_file():
            raise UserError(f"the control image {control.image} of {path} is not here: give --control "
                            f"{control.label}=IMAGE")  # fmt: skip
    result = run(request, listen=listen)
    try:
        image = result.images[result.seeds.index(recipe["seed"])]
    except (KeyError, ValueError):
        raise UserError(f"{path} does not say which of its pictures it is") from None
    with PIL.Image.open(path) as picture:
        before, after = np.asarray(picture.convert("RGB"), int), np.asarray(image.convert("RGB"), int)
    made = recipe_of(result)
    same = before.shape == after.shape
    return Replayed(
        image,
        {**made, "seed": recipe["seed"]},
        _differences(recipe, made) + ([] if same else [f"size: {before.shape[1::-1]} -> {after.shape[1::-1]}"]),
        int(np.abs(before - after).max()) if same else 255,
    )


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a recipe and its replay do not share, a line each."""
    found = []
    for part, what in (
        ("versions", "version of"),
        ("weights", "weights of"),
        ("controls", "image of"),
        ("platform", ""),
    ):
        old, new = before.get(part) or {}, after[part]
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name):
                label = f"{what} {name}".strip()
                found.append(f"{label}: {old.get(name, 'not recorded')} -> {new.get(name, 'none')}")
    return found
