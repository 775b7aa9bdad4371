"""How well a control can be read at every noise level, on validation scenes (InnerControl 2025, figure 2): by a probe
from the denoiser's inner features, and by a judge from the picture that its prediction implies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.apps.readers import control_readers
from counterpoint.apps.record import write_json, write_whole
from counterpoint.control.features import collecting, embed_time, read_by
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import SPLITS, Scene, scene
from counterpoint.evaluation.suite import stack
from counterpoint.models.load import load_diffusers
from counterpoint.recipes import RECIPES, parts
from counterpoint.recipes.aligned import usual_layers
from counterpoint.recipes.worlds import SCENES
from counterpoint.sampling.prompt import PromptEncoder
from counterpoint.training.config import override
from counterpoint.training.losses.alignment import sparse_mse
from counterpoint.training.losses.diffusion import add_noise
from counterpoint.training.losses.reward import estimate_x0
from counterpoint.types import UserError

READ = ("depth", "hed", "lineart", "pose", "seg")
"""Kinds of control that are read from pictures: lines by their extractors, the others by judge A."""
LEVELS = 20
_SCHEMA = "counterpoint/probe-error/1"


@torch.no_grad()
def curves(family: Path, kind: str, n: int) -> dict[str, list[float]]:
    """The errors of ``probe`` and ``judge`` at :data:`LEVELS` ``timesteps``, the cleanest first.

    Both readings are brought to the probe's size. The error is the mean squared one, of maps in 0..1; of classes it is
    the share of places that are read wrongly.

    Args:
        family: the tiny family, or one of its layout, with a probe for this kind.
        kind: one of :data:`READ`.
        n: validation scenes.

    Raises:
        UserError: the family lacks the probe or judge A.
    """
    config = override(
        RECIPES["tiny-innercontrol"].config, [f"pretrained_model_name_or_path={family}", f"control_type={kind}"]
    )
    probe, unet, vae = SCENES.probe(config, kind), SCENES.unet(config), SCENES.vae(config)
    layers = read_by(probe, unet, usual_layers(kind))
    host: dict[str, Any] = SCENES.denoising(config)
    reader = _classes(family) if kind == "seg" else control_readers(family, {})[kind]
    scenes = [scene(number) for number in islice(SPLITS["validation"], n)]
    images = torch.stack([torch.from_numpy(one.image.copy()) for one in scenes])
    x0 = torch.from_numpy(parts.encode(vae, [images])).float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    text = PromptEncoder([host["tokenizer"]], [host["text_encoder"]])([one.caption for one in scenes]).embeddings
    error = _error(scenes, kind)
    schedule, said = host["scheduler"], host["scheduler"].config.prediction_type
    total = schedule.config.num_train_timesteps
    found: dict[str, list[float]] = {"timesteps": [], "probe": [], "judge": []}
    for number in range(LEVELS):
        t = torch.full((n,), (2 * number + 1) * total // (2 * LEVELS))
        level = schedule.alphas_cumprod[t]
        x_t = add_noise(x0, noise, level)
        with collecting(unet, layers) as features:
            prediction = unet(x_t, t, text).sample
        read = probe(features, embed_time(unet, t))
        latents = estimate_x0(x_t, prediction, level, said)
        pictures = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1) / 2 + 0.5
        seen = F.interpolate(reader(pictures), read.shape[2:], mode="area")
        found["timesteps"].append(int(t[0]))
        found["probe"].append(error(read if kind == "seg" else (read + 1) / 2))
        found["judge"].append(error(seen))
    return found


def _classes(family: Path) -> Callable[[Tensor], Tensor]:
    """Pictures in 0..1 -> judge A's logits."""
    judge = load_diffusers(family / "judges" / "a", torch.float32)
    return lambda pictures: judge(pictures * 2 - 1).seg


def _error(scenes: list[Scene], kind: str) -> Callable[[Tensor], float]:
    """Of readings, against what the scenes are."""
    if kind == "seg":
        classes = torch.stack([torch.from_numpy(one.seg.astype("int64")) for one in scenes])[:, None].float()
        return lambda read: float((read.argmax(1) != _sized(classes, read, "nearest-exact")[:, 0]).float().mean())
    maps = stack([control_map(one, kind) for one in scenes])
    if kind == "pose":  # whose colours tell limbs apart; of thin limbs, black everywhere has the least plain error
        return lambda read: float(sparse_mse(read, _sized(maps, read, "area")).mean())
    return lambda read: float((read.mean(1, keepdim=True) - _sized(maps[:, :1], read, "area")).square().mean())


def _sized(maps: Tensor, read: Tensor, mode: str) -> Tensor:
    return F.interpolate(maps, read.shape[2:], mode=mode)


def report(family: Path, out: Path, n: int = 64) -> Path:
    """Measure every probe that a family has, and write ``probe-error.json`` and ``probe-error.png``.

    Raises:
        UserError: the family has no probe that a judge could be held against.
    """
    kinds = [kind for kind in READ if (family / "probes" / kind).is_dir()]
    if not kinds:
        raise UserError(f"{family} has no probe for {', '.join(READ)}: counterpoint train tiny-probe trains one")
    measured = {kind: curves(family, kind, n) for kind in kinds}
    noisy = {
        kind: {who: sum(curve[who][LEVELS // 2 :]) / (LEVELS // 2) for who in ("probe", "judge")}
        for kind, curve in measured.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "probe-error.json", {"schema": _SCHEMA, "n": n, "kinds": measured, "noisy_half": noisy})
    write_whole(out / "probe-error.png", lambda file: draw(measured).save(file, "PNG"))
    return out


def draw(measured: dict[str, dict[str, list[float]]], side: int = 320) -> PIL.Image.Image:
    """A panel a kind, error against timestep: the probe blue, the judge red. Drawn at twice its size and shrunk."""
    big = 2 * side
    page = PIL.Image.new("RGB", (big * len(measured), big), "white")
    pen, low, high = PIL.ImageDraw.Draw(page), big // 7, big - big // 7
    font = PIL.ImageFont.load_default(big / 22)
    for number, (kind, curve) in enumerate(measured.items()):
        left, top = number * big, max(curve["probe"] + curve["judge"])
        pen.line([(left + low, low), (left + low, high), (left + high, high)], fill="grey", width=3)
        pen.text((left + big // 2, low // 2), kind, fill="black", font=font, anchor="mm")
        for t in (0, 500, 1000):
            pen.text((left + low + (high - low) * t / 1000, high + 12), str(t), fill="grey", font=font, anchor="ma")
        for share in (0.0, 0.5, 1.0):
            place = (left + low - 10, high - (high - low) * share)
            pen.text(place, f"{share * top:.2g}", fill="grey", font=font, anchor="rm")
        for who, colour, row in (("probe", "blue", 0), ("judge", "red", 1)):
            places = [
                (left + low + (high - low) * t / 1000, high - (high - low) * error / (top or 1))
                for t, error in zip(curve["timesteps"], curve[who], strict=True)
            ]
            pen.line(places, fill=colour, width=5, joint="curve")
            pen.text((left + low + 20, low + row * big // 16), who, fill=colour, font=font)
    return page.resize((side * len(measured), side), PIL.Image.Resampling.LANCZOS)


def main() -> None:
    """``python -m counterpoint.apps.probe_error FAMILY OUT``."""
    family, out = map(Path, sys.argv[1:])
    print(report(family, out))


if __name__ == "__main__":
    main()
