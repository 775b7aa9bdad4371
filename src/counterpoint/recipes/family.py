"""From training outputs to the shipped family: one diffusers folder, half precision, with a hash list."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from counterpoint.data.scenes.vocabulary import SIZE
from counterpoint.models.load import DEFAULTS
from counterpoint.models.perception import PerceptionModel
from counterpoint.models.probe import Probe
from counterpoint.models.strength import strengthen
from counterpoint.models.weights import list_hashes
from counterpoint.training.stages.adapter import FILE

MEMBERS: dict[str, tuple[str, Any]] = {
    "vae": ("codec", AutoencoderTiny),
    "unet": ("base", UNet2DConditionModel),
    **{
        f"controls/{kind}": (f"control-{kind}", ControlNetModel)
        for kind in ("canny", "hed", "depth", "lineart", "pose", "seg", "canny-mi", "pose-mi", "depth-inner")
    },
    **{f"judges/{name}": (f"judge-{name}", PerceptionModel) for name in "ab"},
    **{f"probes/{kind}": (f"probe-{kind}", Probe) for kind in ("depth", "hed", "lineart", "pose", "seg")},
}
"""Place in the family -> output folder of its training run, and its class."""
ADAPTERS = ("interact", "migc", "style")
"""Adapters, each in ``adapters/NAME``; the outputs of their runs are called ``adapter-NAME``."""
STRENGTH = "strength.json"
"""In a ControlNet's output: what :func:`counterpoint.apps.validation.calibrate` found."""


def assemble(runs: Path, out: Path) -> Path:
    """Copy every member that is trained into ``out``, in half precision, and write the hash list.

    Args:
        runs: holds the output folders of the recipes, named as in :data:`MEMBERS`, and ``towers``.
        out: the family's folder; members that are there already and not in ``runs`` stay.
    """
    out.mkdir(parents=True, exist_ok=True)
    for place, (run, kind) in MEMBERS.items():
        if (runs / run / "config.json").is_file():
            member = kind.from_pretrained(runs / run, local_files_only=True)
            if (runs / run / STRENGTH).is_file():
                strengthen(member, json.loads((runs / run / STRENGTH).read_text())["strength"])
            member.half().save_pretrained(out / place)
    for name in ADAPTERS:
        if (runs / f"adapter-{name}" / FILE).is_file():
            (out / "adapters" / name).mkdir(parents=True, exist_ok=True)
            state = load_file(runs / f"adapter-{name}" / FILE)
            save_file({key: value.half() for key, value in state.items()}, out / "adapters" / name / FILE)
    if (runs / "towers" / "config.json").is_file():
        _split_towers(runs / "towers", out)
    for path in out.rglob("*"):
        _tidy(path)
    _write(out / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write(out / "model_index.json", _INDEX)
    _write(out / DEFAULTS, _DEFAULTS)
    _write(out / "hashes.json", list_hashes(out))
    return out


def _tidy(path: Path) -> None:
    """Readable by everyone, and no setting that names this machine or that AutoencoderTiny derives and warns about."""
    if path.is_file():
        path.chmod(0o644)
    if path.name == "config.json":
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if config.get("_class_name") == "AutoencoderTiny":
            config.pop("block_out_channels", None)
        _write(path, config)


def _split_towers(run: Path, out: Path) -> None:
    """A text encoder and an image encoder, each with its projection, where diffusers looks for them."""
    clip = CLIPModel.from_pretrained(run, local_files_only=True)
    text, image = (
        CLIPTextModelWithProjection(clip.config.text_config),
        CLIPVisionModelWithProjection(clip.config.vision_config),
    )
    text.text_model.load_state_dict(clip.text_model.state_dict())
    text.text_projection.load_state_dict(clip.text_projection.state_dict())
    image.vision_model.load_state_dict(clip.vision_model.state_dict())
    image.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    text.to(torch.float16).save_pretrained(out / "text_encoder")
    image.to(torch.float16).save_pretrained(out / "image_encoder")
    _write(out / "image_encoder" / "preprocessor_config.json", _PICTURES)
    (out / "tokenizer").mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / name, out / "tokenizer" / name)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """``python -m counterpoint.recipes.family RUNS OUT``."""
    runs, out = map(Path, sys.argv[1:])
    print(assemble(runs, out))


_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_DEFAULTS = {"guidance_scale": 3.0}
_PICTURES = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": SIZE, "width": SIZE},
    "size": {"shortest_edge": SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
}

if __name__ == "__main__":
    main()
