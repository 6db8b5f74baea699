"""The ONNX graph of a head, layer by layer.

1. Equal calls give equal nodes and names, so that equal heads have equal bytes.
2. Seeded constants are stored small (signs and Hadamard matrices as int8); ONNX Runtime unfolds them when it loads.
3. onnx is imported inside the functions that need it, so that the inference process can import this file.
4. Constant factors are moved to where they cost nothing: the transforms stay unnormalised, the normalisation carries
   the Fourier gain, the readout carries the amplitude of the code and the length of the prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adaptors import hadamard
from adaptors.fields import HeadFields, Part, TapShapes
from adaptors.quantise import F32, quantise_rows

if TYPE_CHECKING:
    import onnx

EPSILON = 1e-6
"""Least length by which a vector is divided to bring it to unit length."""


class Graph:
    """Nodes and constants with names of their own: `/1`, `/2`, ..."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def name(self) -> str:
        self._count += 1
        return f"/{self._count}"

    def constant(self, value: NDArray[Any]) -> str:
        """The name of a constant; equal ones are stored once."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(value) if value.ndim else value
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.name()
            self.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def number(self, value: float) -> str:
        return self.constant(np.asarray(value, np.float32))

    def integers(self, *values: int) -> str:
        return self.constant(np.asarray(values, np.int64))

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        result = output or self.name()
        self.nodes.append(helper.make_node(operator, list(inputs), [result], **attributes))
        return result

    def cast(self, value: NDArray[Any]) -> str:
        """Small integers, as float32."""
        from onnx import TensorProto

        return self.node("Cast", self.constant(value), to=TensorProto.FLOAT)

    def sylvester(self, n: int) -> str:
        """The `(n, n)` matrix of +1 and -1 as the Kronecker product of two small ones."""
        p, q = hadamard.transform_factors(n)
        outer = self.cast(hadamard.sylvester(p).astype(np.int8).reshape(p, 1, p, 1))
        inner = self.cast(hadamard.sylvester(q).astype(np.int8).reshape(1, q, 1, q))
        return self.node("Reshape", self.node("Mul", outer, inner), self.integers(n, n))


class Transform:
    """The unnormalised Walsh-Hadamard transform of n = a * b numbers, laid out as `(batch, a, b)`.

    Rows that hold only zeros before it, or that nobody reads after it, are left out of the products."""

    def __init__(self, graph: Graph, n: int) -> None:
        self.graph = graph
        self.a, self.b = hadamard.transform_factors(n)
        self.left, self.right = graph.sylvester(self.a), graph.sylvester(self.b)

    def rows(self, width: int) -> int:
        return -(-width // self.b)

    def lay_out(self, x: str, width: int) -> str:
        """`(batch, width)` to `(batch, rows, b)`."""
        g, rows = self.graph, self.rows(width)
        if missing := rows * self.b - width:
            x = g.node("Pad", x, g.integers(0, 0, 0, missing))
        return g.node("Reshape", x, g.integers(0, rows, self.b))

    def apply(self, x: str, before: int, after: int) -> str:
        """`(batch, before, b)` to `(batch, after, b)`, the product that loses more rows first."""
        g, left = self.graph, self.left
        if (before, after) != (self.a, self.a):
            left = g.node("Slice", left, g.integers(0, 0), g.integers(after, before))
        if before <= after:
            return g.node("MatMul", left, g.node("MatMul", x, self.right))
        return g.node("MatMul", g.node("MatMul", left, x), self.right)

    def flatten(self, x: str, width: int) -> str:
        """`(batch, rows, b)` to `(batch, width)`."""
        g, full = self.graph, self.rows(width) * self.b
        x = g.node("Reshape", x, g.integers(0, full))
        return x if full == width else g.node("Slice", x, g.integers(0), g.integers(width), g.integers(1))


class HeadGraph(Graph):
    """The layers of a head (`adaptors.operators.base.Layers`) as nodes; a layer is the name of its result.

    `weights` as `Head.weights()` gives them; `code_scale` is what the adapted features must still be multiplied by."""

    def __init__(
        self, fields: HeadFields, parts: Sequence[Part], shapes: TapShapes, weights: Mapping[str, F32], seed: int
    ) -> None:
        super().__init__()
        self.fields, self.parts, self.shapes, self.weights, self.seed = fields, parts, shapes, weights, seed
        self.code_scale = 1.0
        self.width = len(weights["shift"])

    def matrix(self, name: str, scale: float | F32 = 1.0) -> str:
        """A learned matrix; `scale`, a number or one a row, is multiplied in."""
        value = self.weights[f"matrix.{name}"]
        if self.fields.bits == 32:
            factor = np.asarray(scale, np.float32).reshape(-1, *[1] * (value.ndim - 1))
            return self.constant((value * factor).astype(np.float32))
        quantised, step = quantise_rows(value)
        steps = self.constant((step * scale).astype(np.float32))
        return self.node("DequantizeLinear", self.constant(quantised), steps, axis=0)

    def bias(self, name: str) -> str:
        return self.constant(self.weights[f"bias.{name}"])

    def unit(self, x: str, epsilon: float) -> str:
        norm = self.node("ReduceL2", x, self.integers(1), keepdims=1)
        return self.node("Div", x, self.node("Max", norm, self.number(epsilon)))

    def vector(self, factor: float | F32 = 1.0) -> str:
        """The normalised vector input times `factor`, a number or one a column."""
        inputs = [tap if pool is None else self.pool(tap) for tap, pool in self.parts]
        if self.fields.normalisation == "unit":
            inputs = [self.unit(x, EPSILON) for x in inputs]
        joined = inputs[0] if len(inputs) == 1 else self.node("Concat", *inputs, axis=1)
        centred = self.node("Sub", joined, self.constant(self.weights["shift"]))
        return self.node("Mul", centred, self.constant((self.weights["scale"] * factor).astype(np.float32)))

    def scaled(self) -> str:
        return self.vector(self.width**0.5)

    def map(self) -> str:
        return str(self.fields.spatial)

    def dense(self, x: str, name: str, width: int) -> str:
        return self.node("Gemm", x, self.matrix(name), self.bias(name), transB=1)

    def conv(self, x: str, name: str, width: int) -> str:
        return self.node("Conv", x, self.matrix(name), self.bias(name))

    def spread(self, x: str, name: str) -> str:
        return self.node("Conv", x, self.matrix(name), pads=[1, 1, 1, 1], group=len(self.weights[f"matrix.{name}"]))

    def act(self, x: str) -> str:
        return self.node("Relu" if self.fields.activation == "relu" else "HardSwish", x)

    def add(self, x: str, y: str) -> str:
        return self.node("Add", x, y)

    def pool(self, x: str) -> str:
        pool = self.fields.pool
        if pool == "pyramid":
            return self._pyramid(x, *self.shapes[self.map()][1:])
        if pool == "gem":
            x = self.node("Pow", self.node("Max", x, self.number(1e-3)), self.number(3.0))
        x = self.node("Flatten", self.node("GlobalMaxPool" if pool == "max" else "GlobalAveragePool", x))
        return self.node("Pow", x, self.number(1 / 3)) if pool == "gem" else x

    def join(self, x: str) -> str:
        return self.node("Concat", x, self.scaled(), axis=1) if self.width else x

    def _pyramid(self, x: str, height: int, width: int) -> str:
        """Means of the four quadrants, which share the middle row and column of an odd map, quadrant by quadrant."""
        kernel, strides = [(height + 1) // 2, (width + 1) // 2], [max(1, height // 2), max(1, width // 2)]
        x = self.node("AveragePool", x, kernel_shape=kernel, strides=strides)
        if 1 in (height, width):
            x = self.node("Expand", x, self.integers(1, 1, 2, 2))
        return self.node("Flatten", self.node("Transpose", x, perm=[0, 2, 3, 1]))
