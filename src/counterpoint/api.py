"""The one place that wires the rooms together for Python users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from counterpoint.conditions.segmentation import ADE20K_PALETTE
from counterpoint.control.coverage import warn_of_names
from counterpoint.control.features import read_by
from counterpoint.data.scenes.maps import SEG_PALETTE
from counterpoint.fusion import FLUX_DELTA, get_fusion
from counterpoint.metrics.maps import nearest_colour
from counterpoint.models.compiling import check_compiler
from counterpoint.models.load import load_components, load_controls, load_lora
from counterpoint.models.openvino import PortedPixels, port
from counterpoint.models.pace import bf16_pays
from counterpoint.models.probe import REVERSED, check_reads, load_probe, span_of
from counterpoint.sampling.aggregated import check_together
from counterpoint.sampling.amdm import Aggregation, Eta
from counterpoint.sampling.controls import each
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.readout import Readout
from counterpoint.sampling.residency import Residency
from counterpoint.sampling.schedulers import make_scheduler
from counterpoint.sampling.stock import attached
from counterpoint.types import DEFAULT_FUSION, Batch, Combine, Fusion, UserError, kind_of

Mask = PIL.Image.Image | np.ndarray | Tensor
"""A grey picture: of floats in 0..1, or of bytes."""

OPENVINO = "openvino"
"""The device that is a CPU on which OpenVINO runs the networks."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    model: str = "tiny",
    controls: Sequence[str] | Mapping[str, str | None] = (),
    *,
    probes: Mapping[str, str] = MappingProxyType({}),
    scheduler: str = "unipc",
    lora: Sequence[str] = (),
    config: str | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "fp32",
    residency: str = "all",
    compile: bool = False,
) -> Pipeline:
    """Load a model and its ControlNets.

    Args:
        model: ``"tiny"``, a diffusers folder or a hub id of the SD1.5 or SDXL layout, or a single safetensors file
            of the SD1.5 layout.
        controls: labels of the model's own ControlNets (``["pose", "seg"]``), or label -> folder, file or hub id,
            or ``None`` for the model's own.
        probes: label of a control -> what reads it from the UNet's features in place of the model's own probe: the
            folder of another, or a published readout head as a safetensors file; ``@reversed`` behind it tells it
            timesteps as the published heads were told them in training.
        scheduler: a short name such as ``"unipc"`` or ``"ddim"``, or a diffusers class name.
        lora: LoRA files, ``"PATH"`` or ``"PATH:SCALE"``.
        config: for a single file, the diffusers folder or hub id with its configurations and tokenizer.
        device: where the models go: ``"cpu"``, ``"cuda"``, ``"mps"``, or ``"openvino"``: a CPU on which OpenVINO runs
            UNet, ControlNets and decoder 1.4 to 3 times as fast, in float32 to rounding the same. Rules that reach into
            the networks and adapters need one of the others.
        dtype: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"auto"`` or a torch dtype.
        residency: what stays in memory: ``"all"`` networks, those of a ``"stages"`` at a time, or besides one of the
            ``"controls"`` at a time. Others wait in the machine's own memory, or, on a CPU, in files.
        compile: let torch compile UNet and ControlNets. The first picture of a size takes minutes longer; other
            weights, windows, prompts and seeds compile nothing anew. Rules that reach into the networks and adapters
            want them as they are.

    Raises:
        UserError: something is missing, damaged or does not fit; the message says what and what to do.

    Example:
        >>> pipe = load("tiny", controls=["pose", "seg"])
        >>> out = pipe("a person on a meadow", control_image=[pose, seg], generator=torch.manual_seed(0))
        >>> out.images[0].save("person.png")
    """
    where = find_device(device)
    kind = DTYPES[find_dtype(dtype, device)] if isinstance(dtype, str) else dtype
    if compile:
        check_compile(device)
    ported, bf16 = device == OPENVINO, kind == torch.bfloat16
    if ported and kind == torch.float16:
        raise UserError("OpenVINO counts in fp32 or bf16: choose one as dtype")
    kind = torch.float32 if ported else kind
    parts = load_components(model, kind, config)
    for source in lora:
        load_lora(parts, source)
    staged = None if residency == "all" else Residency(residency, where)
    if staged and compile:
        raise UserError("networks that come and go are not compiled: choose compile or a residency")
    if ported and staged:
        raise UserError("OpenVINO keeps its networks: only residency all goes with it")
    home = (lambda *_: None) if staged is None else staged.send_home
    home(parts.vae, parts.text_encoder, parts.text_encoder_2, parts.unet)
    own = {label: parts.origin / "probes" / kind_of(label) for label in controls} if parts.origin.is_dir() else {}
    sources = {label: str(path) for label, path in own.items() if path.is_dir()} | dict(probes)
    if unknown := [label for label in sources if label not in controls]:
        raise UserError(f"a probe for {unknown[0]}, and there is no such control")
    pipe = Pipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=make_scheduler(scheduler, parts.scheduler),
        controls=load_controls(model, controls, parts, kind, home),
        tokenizer_2=parts.tokenizer_2,
        text_encoder_2=parts.text_encoder_2,
        zero_empty_prompt=parts.zero_empty_prompt,
        guidance_scale=parts.guidance_scale,
        readouts={label: _readout(label, source, parts.unet) for label, source in sources.items()},
        origin=parts.origin,
        residency=staged,
    )
    if ported:
        unet, networks = port(pipe.unet, pipe.controls, bf16)
        pipe.vae.decoder = PortedPixels(pipe.vae)
        return replace(pipe, unet=unet, controls=networks)
    if staged is None:
        pipe.to(where)
        for network in {pipe.unet, *pipe.controls.values()}:
            if kind != torch.float32:
                network.to(memory_format=torch.channels_last)  # in which half precision is quickest
            if compile:
                network.compile()
        return pipe
    for readout in pipe.readouts.values():
        readout.probe.to(where)
    return pipe


def _readout(label: str, source: str, unet: UNet2DConditionModel) -> Readout:
    """A probe, and how its readings compare with the control as the sampler is given it."""
    from counterpoint.recipes.aligned import LOSSES, usual_layers
    from counterpoint.recipes.worlds import shown
    from counterpoint.training.stages.probe import Target

    kind = kind_of(label)
    if kind not in LOSSES:
        raise UserError(f"probes read {', '.join(LOSSES)}, not {kind}")
    probe = load_probe(Path(source.removesuffix(REVERSED)))
    many = probe.config["out"] == len(ADE20K_PALETTE)
    check_reads(probe, kind, len(ADE20K_PALETTE if many else SEG_PALETTE), source)
    for network in (unet, probe):
        network.requires_grad_(False)  # guidance wants slopes of latents, never of weights
    palette = torch.from_numpy((ADE20K_PALETTE if many else SEG_PALETTE).copy())

    def classes(batch: Batch) -> Tensor:
        return nearest_colour(batch["control:seg"], palette)

    wanted = classes if kind == "seg" else lambda batch: shown(batch, kind)
    layers = read_by(probe, unet, usual_layers(kind))
    target = Target(layers, wanted, LOSSES[kind], span_of(probe, kind, layers))

    def error(read: Tensor, hint: Tensor) -> Tensor:
        return target.losses(read, {f"control:{kind}": (255 * hint).round().byte().permute(0, 2, 3, 1)})

    return Readout(probe.eval(), target.layers, error, source.endswith(REVERSED))


def aggregate(
    pipelines: Sequence[Pipeline],
    weights: float | Sequence[float] = Aggregation.weights,
    steps: int | None = Aggregation.steps,
    *,
    mix: str = Aggregation.mix,
    eta: Eta | Sequence[Eta] = Aggregation.eta,
    sigma: float | None = Aggregation.sigma,
    noise: str = Aggregation.noise,
    mean: str = Aggregation.mean,
) -> Pipeline:
    """Let whole models work together (AMDM, arXiv:2410.01262): in the first steps they share what they found, then the
    first one goes on alone; the picture is its own.

    Args:
        pipelines: two or more that share latents and noise schedule; the first one with ``scheduler="ddim"``. Each
            keeps its controls and its adapter; one that is aggregated itself counts as its models.
        weights: how much of what came before is kept when the next model is mixed in, in 0..1; one for all, or one
            fewer than there are models.
        steps: how many of the first steps are shared; if neither this nor ``sigma`` is given, at least 3, and further
            while there is as much noise as at the paper's third step, in proportion to the picture's side.
        mix: ``"paper"``, ``"unit"`` or ``"slerp"``; see ``counterpoint.sampling.amdm.Aggregation``, also for
            the rest. The paper's recipes and its authors' code are ``**vars(PRESETS["paper"])`` of that module.
        eta: how far each model is pulled back to its own mean, one for all or one each: a length such as ``45``, a
            share of the way such as ``"0.4x"``, or ``"auto"``, our share of ``0.3x``.
        sigma: in place of ``steps``: steps are shared while ``sigma_t`` is at least this.
        noise: ``"shared"`` or ``"separate"`` noise to start from.
        mean: each step's ``"own"``, or the ``"stale"`` one of the step before.

    Raises:
        UserError: the models cannot be aggregated, or the settings make no sense.

    Example:
        >>> pipe = load("tiny", scheduler="ddim")
        >>> both = aggregate([pipe.adapted("interact"), pipe.adapted("migc")], weights=0.5, steps=3)
        >>> out = both("a person kicking a red ball", layout=read_layout("layout.json"))
    """
    aggregation = Aggregation(_listed(weights), steps, mix, _listed(eta), sigma, noise, mean)
    for number, one in enumerate(pipelines, 1):
        if not isinstance(one, Pipeline):
            raise UserError(f"model {number} is a {type(one).__name__}; pipelines of counterpoint.load are aggregated")
    models = [model for one in pipelines for model in one.models]
    aggregation.for_models(len(models))
    check_together(models)
    return replace(pipelines[0], helpers=tuple(models[1:]), aggregation=aggregation)


def _listed(value: Eta | Sequence[Eta]) -> tuple[Any, ...]:
    return (value,) if isinstance(value, (int, float, str)) else tuple(value)


@contextmanager
def attach(
    pipeline: DiffusionPipeline,
    fusion: str | Fusion | Combine = DEFAULT_FUSION,
    *,
    controls: Sequence[str] = (),
    foreground: str | Sequence[str] = (),
    subject: str | Sequence[str] = (),
    subject_mask: Mask | Sequence[Mask] = (),
    control_mask: Mapping[str, Mask] | Sequence[Mask | None] | None = None,
    gate_silence: bool | None = None,
) -> Iterator[DiffusionPipeline]:
    """Let a rule join the controls of a stock diffusers pipeline for as long as a ``with`` block lasts.

    Afterwards, also after an exception, the pipeline is what it was. Any pipeline will do that holds several
    ControlNets (SD1.5, SDXL, FLUX; text-to-image, image-to-image, inpainting), a ControlNet-Union or T2I-Adapters. A
    union network is asked for one control at a time.

    Args:
        pipeline: the pipeline.
        fusion: the rule, by name or of your own, also a function ``(n, b, c, h, w) -> (b, c, h, w)``. In FLUX the
            threshold of the correlation is the paper's 0.5 where the name sets none.
        controls: names for its controls, in their order; a kind such as ``"pose"`` tells ``gate_silence`` what their
            images mean. Default ``"0"``, ``"1"`` and so on.
        foreground: for rules that lend keys (``cross``): the controls that show the subject; default the first.
        subject: words of the prompt, one for each foreground.
        subject_mask: white where the subject is, one for each foreground, in place of ``subject``: pictures, arrays
            ``(h, w)``, or tensors ``(b, 1, h, w)`` in 0..1.
        control_mask: control -> how strongly it speaks where, likewise; or a list with one or ``None`` for each.
        gate_silence: let controls of a kind with a silent value speak only where their image shows something else;
            default where there are several and ``controls`` tells their kinds, but not under ``"sum"``,
            ``"minimal-impact"`` or in FLUX.

    Raises:
        UserError: what does not fit; the message says what to do.

    Example:
        >>> with attach(pipeline, "cross", subject="person"):
        ...     image = pipeline("a person on a meadow", image=[pose, depth]).images[0]
    """
    masks = [subject_mask] if isinstance(subject_mask, Mask) else subject_mask
    if isinstance(controls, str):
        raise UserError(f"controls names every control of the pipeline in its order: a list such as [{controls!r}]")
    if not isinstance(control_mask, Mapping):
        given = list(control_mask or ())
        names = controls or [str(number) for number in range(len(given))]
        masks_of = zip(names, each("control mask", given or None, names), strict=True)
        control_mask = {name: mask for name, mask in masks_of if mask is not None}
    rule = get_fusion(fusion, FLUX_DELTA if hasattr(pipeline, "transformer") else None)
    if gate_silence is None:
        warn_of_names(rule, controls)
    with attached(
        pipeline,
        rule,
        controls,
        foreground=[foreground] if isinstance(foreground, str) else foreground,
        subject=[subject] if isinstance(subject, str) else subject,
        subject_masks=[_grey(mask, pipeline) for mask in masks],
        regions={name: _grey(mask, pipeline) for name, mask in control_mask.items()},
        gate_silence=gate_silence,
    ):
        yield pipeline


def _grey(mask: Mask, pipeline: DiffusionPipeline) -> Tensor:
    """``(b, 1, h, w)`` in 0..1, where the pipeline runs."""
    if isinstance(mask, PIL.Image.Image):
        mask = np.asarray(mask.convert("L"))
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.array(mask[None, None] if mask.ndim == 2 else mask))
    if mask.dtype == torch.uint8:
        mask = mask / 255
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise UserError(f"a mask is a picture, an array (h, w) or a tensor (b, 1, h, w), got {tuple(mask.shape)}")
    mask = mask.float()
    if not (mask.isfinite().all() and mask.amin() >= 0 and mask.amax() <= 1):
        raise UserError("a mask's values are numbers in 0..1 (uint8: 0..255)")
    return mask.to(pipeline._execution_device)


def find_device(name: str) -> torch.device:
    """The device of a name; OpenVINO's is a CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == OPENVINO:
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"there is no device {name!r} here; cpu always works") from None
    return device


def check_compile(device: str) -> None:
    """Whether networks can be compiled there.

    Raises:
        UserError: they cannot.
    """
    if device == OPENVINO:
        raise UserError("OpenVINO compiles its networks itself: leave compile out")
    check_compiler(find_device(device))


def find_dtype(name: str, device: str) -> str:
    """A key of :data:`DTYPES`; ``"auto"`` is half precision where the hardware has it and is quicker in it.

    Raises:
        UserError: there is none of this name.
    """
    if name == "auto":
        if find_device(device).type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if find_device(device).type == "cpu" and bf16_pays() else "fp32"
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; there are {', '.join(DTYPES)} and auto")
    return name
