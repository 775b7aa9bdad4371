"""The rules everyone ships: add the branches, average them, or take the largest."""

from __future__ import annotations

from torch import Tensor

from counterpoint.fusion.layout import average
from counterpoint.types import Features


def add(features: Features) -> Tensor:
    """``sum_n f_n``, added in order and in the features' dtype: bit-equal to diffusers' ``MultiControlNetModel``."""
    total = features[0]
    for feature in features[1:]:
        total = total + feature
    return total


def mean(features: Features) -> Tensor:
    """``1/N sum_n f_n``, added in float32: in half precision a sum may be infinite where its mean is not."""
    if len(features) == 1:
        return features[0]
    return (add(features.float()) / len(features)).to(features.dtype)


def largest(features: Features) -> Tensor:
    """Of every number the one of largest magnitude; where several branches share it, their mean."""
    size = features.abs()
    return average(features, (size == size.amax(0)).float())
