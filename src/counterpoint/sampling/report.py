"""Who won where: of every step, site and place, how much of what the host heard was each control's (ours)."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from counterpoint.control.reuse import Thrift
from counterpoint.fusion.attribution import correlation, min_norm_shares, shares
from counterpoint.pages import render
from counterpoint.types import Features, Moment

_COLOURS = ("#e4572e", "#2e86de", "#1faa59", "#b620e0", "#e0a800", "#00a7a7")
"""One a control, from the seventh on again."""


@dataclass(frozen=True, eq=False)
class Site:
    """What happened at one site in one step.

    Attributes:
        parts: each control's part, the mean over images and places, ``(n,)``.
        winners: at each place the control of the largest part, ``(b, h, w)``; -1 where all were silent.
        rho: how far the active controls correlate, the mean over places, ``(b,)`` in -1..1.
        min_norm: each control's weight in the combination that opposes none of them, ``(b, n)``; 0 for those that
            took no part in this step.
    """

    parts: Float[Tensor, " n"]
    winners: Int8[Tensor, "b h w"]
    rho: Float[Tensor, " b"]
    min_norm: Float[Tensor, "b n"]


@dataclass(eq=False)
class Report:
    """What happened between the controls in one call of the pipeline.

    Attributes:
        names: the controls.
        prompts: one an image.
        size: rows and columns of the latents.
        maps: one a step: each control's part at each place, the mean over sites, ``(n, b, h, w)``; silent steps are 0.
        sites: one a step: site -> what happened there.
        images: the pictures, if they were decoded to PIL.
        hints: control -> its condition images, ``(b, 3, h, w)`` in 0..1.
        regions: control -> where it was allowed to speak, ``(b, 1, h, w)`` in 0..1; those that were restricted only.
        errors: control -> how far it was from what a probe read of it at every step, ``(b,)``; those that were read.
    """

    names: tuple[str, ...]
    prompts: list[str]
    size: tuple[int, int]
    maps: list[Float[Tensor, "n b h w"]] = field(default_factory=list)
    sites: list[dict[str, Site]] = field(default_factory=list)
    images: list[PIL.Image.Image] = field(default_factory=list)
    hints: dict[str, Tensor] = field(default_factory=dict)
    regions: dict[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, Sequence[Float[Tensor, " b"]]] = field(default_factory=dict)

    def begin(self, steps: int) -> None:
        """So many steps follow; those at which nobody speaks stay silent."""
        self.maps = [torch.zeros(len(self.names), len(self.prompts), *self.size) for _ in range(steps)]
        self.sites = [{} for _ in range(steps)]

    def watch(self, moment: Moment, names: Sequence[str], sites: Mapping[str, tuple[Features, Tensor]]) -> None:
        """Take in one step: what the active branches ``names`` said at each site, and what the rule made of it."""
        count = len(self.prompts)
        whole = torch.zeros(len(self.names), count, *self.size)
        rows = [self.names.index(name) for name in names]
        by_site: dict[str, Site] = {}
        for site, (features, fused) in sites.items():
            mine = features[:, -count:]
            found = shares(mine, fused[-count:]).cpu()
            part, weights = torch.zeros(len(self.names)), torch.zeros(count, len(self.names))
            part[rows] = found.mean((1, 2, 3))
            weights[:, rows] = min_norm_shares(mine).cpu()
            won = torch.where(found.amax(0) > 0, torch.tensor(rows)[found.argmax(0)], -1).to(torch.int8)
            by_site[site] = Site(part, won, correlation(mine).mean((1, 2)).cpu(), weights)
            whole[rows] += F.interpolate(found, self.size, mode="nearest") / len(sites)
        self.maps[moment.index], self.sites[moment.index] = whole, by_site

    def shares(self, image: int = 0) -> dict[str, float]:
        """Control -> its part in what the host heard of one image, over all steps and places; the parts sum to 1."""
        total = torch.stack(self.maps)[:, :, image].mean((0, 2, 3))
        return dict(zip(self.names, (total / total.sum().clamp(min=1e-12)).tolist(), strict=True))

    def winners(self, step: int, image: int = 0) -> np.ndarray:
        """``(h, w)``: at each place the control of the largest part, -1 where all were silent."""
        part = self.maps[step][:, image]
        return torch.where(part.amax(0) > 0, part.argmax(0), -1).numpy()

    def save(self, path: str | os.PathLike[str], image: int = 0) -> None:
        """Write the page of one of the images."""
        Path(path).write_text(self.html(image))

    def html(
        self,
        image: int = 0,
        readings: Mapping[str, tuple[PIL.Image.Image, float]] | None = None,
        advice: Sequence[str] = (),
        thrift: Mapping[str, Thrift] | None = None,
    ) -> str:
        """One self-contained page about one of the images.

        Args:
            image: which.
            readings: control -> how it was read back from the picture, and how well that agrees with it, 0..1.
            advice: sentences about what to change.
            thrift: control, or ``guidance``, -> what was foretold in place of computing it.
        """
        share = self.shares(image)
        steps = [
            {
                "number": step + 1,
                "parts": self.maps[step][:, image].mean((1, 2)).tolist(),
                "map": self._overlay(step, image),
            }
            for step in range(len(self.maps))
        ]
        names = dict.fromkeys(site for step in self.sites for site in step)
        by_site = {name: self._site([step.get(name) for step in self.sites], image) for name in names}
        return render(
            "report.html",
            names=self.names,
            colours=[_COLOURS[i % len(_COLOURS)] for i in range(len(self.names))],
            prompt=self.prompts[image],
            picture=_data(self.images[image]) if self.images else None,
            hints={name: _data(_picture(hint[image])) for name, hint in self.hints.items()},
            regions={name: _data(_picture(region[image])) for name, region in self.regions.items()},
            readings={name: (_data(read), score) for name, (read, score) in (readings or {}).items()},
            share=share,
            parts={name: _data(self._part(i, image)) for i, name in enumerate(self.names)},
            steps=steps,
            curves={name: _curve([float(step[image]) for step in read]) for name, read in self.errors.items()},
            sites=by_site,
            advice=advice,
            thrift=thrift or {},
        )

    def _site(self, steps: Sequence[Site | None], image: int) -> dict[str, Any]:
        """One site over all steps: parts, correlation and weights as means, winners as a strip of small maps."""
        heard = [step for step in steps if step is not None]
        side = max(heard[0].winners.shape[1:])
        cells = [
            _coloured(np.full((side, side), -1) if step is None else step.winners[image].numpy(), side)
            for step in steps
        ]
        strip = np.concatenate([np.pad(cell, ((0, 0), (0, 2), (0, 0)), constant_values=255) for cell in cells], 1)
        return {
            "parts": torch.stack([step.parts for step in heard]).mean(0).tolist(),
            "rho": float(torch.stack([step.rho[image] for step in heard]).mean()),
            "min_norm": torch.stack([step.min_norm[image] for step in heard]).mean(0).tolist(),
            "winners": _data(PIL.Image.fromarray(strip)),
        }

    def _part(self, control: int, image: int) -> PIL.Image.Image:
        """One control's part over all steps, white is all of it."""
        return _picture(torch.stack(self.maps).mean(0)[control, image][None])

    def _overlay(self, step: int, image: int) -> str:
        """The winners in their colours."""
        winners = self.winners(step, image)
        return _data(PIL.Image.fromarray(_coloured(winners, max(winners.shape))))


def _curve(errors: Sequence[float]) -> dict[str, Any]:
    """A line in a box of 100 by 40 from the first step to the last, its top the largest error."""
    top, last = max(errors) or 1.0, max(len(errors) - 1, 1)
    points = " ".join(f"{100 * step / last:.1f},{40 * (1 - error / top):.1f}" for step, error in enumerate(errors))
    return {"points": points, "first": errors[0], "last": errors[-1]}


_CELL = 24
"""Pixels of a side of a small map."""


def _coloured(winners: np.ndarray, side: int) -> np.ndarray:
    """Controls in their colours, black where nobody won; each place as large as fits :data:`_CELL`."""
    picture = np.zeros((*winners.shape, 3), np.uint8)
    for winner in np.unique(winners[winners >= 0]):
        colour = _COLOURS[winner % len(_COLOURS)]
        picture[winners == winner] = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return np.kron(picture, np.ones((max(1, _CELL // side),) * 2 + (1,), np.uint8))


def _picture(values: Tensor) -> PIL.Image.Image:
    grey = values.float().cpu().clamp(0, 1).mul(255).round().byte()
    return PIL.Image.fromarray(grey.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _data(picture: PIL.Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
