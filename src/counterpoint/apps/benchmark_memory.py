"""How much memory a picture with four ControlNets takes: each way in a process of its own, which loads from disk what
a user would load."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from counterpoint.api import load
from counterpoint.apps.benchmark_generate import STOCK
from counterpoint.apps.benchmark_models import SHIPPED, make_model, outspoken
from counterpoint.metrics.cost import measuring
from counterpoint.sampling.residency import RESIDENCIES
from counterpoint.types import UserError

CONTROLS = ("pose", "depth", "canny", "seg")


def memory_rows(
    size: str, device: torch.device, dtype: torch.dtype, listen: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """A row a way: MiB at the largest besides what was there before loading, and its ratio to stock diffusers.

    Raises:
        UserError: a size of another layout than SD1.5's.
    """
    if size not in (SHIPPED, "sd15"):
        raise UserError("benchmark memory compares with stock diffusers of the SD1.5 layout: --size tiny or sd15")
    ways, rows = [STOCK, *RESIDENCIES], []
    with tempfile.TemporaryDirectory() as folder:
        side = _save(size, Path(folder), dtype)
        for number, way in enumerate(ways, 1):
            peak = apart(_peak, way, folder, side, str(device), dtype, torch.get_num_threads())
            rows.append({"name": way if way == STOCK else f"residency {way}", "peak_mb": peak})
            if listen is not None:
                listen(number, len(ways))
    stock = rows[0]["peak_mb"]
    return [{**row, "ratio": row["peak_mb"] / stock if row["peak_mb"] and stock else None} for row in rows]


def apart(measure: Callable[..., float | None], *args: Any) -> float | None:
    """What a measure finds in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def _save(size: str, folder: Path, dtype: torch.dtype) -> int:
    """A model of a size with four ControlNets; the side of its pictures."""
    pipe = make_model(size, torch.device("cpu"))
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    some = next(iter(pipe.controls.values()))
    for name in CONTROLS:
        one = outspoken(ControlNetModel.from_config(some.config))
        one.to(dtype).save_pretrained(folder / "controls" / name)
    stock = StableDiffusionControlNetPipeline(
        **parts, controlnet=some, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.register_modules(controlnet=None)
    stock.to(dtype=dtype).save_pretrained(folder / "model")
    return pipe.native_size


def _peak(way: str, folder: str, side: int, device: str, dtype: torch.dtype, threads: int) -> float | None:
    """What one way takes, in this process."""
    torch.set_num_threads(threads)
    where, place = torch.device(device), Path(folder)
    controls = {name: str(place / "controls" / name) for name in CONTROLS}
    hints = [PIL.Image.fromarray(np.full((side, side, 3), 60 * i, np.uint8)) for i in range(len(CONTROLS))]
    call = {"num_inference_steps": 1, "guidance_scale": 7.5, "width": side, "height": side}
    with measuring(where) as before:
        torch.ones(2, 2, device=where) @ torch.ones(2, 2, device=where)
    with measuring(where) as cost:
        if way == STOCK:
            networks = [ControlNetModel.from_pretrained(path, torch_dtype=dtype) for path in controls.values()]
            stock = StableDiffusionControlNetPipeline.from_pretrained(
                place / "model", controlnet=networks, torch_dtype=dtype
            ).to(where)
            stock.set_progress_bar_config(disable=True)
            stock("a person", image=hints, **call)
        else:
            pipe = load(str(place / "model"), controls, device=device, dtype=dtype, residency=way)
            pipe("a person", hints, fusion="sum", **call)
    return None if cost.peak_mb is None else cost.peak_mb - (before.peak_mb or 0.0)
