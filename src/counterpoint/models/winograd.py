"""Convolutions by fewer multiplications: Winograd's minimal filtering in a network of OpenVINO.

A 3 x 3 convolution of stride 1 takes 9 multiplications an output and pair of channels. From 6 x 6 inputs 4 x 4 outputs
can be had by 36 of them, from 4 x 4 inputs 2 x 2 by 16, once inputs and filters are transformed by small matrices
(arXiv:1509.09308, section 4). It is the same function, rounded otherwise. Filters take 4 times the memory, or 1.8
times, but once for all shapes of the input, of which each would pack its own.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TAPS = 3
_FEWEST = 128
"""Channels, in and out, from which on the transforms are paid for."""
_MANY = 64
"""Tiles in an image from which on they are as large as that: of smaller images there are so many channels that reading
their filters takes as long as what is saved."""
_POINTS = {2: (0, 4, -4), 4: (0, 3, -3, 6, -6)}
"""Outputs of a tile's side -> where its polynomials are evaluated besides infinity, in quarters. At the usual 0, 1, -1,
2, -2 a sum over 320 channels is off by 3.0e-6 in the mean square, at these by 1.5e-6."""

Filters = dict[tuple[str, int], NDArray[np.float32]]
"""Name of a convolution and side of its tiles -> its transformed filters, ``((side + 2)**2, out, in)``."""


@cache
def transforms(side: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Matrices of outputs ``a (side, side + 2)``, filters ``g (side + 2, 3)`` and inputs ``b (side + 2, side + 2)``, by
    Cook and Toom: along one side ``a @ ((g @ filter) * (b @ inputs))`` are the outputs."""

    def product(roots: tuple[Fraction, ...]) -> list[Fraction]:
        """Coefficients, the constant one first, of the polynomial with these roots."""
        found = [Fraction(1)]
        for root in roots:
            found = [up - root * here for up, here in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
        return found

    points = tuple(Fraction(one, 4) for one in _POINTS[side])
    others = [tuple(other for other in points if other != one) for one in points]
    scales = [prod(one - other for other in rest) for one, rest in zip(points, others, strict=True)]
    a = [[*(one**power for one in points), Fraction(power == side - 1)] for power in range(side)]
    g = [[one**power / scale for power in range(_TAPS)] for one, scale in zip(points, scales, strict=True)]
    b = [*([*product(rest), Fraction(0)] for rest in others), product(points)]
    rows = a, [*g, [Fraction(0), Fraction(0), Fraction(1)]], b
    a_, g_, b_ = (np.array(matrix, np.float64) for matrix in rows)
    return a_, g_, b_


def quicken(model: Any, kept: Filters) -> int:
    """Replace the convolutions of a network for which it pays, in place; how many they are.

    Args:
        model: of OpenVINO, with static shapes.
        kept: transformed filters; those that are missing are added, so that all shapes of a network share them.
    """
    from openvino.utils import replace_node

    found = {node: side for node in model.get_ordered_ops() if (side := _side(node))}
    for node, side in found.items():
        replace_node(node, _filtering(node, side, kept))
    return len(found)


def _side(node: Any) -> int:
    """Of the tiles of a convolution's outputs; 0 where it stays as it is."""
    if node.get_type_name() != "Convolution" or node.input_value(1).get_node().get_type_name() != "Constant":
        return 0
    settings, (out, into, *kernel) = node.get_attributes(), node.input_value(1).get_shape()
    ones = all(list(settings[key]) == [1, 1] for key in ("strides", "dilations", "pads_begin", "pads_end"))
    if not ones or kernel != [_TAPS, _TAPS] or min(out, into) < _FEWEST:
        return 0
    *_, height, width = node.input_value(0).get_shape()
    return next((side for side in sorted(_POINTS, reverse=True) if -(-height // side) * -(-width // side) >= _MANY), 0)


def _filtering(node: Any, side: int, kept: Filters) -> Any:
    from openvino import opset13 as op

    def reshape(one: Any, *shape: int) -> Any:
        return op.reshape(one, np.array(shape), False)

    def product(one: NDArray[np.float32], other: Any, shared: bool = False) -> Any:
        return op.matmul(op.constant(one, shared_memory=shared), other, False, False)

    images, weights = node.input_value(0), node.input_value(1).get_node()
    (batch, into, height, width), out = images.get_shape(), weights.get_output_shape(0)[0]
    reach, down, across = side + _TAPS - 1, -(-height // side), -(-width // side)
    places, tiles = reach**2, batch * down * across
    a, g, b = (np.kron(one, one).astype(np.float32) for one in transforms(side))
    key = node.get_friendly_name(), side
    if key not in kept:
        kept[key] = (g @ weights.data.transpose(2, 3, 0, 1).reshape(_TAPS**2, -1)).reshape(places, out, into)

    # every side-th pixel in an array of its own, so that what lies at one place of all tiles lies side by side
    high, wide = (down + 1) * side, (across + 1) * side
    whole = op.pad(images, np.array((0, 0, 1, 1)), np.array((0, 0, high - height - 1, wide - width - 1)), "constant")
    whole = op.transpose(reshape(whole, batch, into, down + 1, side, across + 1, side), np.array((3, 5, 1, 0, 2, 4)))
    parts = []
    for row, column in np.ndindex(reach, reach):
        first = np.array((row % side, column % side, row // side, column // side))
        part = op.slice(whole, first, first + (1, 1, down, across), np.ones(4, int), np.array((0, 1, 4, 5)))
        parts.append(reshape(part, 1, into * tiles))
    inputs = reshape(product(b, op.concat(parts, 0)), places, into, tiles)
    # filters from the left: there they are read where they lie, while from the right every shape would pack its own
    sums = reshape(product(kept[key], inputs, shared=True), places, out * tiles)
    made = op.transpose(reshape(product(a, sums), side, side, out, batch, down, across), np.array((3, 2, 4, 0, 5, 1)))
    made = reshape(made, batch, out, down * side, across * side)
    return op.slice(made, np.zeros(2, int), np.array((height, width)), np.ones(2, int), np.array((2, 3)))
