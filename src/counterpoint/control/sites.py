"""What branches say at each site, made one feature by a rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.types import Fusion, UserError


def shaped(sites: Sequence[Tensor], region: Tensor | None, decay: float) -> list[Tensor]:
    """One branch's features as its region and decay have them, from the first site to the deepest."""
    if decay != 1:
        sites = [site * decay ** (len(sites) - 1 - depth) for depth, site in enumerate(sites)]
    if region is not None:
        sites = [site * F.interpolate(region, site.shape[2:], mode="area").to(site.dtype) for site in sites]
    return list(sites)


def site_names(count: int) -> list[str]:
    """What a U-Net's sites are called, from the first to the deepest."""
    return [*(f"down.{number}" for number in range(count - 1)), "mid"]


def fuse(fusion: Fusion, said: Mapping[str, Sequence[Tensor]], names: Sequence[str] | None = None) -> list[Tensor]:
    """Several branches' features, one at each site.

    Args:
        fusion: the rule.
        said: branch -> its features from the first site to the deepest.
        names: what sites are called; default as :func:`site_names` has them.

    Raises:
        UserError: the branches do not fit together, the rule names a site that is not there, or makes something of
            another shape.
    """
    names = site_names(max(map(len, said.values()))) if names is None else names
    whole = stacked(said, names)
    if unknown := sorted({*fusion.sites} - {*names, "last"}):
        raise UserError(f"{fusion.name} has a rule for the site {unknown[0]!r}; there are {', '.join(names)}, last")
    fused = []
    for name, features in zip(names, whole, strict=True):
        one = fusion.at(name, last=name == names[-1])(features)
        if one.shape != features.shape[1:]:
            raise UserError(
                f"{fusion.name} made {tuple(one.shape)} of {tuple(features.shape)} at {name}: a rule takes "
                "(n, b, c, h, w) and returns (b, c, h, w)"
            )
        fused.append(one)
    return fused


def stacked(said: Mapping[str, Sequence[Tensor]], names: Sequence[str]) -> Iterator[Tensor]:
    """Site after site the features of all branches; one that is pooled over the picture says the same everywhere."""
    counts = {name: len(sites) for name, sites in said.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"the controls speak at different numbers of sites ({listed}): {ONE_FAMILY}")
    sites = zip(names, zip(*said.values(), strict=True), strict=True)
    return (together(place, dict(zip(said, features, strict=True))) for place, features in sites)


def together(place: str, said: Mapping[str, Tensor]) -> Tensor:
    """The features of all branches at one place, stacked.

    Raises:
        UserError: they are of different shapes.
    """
    whole = max((one.shape for one in said.values()), key=lambda shape: shape[2:].numel())
    if any(one.shape != whole and one.shape != (*whole[:2], 1, 1) for one in said.values()):
        listed = ", ".join(f"{name} {tuple(one.shape)}" for name, one in said.items())
        raise UserError(f"the controls do not fit together at {place} ({listed}): {ONE_FAMILY}")
    return torch.stack([one.expand(whole) for one in said.values()])


ONE_FAMILY = "use ControlNets made for one model"
