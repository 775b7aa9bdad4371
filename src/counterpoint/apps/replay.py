"""Pictures made again from the recipes inside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from counterpoint.apps import record
from counterpoint.apps.request import GenerateRequest, build
from counterpoint.apps.run import Listener, Result, image_hashes, load_for, run
from counterpoint.conditions.image import read_image
from counterpoint.models.load import locate, own_control
from counterpoint.models.probe import REVERSED
from counterpoint.models.weights import fingerprint
from counterpoint.sampling.pipeline import Pipeline
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
        "request": {
            **result.request.model_dump(mode="json", include=set(GenerateRequest.model_fields)),
            "gate_silence": result.request.gated,
        },
        "controls": image_hashes(result.controls),
        "inputs": _input_hashes(result),
        "weights": weights_of(result.request),
        "adapters": [model.adapter.kind for model in result.pipe.models if model.adapter is not None],
        "scheduler": _scheduler(result),
        "versions": record.versions(),
        "platform": {**record.platform_facts(result.request.device), "pictures at once": result.batch},
    }


def inputs_of(request: GenerateRequest) -> dict[str, Path]:
    """What a request reads besides its controls' images, under the names of ``generate``'s options."""
    named = {f"mask:{one.label}": one.mask for one in request.controls}
    named |= {f"subject-mask:{number}": path for number, path in enumerate(request.subject_mask, 1)}
    named |= {"init-image": request.init_image, "inpaint-mask": request.inpaint_mask, "layout": request.layout}
    return {name: path for name, path in named.items() if path is not None}


def _input_hashes(result: Result) -> dict[str, str]:
    """Input -> SHA-256 of its pixels, or of what a layout says."""
    pictures = {name: read_image(path) for name, path in inputs_of(result.request).items() if name != "layout"}
    if (layout := result.layout) is None:
        return image_hashes(pictures)
    said = repr((layout.instances, layout.interactions))
    if layout.reference is not None:
        said += repr(layout.reference.weight)
        pictures["reference"] = layout.reference.image
        if layout.reference.mask is not None:
            pictures["reference's mask"] = layout.reference.mask
    return {**image_hashes(pictures), "layout": hashlib.sha256(said.encode()).hexdigest()}


def _scheduler(result: Result) -> dict[str, Any]:
    """Its class and configuration, as JSON has them."""
    scheduler = result.pipe.scheduler
    kept = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return json.loads(json.dumps({"class": type(scheduler).__name__, **kept}, default=str))


def weights_of(request: GenerateRequest) -> dict[str, str]:
    """Model, ControlNets, LoRAs, adapters and the probes that steer -> fingerprints of their files."""
    controls = tuple(
        (control.label, control.kind, control.controlnet, control.steered, control.probe)
        for control in request.controls
    )
    return dict(_weights(request.model, controls, request.lora, request.aggregate))


@lru_cache(maxsize=16)
def _weights(
    source: str,
    controls: tuple[tuple[str, str, str | None, bool, str | None], ...],
    loras: tuple[str, ...],
    adapters: tuple[str, ...],
) -> dict[str, str]:
    model = locate(source)
    places = {"model": [model] if model.is_file() else [model / part for part in _PARTS if (model / part).is_dir()]}
    for label, kind, network, steered, probe in controls:
        own = own_control(model, label)
        if network or own.is_dir():
            places[f"control {label}"] = [locate(network) if network else own]
        if steered:
            places[f"probe {label}"] = [Path(probe.removesuffix(REVERSED)) if probe else model / "probes" / kind]
    for lora in loras:
        path = Path(lora) if Path(lora).exists() else Path(lora.rpartition(":")[0])
        places[f"LoRA {lora}"] = [path]
    for name in adapters:
        own = model / "adapters" / name
        path = own if own.is_dir() else Path(name)
        if path.exists():
            places[f"adapter {name}"] = [path]
    return {name: fingerprint(paths) for name, paths in places.items()}


def request_of(
    recipe: Mapping[str, Any],
    images: Mapping[str, Path],
    origin: object,
    inputs: Mapping[str, Path] | None = None,
    model: str | None = None,
) -> GenerateRequest:
    """The request of a recipe.

    Args:
        recipe: as :func:`counterpoint.apps.record.read_recipe` finds it.
        images: label -> where a control's image is now.
        origin: what messages call the recipe.
        inputs: name, as :func:`inputs_of` has it -> where that file is now.
        model: where its model is here; a service's recipe has the name that the model had there.

    Raises:
        UserError: it is no request of this version, or has no such control or input.
    """
    try:
        content = dict(recipe["request"])
        controls = [dict(one) for one in content["controls"]]
        labels = [str(one.get("label")) for one in controls]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{origin} carries no recipe of generate") from None
    if unknown := sorted(set(images) - set(labels)):
        raise UserError(f"{origin} has no control {unknown[0]!r}; it has {', '.join(labels) or 'none'}")
    content["controls"] = [
        {**one, "image": images.get(label, one.get("image"))} for label, one in zip(labels, controls, strict=True)
    ]
    if model is not None:
        content["model"] = model
    return _moved(build(GenerateRequest, **content), inputs or {}, origin)


def _moved(request: GenerateRequest, inputs: Mapping[str, Path], origin: object) -> GenerateRequest:
    known = inputs_of(request)
    if unknown := sorted(set(inputs) - set(known)):
        raise UserError(f"{origin} has no input {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    now = {**known, **inputs}
    masks = tuple(now[f"subject-mask:{number}"] for number in range(1, len(request.subject_mask) + 1))
    return request.model_copy(
        update={
            "controls": tuple(
                one.model_copy(update={"mask": now.get(f"mask:{one.label}")}) for one in request.controls
            ),
            "subject_mask": masks,
            "init_image": now.get("init-image"),
            "inpaint_mask": now.get("inpaint-mask"),
            "layout": now.get("layout"),
        }
    )


def replay(
    path: Path,
    images: Mapping[str, Path],
    inputs: Mapping[str, Path] | None = None,
    model: str | None = None,
    *,
    load: Callable[[GenerateRequest], Pipeline] = load_for,
    listen: Listener | None = None,
) -> Replayed:
    """Make a picture again, with the pictures that were made beside it: a batch is what it was.

    Args:
        path: a PNG of ``generate``.
        images: label -> where a control's image is now.
        inputs: likewise of what :func:`inputs_of` names.
        model: where its model is here, if not where the recipe says.
        load: brings the pipeline that a request asks for.
        listen: hears every step.

    Raises:
        UserError: it carries no recipe of this version, or something that it names is missing.
    """
    recipe = record.read_recipe(path)
    request = request_of(recipe, images, path, inputs, model)
    before = np.asarray(read_image(path), int)
    for control in request.controls:
        if not control.image.is_file():
            raise UserError(f"the control image {control.image} of {path} is not here: give --control "
                            f"{control.label}=IMAGE")  # fmt: skip
    for name, file in inputs_of(request).items():
        if not file.is_file():
            raise UserError(f"the {name} {file} of {path} is not here: give --input {name}=FILE")
    try:
        locate(request.model)
    except UserError as error:
        raise UserError(f"the model of {path} is not here: {error}; or give --model MODEL") from None
    result = run(request, load(request), listen=listen)
    try:
        image = result.images[result.seeds.index(recipe["seed"])]
    except (KeyError, ValueError):
        raise UserError(f"{path} does not say which of its pictures it is") from None
    after = np.asarray(image.convert("RGB"), int)
    made = recipe_of(result)
    same = before.shape == after.shape
    differences = _differences(recipe, made)
    if recipe.get("safety") == "blurred":
        differences.append("safety: blurred -> unchecked")
    if not same:
        differences.append(f"size: {before.shape[1::-1]} -> {after.shape[1::-1]}")
    return Replayed(
        image,
        {**made, "seed": recipe["seed"]},
        differences,
        int(np.abs(before - after).max()) if same else 255,
    )


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a recipe and its replay do not share, a line each."""
    found = []
    for part, what in (
        ("versions", "version of"),
        ("weights", "weights of"),
        ("controls", "image of"),
        ("inputs", ""),
        ("scheduler", "scheduler's"),
        ("platform", ""),
    ):
        old, new = before.get(part), after[part]
        if not isinstance(old, Mapping):
            found += [f"{part}: not recorded"] if new else []
            continue
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name):
                label = f"{what} {name}".strip()
                found.append(f"{label}: {old.get(name, 'not recorded')} -> {new.get(name, 'none')}")
    return found
