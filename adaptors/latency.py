"""How long a head takes: its work, counted by kind, times what one unit of each kind costs on a board.

Rules of this file:

1. Work is counted from the specification alone, for one input, as `adaptors.archive` lays the graph out and ONNX
   Runtime optimises it; a test compares the counts with packed graphs.
2. A model has one price a kind, none negative: more work is never predicted to take less time.
3. Without a profile of the board the built-in prices hold. Int8 weights are unfolded when a head is loaded, so that
   bits cost no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from adaptors.spec import (
    PROTOTYPE_DIMENSIONS,
    HeadSpec,
    TapShapes,
    adapted_width,
    next_power_of_two,
    transform_factors,
    transform_macs,
    vector_width,
)

LANES = 16
"""Columns of a matrix that a product with one row computes at once: fewer take as long (MLAS packs 16)."""

UNITS = {
    "call": "one call",
    "tap": "one input",
    "node": "one node that computes",
    "view": "one node that changes a shape only",
    "element": "one number added, multiplied or copied",
    "gemm": "one multiply-accumulate of a dense layer, its columns rounded up to whole lanes",
    "conv": "one multiply-accumulate of a 1x1 convolution",
    "depthwise": "one multiply-accumulate of a depthwise 3x3 convolution",
    "hadamard": "one multiply-accumulate of a Walsh-Hadamard transform",
    "hardswish": "one number of a map through hard-swish",
    "cosine": "one cosine",
    "power": "one number raised to a power",
    "average": "one number pooled into an average",
    "max": "one number pooled into a maximum",
    "pyramid": "one number pooled into quadrants",
    "reorder": "one number brought into or out of the layout of convolutions",
}
"""The kinds of work, and what a unit of each is."""

Work = dict[str, float]


class InvalidModel(ValueError):
    """Prices that cannot be: a kind is missing, unknown, negative or not finite; the message names it."""


@dataclass(frozen=True)
class LatencyModel:
    """Microseconds that one unit of every kind of work takes; raises InvalidModel for prices that cannot be."""

    prices: Mapping[str, float]

    def __post_init__(self) -> None:
        if odd := sorted(set(self.prices) ^ set(UNITS)):
            raise InvalidModel(f"prices must be given for exactly {', '.join(UNITS)}; missing or unknown: {odd}")
        for kind, price in self.prices.items():
            if isinstance(price, bool) or not isinstance(price, int | float) or not (isfinite(price) and price >= 0):
                raise InvalidModel(f"the price of {kind!r} is {price!r}: it must be a finite number from 0")

    def predict_ms(self, spec: HeadSpec, shapes: TapShapes, classes: int) -> float:
        """Milliseconds of one call on one input and one thread; taps must exist (see `adaptors.spec.check_taps`)."""
        prices = self.prices
        return sum(amount * prices[kind] for kind, amount in work(spec, shapes, classes).items()) / 1e3


def work(spec: HeadSpec, shapes: TapShapes, classes: int) -> Work:
    """Kind -> amount of one call on one input; every kind of `UNITS` is there."""
    w: Work = dict.fromkeys(UNITS, 0.0)
    w["call"], w["tap"] = 1, len(spec.inputs)
    vector, adapted = vector_width(spec, shapes), adapted_width(spec, shapes)
    if spec.spatial is not None and not spec.convolutional:
        _pool(w, spec.pool, *shapes[spec.spatial])
    if vector:
        _normalise(w, spec, vector)
    if spec.operator == "fourier":
        _fourier(w, vector, spec.width)
    elif spec.operator == "mlp":
        _layers(w, spec, vector)
    elif spec.convolutional:
        assert spec.spatial is not None
        _convolutions(w, spec, *shapes[spec.spatial])
        if vector:
            _count(w, node=1, element=adapted)  # joined with the vector
    if spec.reconfigurator == "prototypes":
        _hypervector(w, adapted)
        adapted = PROTOTYPE_DIMENSIONS
    _dense(w, adapted, classes)
    return w


def _count(w: Work, **amounts: float) -> None:
    for kind, amount in amounts.items():
        w[kind] += amount


def _dense(w: Work, inputs: int, outputs: int) -> None:
    _count(w, node=1, gemm=inputs * -(-outputs // LANES) * LANES)


def _normalise(w: Work, spec: HeadSpec, vector: int) -> None:
    parts = len(spec.inputs) - spec.convolutional
    if parts > 1:
        _count(w, node=1, element=vector)
    if spec.normalisation == "unit":
        _count(w, node=3 * parts, element=2 * vector)
    _count(w, node=2, element=2 * vector)


def _pool(w: Work, pool: str, channels: int, height: int, width: int) -> None:
    numbers = channels * height * width
    if pool == "pyramid":  # pooled, expanded where thin, brought into order
        _count(w, node=3 if 1 in (height, width) else 2, view=1, pyramid=numbers)
    elif pool == "gem":  # cut off below, cubed, averaged, and the root
        _count(w, node=4, view=1, element=numbers, power=numbers + channels, average=numbers)
    else:
        w[pool] += numbers
        _count(w, node=1, view=1)


def _layers(w: Work, spec: HeadSpec, vector: int) -> None:
    for i in range(spec.depth):
        _dense(w, spec.width if i else vector, spec.width)
        if spec.activation == "hardswish":  # a rectifier is a part of the product
            _count(w, node=2, element=2 * spec.width)
        if spec.residual and i:
            _count(w, node=1, element=spec.width)


def _convolutions(w: Work, spec: HeadSpec, channels: int, height: int, width: int) -> None:
    """Activations are a part of the convolution before them; pooled numbers leave the layout, a map only for `gem`."""
    area, filters = height * width, spec.width
    numbers = filters * area
    _count(w, node=2, reorder=channels * area + (numbers if spec.pool == "gem" else filters))
    _count(w, node=1, conv=channels * numbers)
    for _ in range(spec.depth):
        if spec.operator == "depthwise":
            _count(w, node=1, depthwise=9 * numbers)
        _count(w, node=1, conv=filters * numbers)
        if spec.residual:
            _count(w, node=1, element=numbers)
    if spec.activation == "hardswish":
        w["hardswish"] += (1 + spec.depth) * numbers
    _pool(w, spec.pool, filters, height, width)


def _fourier(w: Work, vector: int, width: int) -> None:
    n = next_power_of_two(max(vector, width))
    _reshape(w, vector, n)
    for inputs, outputs in ((vector, n), (n, n), (n, width)):
        _transform(w, inputs, outputs, n)
    _count(w, node=2, element=2 * n)  # the signs between
    _reshape(w, width, n)
    _count(w, node=2, element=width, cosine=width)  # the phases


def _hypervector(w: Work, adapted: int) -> None:
    n = next_power_of_two(max(adapted, PROTOTYPE_DIMENSIONS))
    _count(w, node=1, element=adapted)  # the signs
    _reshape(w, adapted, n)
    _transform(w, adapted, PROTOTYPE_DIMENSIONS, n)
    _reshape(w, PROTOTYPE_DIMENSIONS, n)
    _count(w, node=3, element=2 * PROTOTYPE_DIMENSIONS)  # to unit length


def _reshape(w: Work, width: int, n: int) -> None:
    """A vector into the matrix of a transform, filled up where its last row is not full; or back, cut."""
    w["view"] += 1
    if width % transform_factors(n)[1]:
        _count(w, node=1, element=width)


def _transform(w: Work, inputs: int, outputs: int, n: int) -> None:
    _count(w, node=2, hadamard=transform_macs(n, inputs, outputs))


def fit(works: Sequence[Work], ms: NDArray[np.float64], default: LatencyModel) -> LatencyModel:
    """The prices of least squared relative error for measured times `ms (heads,)`, none of them negative.

    A kind of work that no head has keeps its price of `default`."""
    kinds = [kind for kind in UNITS if any(w[kind] for w in works)]
    amounts = np.array([[w[kind] for kind in kinds] for w in works], np.float64)
    largest = amounts.max(axis=0)
    prices = nonnegative(amounts / largest / ms[:, None], np.ones(len(ms))) * 1e3 / largest
    return LatencyModel({**default.prices, **dict(zip(kinds, prices.tolist(), strict=True))})


def nonnegative(a: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 of least |a x - y|^2, `a (rows, columns)`, by active sets (Lawson & Hanson 1974, chapter 23)."""
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(3 * a.shape[1]):
        gain = a.T @ (y - a @ x)
        if free.all() or gain[~free].max() <= 1e-10 * np.abs(a.T @ y).max():
            break
        free[np.flatnonzero(~free)[gain[~free].argmax()]] = True
        while True:
            step = np.zeros_like(x)
            step[free] = np.linalg.lstsq(a[:, free], y, rcond=None)[0]
            if not (blocked := free & (step <= 0)).any():
                break
            share = float((x[blocked] / (x[blocked] - step[blocked])).min())
            x += share * (step - x)
            free &= x > 1e-14
            x[~free] = 0.0
        x = step
    return x


DEFAULT = LatencyModel(
    {
        "call": 12,
        "tap": 3,
        "node": 1.8,
        "view": 4.2,
        "element": 0.0011,
        "gemm": 0.00025,
        "conv": 7e-05,
        "depthwise": 0.00014,
        "hadamard": 7e-05,
        "hardswish": 0.0006,
        "cosine": 0.008,
        "power": 0.0013,
        "average": 0.00075,
        "max": 0.00075,
        "pyramid": 0.00065,
        "reorder": 0.00045,
    }
)
"""The prices without a profile, careful ones: four times what one core of a server (x86-64, AVX-512, 2.6 GHz) takes,
which gives products the rate of a small board's core, 10^10 multiply-accumulates a second."""
