"""The one place that wires the rooms together for Python users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from counterpoint.models.load import load_components, load_controls, load_lora
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.types import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    model: str = "tiny",
    controls: Sequence[str] | Mapping[str, str] = (),
    *,
    scheduler: str = "unipc",
    lora: Sequence[str] = (),
    config: str | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "fp32",
) -> Pipeline:
    """Load a model and its ControlNets.

    Args:
        model: ``"tiny"``, a diffusers folder, a single safetensors file or a hub id, of the SD1.5 layout.
        controls: labels of the model's own ControlNets (``["pose", "seg"]``), or label -> folder, file or hub id.
        scheduler: a short name such as ``"unipc"`` or ``"ddim"``, or a diffusers class name.
        lora: LoRA files, ``"PATH"`` or ``"PATH:SCALE"``.
        config: for a single file, the diffusers folder or hub id with its configurations and tokenizer.
        device: where the models go.
        dtype: ``"fp32"``, ``"bf16"``, ``"fp16"`` or a torch dtype.

    Raises:
        UserError: something is missing, damaged or does not fit; the message says what and what to do.

    Example:
        >>> pipe = load("tiny", controls=["pose", "seg"])
        >>> out = pipe("a person on a meadow", control_image=[pose, seg], generator=torch.manual_seed(0))
        >>> out.images[0].save("person.png")
    """
    where, kind = _device(device), DTYPES[dtype] if isinstance(dtype, str) else dtype
    parts = load_components(model, kind, config)
    for source in lora:
        load_lora(parts, source)
    pipe = Pipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=make_scheduler(scheduler, parts.scheduler),
        controls=load_controls(model, controls, parts, kind),
    )
    return pipe.to(where)


def _device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        UserError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"there is no device {name!r} here; cpu always works") from None
    return device
