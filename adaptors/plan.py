"""What a head computes, counted without weights: its arrays, its multiply-accumulates and its work by kind.

Work is counted for one input, as `adaptors.graph` lays a head out and ONNX Runtime optimises it; a test compares the
counts with packed graphs. Int8 weights are unfolded when a head is loaded, so that bits cost no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from adaptors.fields import HeadFields, Part, Pool, TapShapes
from adaptors.hadamard import transform_factors, transform_macs

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
Shape = tuple[int, ...]


def pooled_width(channels: int, pool: Pool | None) -> int:
    return channels * (4 if pool == "pyramid" else 1)


class Plan:
    """The layers of a head (`adaptors.operators.base.Layers`) on the shapes of one input.

    `arrays` (name -> shape) holds the learned arrays in the order of the layers, `work` the amount of each of `UNITS`,
    `macs` the multiply-accumulates without elementwise work, `seeded` the bytes of constants made from the seed."""

    def __init__(self, fields: HeadFields, parts: Sequence[Part], shapes: TapShapes) -> None:
        self.fields, self.parts, self.shapes = fields, parts, shapes
        self.arrays: dict[str, Shape] = {}
        self.macs = self.seeded = 0
        self.work: Work = dict.fromkeys(UNITS, 0.0)
        self.count(call=1, tap=len(fields.taps) + (fields.spatial is not None))
        self.width = sum(pooled_width(shapes[tap][0], pool) for tap, pool in parts)

    def count(self, **amounts: float) -> None:
        for kind, amount in amounts.items():
            self.work[kind] += amount

    def vector(self) -> Shape:
        parts, width = len(self.parts), self.width
        for tap, pool in self.parts:
            if pool is not None:
                self._pool(self.shapes[tap])
        if parts > 1:
            self.count(node=1, element=width)
        if self.fields.normalisation == "unit":
            self.count(node=3 * parts, element=2 * width)
        if parts:
            self.count(node=2, element=2 * width)
        return (width,)

    scaled = vector

    def map(self) -> Shape:
        shape = self.shapes[str(self.fields.spatial)]
        self.count(node=1, reorder=prod(shape))
        return shape

    def dense(self, x: Shape, name: str, width: int) -> Shape:
        self._layer(name, (width, x[0]))
        self.macs += x[0] * width
        self.count(node=1, gemm=x[0] * -(-width // LANES) * LANES)
        return (width,)

    def conv(self, x: Shape, name: str, width: int) -> Shape:
        self._layer(name, (width, x[0], 1, 1))
        macs = prod(x) * width
        self.macs += macs
        self.count(node=1, conv=macs)
        return (width, *x[1:])

    def spread(self, x: Shape, name: str) -> Shape:
        self.arrays[f"matrix.{name}"] = (x[0], 1, 3, 3)
        self.macs += 9 * prod(x)
        self.count(node=1, depthwise=9 * prod(x))
        return x

    def act(self, x: Shape) -> Shape:
        """A rectifier, and any activation of a map, is a part of the product before it."""
        if self.fields.activation == "hardswish" and len(x) == 1:
            self.count(node=2, element=2 * x[0])
        elif self.fields.activation == "hardswish":
            self.count(hardswish=prod(x))
        return x

    def add(self, x: Shape, y: Shape) -> Shape:
        self.count(node=1, element=prod(y))
        return y

    def pool(self, x: Shape) -> Shape:
        """Pooled numbers leave the layout of convolutions, a whole map only for `gem`."""
        self.count(node=1, reorder=prod(x) if self.fields.pool == "gem" else x[0])
        self._pool(x)
        return (pooled_width(x[0], self.fields.pool),)

    def join(self, x: Shape) -> Shape:
        if self.width:
            self.count(node=1, element=x[0] + self.vector()[0])
        return (x[0] + self.width,)

    def lay_out(self, width: int, n: int) -> None:
        """A vector into the matrix of a transform, filled up where its last row is not full; or back, cut."""
        self.count(view=1)
        if width % transform_factors(n)[1]:
            self.count(node=1, element=width)

    def transform(self, inputs: int, outputs: int, n: int) -> None:
        macs = transform_macs(n, inputs, outputs)
        self.macs += macs
        self.count(node=2, hadamard=macs)

    def _layer(self, name: str, shape: Shape) -> None:
        self.arrays |= {f"matrix.{name}": shape, f"bias.{name}": shape[:1]}

    def _pool(self, x: Shape) -> None:
        numbers, pool = prod(x), self.fields.pool
        if pool == "pyramid":  # pooled, expanded where thin, brought into order
            self.count(node=3 if 1 in x[1:] else 2, view=1, pyramid=numbers)
        elif pool == "gem":  # cut off below, cubed, averaged, and the root
            self.count(node=4, view=1, element=numbers, power=numbers + x[0], average=numbers)
        else:
            self.count(node=1, view=1, **{pool: numbers})
