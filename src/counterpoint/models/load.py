"""Models from folders, single files and hubs, checked before they are trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from transformers.utils import logging as transformers_logging

from counterpoint.models.hub import fetch
from counterpoint.models.perception import PerceptionModel
from counterpoint.models.single_file import components_from_file, controlnet_from_file
from counterpoint.models.trained_for import check_kind
from counterpoint.models.weights import PICKLES, check_fit, on_meta, shapes, verify_folder, weight_files
from counterpoint.types import CONTROL_KINDS, UserError, check_label, kind_of

BUILT_IN = "tiny"
TINY = Path(__file__).parent / BUILT_IN
"""The tiny family, shipped inside the package."""
DEFAULTS = "generation_config.json"
"""File of a model's folder that says how it is best sampled: ``{"guidance_scale": 3.0}``."""
GUIDANCE = 7.5
"""Guidance of a model that says nothing, as diffusers has it."""
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")
_CLASSES = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "UNet2DConditionModel": UNet2DConditionModel,
    "ControlNetModel": ControlNetModel,
    "PerceptionModel": PerceptionModel,
}


@dataclass(frozen=True, eq=False)
class Components:
    """The parts of a Stable Diffusion model, 1.5 or SDXL.

    ``scheduler`` is the configuration of its noise schedule; ``guidance_scale`` is what suits it.
    """

    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: dict[str, Any]
    origin: Path
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    zero_empty_prompt: bool = False
    guidance_scale: float = GUIDANCE


def load_components(model: str, dtype: torch.dtype = torch.float32, config: str | None = None) -> Components:
    """Load a model by name (``tiny``), diffusers folder, single safetensors file or hub id.

    Args:
        model: which.
        dtype: of its weights.
        config: for a single file, the diffusers folder or hub id with its configurations and tokenizer.

    Raises:
        UserError: it is not there, is a pickle, is damaged, or is of neither layout.
    """
    path = locate(model)
    if path.is_file():
        return Components(**components_from_file(path, config, dtype), origin=path.parent)
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"{path} is not a diffusers model: it has no model_index.json")
    parts = json.loads(index.read_text())
    if "transformer" in parts:
        raise UserError(
            f"{path} is a {parts.get('_class_name')}; models of the SD1.5 and SDXL layouts are loaded. In Python, "
            "counterpoint.attach fuses the controls of diffusers' own pipeline"
        )
    second = ("tokenizer_2", "text_encoder_2") if "text_encoder_2" in parts else ()
    wanted = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", *second)
    if missing := [part for part in wanted if not (path / part).is_dir()]:
        raise UserError(f"{path} is not a Stable Diffusion model: it has no {', '.join(missing)}")
    unet = load_diffusers(path / "unet", dtype)
    if unet.config.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"{path} reads its guidance as an input, as distilled models do; in Python, counterpoint.attach fuses the "
            "controls of diffusers' own pipeline"
        )
    if unet.config.in_channels != unet.config.out_channels:
        raise UserError(
            f"{path} is an inpainting model with {unet.config.in_channels} input channels; use a plain one, it "
            "inpaints with --inpaint-mask"
        )
    return Components(
        vae=load_diffusers(path / "vae", dtype),
        text_encoder=load_tower(path / "text_encoder", dtype),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer", local_files_only=True),
        unet=unet,
        scheduler=json.loads((path / "scheduler" / "scheduler_config.json").read_text()),
        origin=path,
        tokenizer_2=CLIPTokenizer.from_pretrained(path / "tokenizer_2", local_files_only=True) if second else None,
        text_encoder_2=load_tower(path / "text_encoder_2", dtype, CLIPTextModelWithProjection) if second else None,
        zero_empty_prompt=bool(second and parts.get("force_zeros_for_empty_prompt", True)),
        guidance_scale=_guidance(path / DEFAULTS),
    )


def _guidance(path: Path) -> float:
    """What a model's file of defaults says, if it has one."""
    if not path.is_file():
        return GUIDANCE
    try:
        return float(json.loads(path.read_text())["guidance_scale"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not hold a number called guidance_scale") from None


def load_controls(
    model: str,
    controls: Sequence[str] | Mapping[str, str | None],
    host: Components,
    dtype: torch.dtype = torch.float32,
    loaded_one: Callable[[ControlNetModel], None] = lambda _: None,
) -> dict[str, ControlNetModel]:
    """Load the ControlNets of a call.

    Args:
        model: the model they are for, as given to :func:`load_components`.
        controls: labels (``"pose"``, or ``"canny:cup"`` for a second of a kind), or label -> folder, file or hub id.
            Labels alone, and those of ``None``, take the model's own ControlNets: ``controls/<kind>`` in its folder,
            for ``"canny:mi"`` ``controls/canny-mi`` if it is there; else ``controlnet``, ``controlnet_1`` and so on.
        host: what they must fit.
        dtype: of their weights.
        loaded_one: hears each network before the next one is loaded.

    Raises:
        UserError: one is not there, does not fit, or was trained for another kind of control.
    """
    if isinstance(controls, str):
        raise UserError(f"controls is a list of labels, [{controls!r}]")
    given = dict(controls) if isinstance(controls, Mapping) else dict.fromkeys(controls)
    if len(given) < len(controls):
        raise UserError(f"a control is named twice ({', '.join(controls)}): call the second canny:NAME, say")
    own = own_controls(host.origin, [label for label, source in given.items() if source is None], model)
    sources = {label: own[label] if source is None else source for label, source in given.items()}
    loaded: dict[str, ControlNetModel] = {}
    networks: dict[str, ControlNetModel] = {}
    for label, source in sources.items():
        if source not in networks:
            networks[source] = load_controlnet(source, host.unet, dtype)
            loaded_one(networks[source])
        if (kind := kind_of(label)) in CONTROL_KINDS:
            check_kind(networks[source], kind, source)
        loaded[label] = networks[source]
    return loaded


def load_lora(components: Components, source: str) -> None:
    """Add a LoRA, ``PATH`` or ``PATH:SCALE``, to the UNet and text encoder in place.

    Raises:
        UserError: it is not there, is a pickle, or does not fit.
    """
    name, strength = split_lora(source)
    path = Path(name)
    file = path if path.is_file() else next(iter(weight_files(path)), path) if path.is_dir() else path
    shapes(file)
    texts = {"text_encoder": components.text_encoder, "tokenizer": components.tokenizer}
    rest = {"vae": components.vae, "unet": components.unet, "scheduler": None}
    host: Any
    if components.text_encoder_2 is None:
        host = StableDiffusionPipeline(
            **texts, **rest, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        texts |= {"text_encoder_2": components.text_encoder_2, "tokenizer_2": components.tokenizer_2}
        host = StableDiffusionXLPipeline(**texts, **rest, add_watermarker=False)
    label = f"lora{len(getattr(components.unet, 'peft_config', {}))}"
    try:
        host.load_lora_weights(load_file(file), adapter_name=label)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"the LoRA {path} does not fit this model: {str(error).splitlines()[0]}") from None
    used = list(getattr(components.unet, "peft_config", {}))
    if label not in used:
        raise UserError(f"the LoRA {path} does not fit this model: none of its tensors matches")
    scales = {**getattr(components.unet, "counterpoint_lora", {}), label: strength}
    components.unet.counterpoint_lora = scales
    host.set_adapters(list(scales), list(scales.values()))


def split_lora(source: str) -> tuple[str, float]:
    """``PATH:SCALE`` as path and scale; 1 where none is given."""
    name, colon, scale = source.rpartition(":")
    return (name, float(scale)) if colon and _NUMBER.fullmatch(scale) else (source, 1.0)


def load_image_encoder(
    adapter: Path, model: Path, dtype: torch.dtype = torch.float32
) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """What reads an IP-Adapter's pictures: the folder ``image_encoder`` beside its file, as it is published, or the
    model's own.

    Raises:
        UserError: there is none, or it does not load.
    """
    beside = adapter if adapter.is_dir() else adapter.parent
    folders = [place / "image_encoder" for place in (beside, model)]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise UserError(f"nothing reads the pictures of {adapter}: it wants CLIP's image encoder in {folders[0]}")
    encoder = load_tower(folder, dtype, CLIPVisionModelWithProjection)
    if (folder / "preprocessor_config.json").is_file():
        return encoder, CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    side = encoder.config.image_size
    return encoder, CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def load_diffusers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers model from its folder: config and weights are compared before anything is loaded.

    Raises:
        UserError: no config, an unknown class, or weights that are missing, damaged or do not fit.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} is not a diffusers model: its config.json is missing or unreadable") from None
    build = _CLASSES.get(config.get("_class_name"))
    if build is None:
        raise UserError(f"{folder} holds a {config.get('_class_name')}; wanted one of {', '.join(_CLASSES)}")
    found: dict[str, tuple[int, ...]] = {}
    files = weight_files(folder)
    for file in files:
        found |= shapes(file)
    check_fit(on_meta(build, config).state_dict(), found, folder, "their config.json")
    return build.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, variant=_variant(files), local_files_only=True
    )


def _variant(files: Sequence[Path]) -> str | None:
    """What files of weights are called besides their names."""
    return "fp16" if all(".fp16." in file.name for file in files) else None


def load_tower(folder: Path, dtype: torch.dtype = torch.float32, kind: Any = CLIPTextModel) -> Any:
    """One of CLIP's towers, frozen as it stands, without a word.

    Raises:
        UserError: it is not there, is a pickle, or lacks weights.
    """
    files = weight_files(folder)
    for file in files:
        shapes(file)
    said, told = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # what is too much is no mistake, what is missing is said below
    transformers_logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            variant=_variant(files),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} does not load: {str(error).splitlines()[0]}") from None
    finally:
        transformers_logging.set_verbosity(said)
        if told:
            transformers_logging.enable_progress_bar()
    if report["missing_keys"]:
        raise UserError(
            f"the weights in {folder} do not fit their config.json: {sorted(report['missing_keys'])[0]} is missing"
        )
    return model.eval()


def locate(source: str) -> Path:
    """A local path for a name, path or hub id; the tiny family's files are verified.

    Raises:
        UserError: there is nothing, or it is a pickle.
    """
    if source == BUILT_IN:
        verify_folder(TINY)
        return TINY
    path = Path(source)
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code when it is read: only safetensors are loaded")
    if path.exists():
        return path
    if path.suffix == ".safetensors" or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(
            f"there is no model {source!r}: give a name (tiny), a diffusers folder, a .safetensors file or a hub "
            "id such as owner/name"
        )
    return fetch(source)


def native_size(model: str) -> int:
    """Side of the pictures that a model was trained on, by its configurations alone.

    Raises:
        UserError: it is not there, or of neither layout.
    """
    path = locate(model)
    if path.is_file():
        shapes(path)
        return 512  # single files are of the SD1.5 layout
    try:
        unet, vae = (json.loads((path / part / "config.json").read_text()) for part in ("unet", "vae"))
        widths = vae.get("block_out_channels") or vae["decoder_block_out_channels"]
        return int(unet["sample_size"]) * 2 ** (len(widths) - 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a Stable Diffusion model: unet and vae do not say how large it is") from None


def own_control(folder: Path, label: str) -> Path:
    """Where a model folder has the ControlNet of a label: for ``kind:name`` the variant ``kind-name``, if there is
    one.

    Raises:
        UserError: it is no label, but leads elsewhere.
    """
    check_label(label)
    variant = folder / "controls" / label.replace(":", "-")
    return variant if variant.is_dir() else folder / "controls" / kind_of(label)


def own_controls(folder: Path, labels: list[str], model: str) -> dict[str, str]:
    """A model folder's own ControlNets for labels: by kind or variant, else in order.

    Raises:
        UserError: one is not there.
    """
    if not labels:
        return {}
    own = {label: own_control(folder, label) for label in labels}
    if (folder / "controls").is_dir():
        known = sorted(path.name for path in (folder / "controls").iterdir())
        for label, path in own.items():
            if not path.is_dir():
                raise UserError(
                    f"{model} has no control {kind_of(label)!r}; it has {', '.join(known)}; give another "
                    f"with --controlnet {label}=PATH"
                )
        return {label: str(path) for label, path in own.items()}
    saved = [
        path
        for path in (folder / "controlnet", *(folder / f"controlnet_{i}" for i in range(1, len(labels) + 1)))
        if path.is_dir()
    ]
    if len(saved) != len(labels):
        raise UserError(
            f"{model} holds {len(saved)} ControlNets for {len(labels)} controls ({', '.join(labels)}); name each "
            "one's with --controlnet NAME=PATH"
        )
    return {label: str(path) for label, path in zip(labels, saved, strict=True)}


def load_controlnet(source: str, unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    """One ControlNet, from a folder, file or hub id.

    Raises:
        UserError: it is not there, is none, or does not fit the UNet.
    """
    path = locate(source)
    network = controlnet_from_file(path, unet, dtype) if path.is_file() else load_diffusers(path, dtype)
    if not isinstance(network, ControlNetModel):
        raise UserError(f"{source} is a {type(network).__name__}, not a ControlNet")
    wanted, got = unet.config, network.config
    for name in ("in_channels", "cross_attention_dim", "block_out_channels"):
        if tuple(_listed(wanted[name])) != tuple(_listed(got[name])):
            said = f"its {name} is {got[name]}, the UNet's is {wanted[name]}"
            raise UserError(f"the ControlNet {source} does not fit the model: {said}")
    return network


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
