"""The archive of a head: one ONNX graph and the description that goes with it.

Rules of this file:

1. The graph computes what `adaptors.modules.Head` computes, for every specification; a test compares them.
2. Equal arguments give equal bytes: the digest of the bytes names the head.
3. Seeded constants are stored small (signs and Hadamard matrices as int8); ONNX Runtime unfolds them when it loads.
4. No torch here, and onnx only inside `pack`, so that the inference process can import this file.
5. Constant factors are moved to where they cost nothing: the transforms stay unnormalised, the normalisation carries
   the Fourier gain, the readout carries the amplitude of the code and the length of the prototypes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adaptors import hadamard
from adaptors.quantise import quantise_rows
from adaptors.spec import (
    PROTOTYPE_DIMENSIONS,
    PROTOTYPE_SCALE,
    Cost,
    HeadSpec,
    InvalidSpec,
    TapShapes,
    adapted_width,
    check_taps,
    cost,
    next_power_of_two,
    vector_width,
    weight_shapes,
)

if TYPE_CHECKING:
    import onnx

F32 = NDArray[np.float32]
METADATA_KEY = "edgeear.head"
OUTPUT = "scores"
OPSET, IR_VERSION = 18, 10
_EPSILON = 1e-6
_FIELDS = {"spec", "shapes", "classes", "seed", "digest"}


class ArchiveError(ValueError):
    """A head that cannot be packed, or a stored description that does not fit its bytes; the message says which."""


@dataclass(frozen=True, eq=False)
class HeadArchive:
    """A fitted head as it is stored and served: graph inputs are the taps `(batch, *shape)`, the output is
    `scores (batch, classes)`, all float32. `shapes` holds the taps of `spec.inputs` only."""

    spec: HeadSpec
    shapes: dict[str, tuple[int, ...]]
    classes: tuple[str, ...]
    seed: int
    onnx: bytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the graph's bytes, hexadecimal."""
        return hashlib.sha256(self.onnx).hexdigest()

    def cost(self) -> Cost:
        return cost(self.spec, self.shapes, len(self.classes))

    def to_dict(self) -> dict[str, object]:
        """The JSON-able description, digest included, without the bytes."""
        return {**_description(self.spec, self.shapes, self.classes, self.seed), "digest": self.digest}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], onnx: bytes) -> HeadArchive:
        """Inverse of `to_dict`; raises ArchiveError when a field is wrong or the bytes are not those described."""
        if set(data) != _FIELDS:
            raise ArchiveError(f"description of a head has fields {sorted(data)}, expected {sorted(_FIELDS)}")
        try:
            spec = HeadSpec.from_dict(data["spec"])
            shapes = {str(t): tuple(int(n) for n in shape) for t, shape in data["shapes"].items()}
            check_taps(spec, shapes)
            classes, seed = tuple(data["classes"]), int(data["seed"])
        except (InvalidSpec, TypeError, ValueError, AttributeError) as error:
            raise ArchiveError(f"description of a head does not parse: {error}") from error
        if set(shapes) != set(spec.inputs):
            raise ArchiveError(f"shapes are given for {sorted(shapes)}, the head reads {sorted(spec.inputs)}")
        if not all(isinstance(c, str) for c in classes):
            raise ArchiveError(f"classes must be names, got {classes!r}")
        head = cls(spec, shapes, classes, seed, onnx)
        if head.digest != data["digest"]:
            raise ArchiveError(f"head has digest {head.digest}, described is {data['digest']}: fetch the file again")
        return head


def pack(
    spec: HeadSpec, shapes: TapShapes, classes: Sequence[str], weights: Mapping[str, F32], seed: int
) -> HeadArchive:
    """The archive of a fitted head: `weights` as `Head.weights()` gives them, `seed` the one it was built with.

    Raises InvalidSpec when `shapes` do not fit `spec`, ArchiveError when an array is missing or has another shape."""
    check_taps(spec, shapes)
    own = {t: tuple(shapes[t]) for t in spec.inputs}
    for name, shape in weight_shapes(spec, own, len(classes)).items():
        found = weights[name].shape if name in weights else "absent"
        if found != shape:
            raise ArchiveError(f"array {name!r} of the head is {found}, expected {shape}")
    if reserved := [t for t in own if t == OUTPUT or t.startswith("/")]:
        raise ArchiveError(f"tap {reserved[0]!r} has a name that the graph needs for itself: rename the tap")
    builder = _HeadGraph(spec, own, len(classes), weights, seed)
    builder.build()
    description = _description(spec, own, classes, seed)
    return HeadArchive(spec, own, tuple(classes), seed, _serialised(builder, description))


def _description(spec: HeadSpec, shapes: TapShapes, classes: Sequence[str], seed: int) -> dict[str, object]:
    listed = {t: list(s) for t, s in shapes.items()}
    return {"spec": spec.to_dict(), "shapes": listed, "classes": list(classes), "seed": seed}


def _serialised(builder: _HeadGraph, description: dict[str, object]) -> bytes:
    from onnx import TensorProto, checker, helper

    inputs = [
        helper.make_tensor_value_info(t, TensorProto.FLOAT, ["batch", *shape]) for t, shape in builder.shapes.items()
    ]
    output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", builder.classes])
    graph = helper.make_graph(builder.nodes, "head", inputs, [output], builder.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    helper.set_model_props(model, {METADATA_KEY: json.dumps(description, sort_keys=True, separators=(",", ":"))})
    checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


class _Graph:
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
        p = 1 << (n.bit_length() - 1) // 2
        q = n // p
        outer = self.cast(hadamard.sylvester(p).astype(np.int8).reshape(p, 1, p, 1))
        inner = self.cast(hadamard.sylvester(q).astype(np.int8).reshape(1, q, 1, q))
        return self.node("Reshape", self.node("Mul", outer, inner), self.integers(n, n))

    def join(self, parts: Sequence[str]) -> str:
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=1)


class _Transform:
    """The unnormalised Walsh-Hadamard transform of n = a * b numbers, laid out as `(batch, a, b)`.

    Rows that hold only zeros before it, or that nobody reads after it, are left out of the products."""

    def __init__(self, graph: _Graph, n: int) -> None:
        self.graph = graph
        self.a = 1 << (n.bit_length() - 1) // 2
        self.b = n // self.a
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


class _HeadGraph(_Graph):
    """The graph of one head. `_code_scale`: what the adapted features must still be multiplied by."""

    def __init__(self, spec: HeadSpec, shapes: TapShapes, classes: int, weights: Mapping[str, F32], seed: int) -> None:
        super().__init__()
        self.spec, self.shapes, self.classes, self.weights, self.seed = spec, shapes, classes, weights, seed
        self._code_scale = 1.0

    def build(self) -> None:
        self._read(self._adapted())

    def _matrix(self, name: str, scale: float | F32 = 1.0) -> str:
        """A learned matrix; `scale`, a number or one a row, is multiplied in."""
        value = self.weights[f"matrix.{name}"]
        if self.spec.bits == 32:
            factor = np.asarray(scale, np.float32).reshape(-1, *[1] * (value.ndim - 1))
            return self.constant((value * factor).astype(np.float32))
        quantised, step = quantise_rows(value)
        steps = self.constant((step * scale).astype(np.float32))
        return self.node("DequantizeLinear", self.constant(quantised), steps, axis=0)

    def _bias(self, name: str) -> str:
        return self.constant(self.weights[f"bias.{name}"])

    def _pool(self, x: str, height: int, width: int) -> str:
        pool = self.spec.pool
        if pool == "pyramid":
            return self._pyramid(x, height, width)
        if pool == "gem":
            x = self.node("Pow", self.node("Max", x, self.number(1e-3)), self.number(3.0))
        x = self.node("Flatten", self.node("GlobalMaxPool" if pool == "max" else "GlobalAveragePool", x))
        return self.node("Pow", x, self.number(1 / 3)) if pool == "gem" else x

    def _pyramid(self, x: str, height: int, width: int) -> str:
        """Means of the four quadrants, which share the middle row and column of an odd map, quadrant by quadrant."""
        kernel, strides = [(height + 1) // 2, (width + 1) // 2], [max(1, height // 2), max(1, width // 2)]
        x = self.node("AveragePool", x, kernel_shape=kernel, strides=strides)
        if 1 in (height, width):
            x = self.node("Expand", x, self.integers(1, 1, 2, 2))
        return self.node("Flatten", self.node("Transpose", x, perm=[0, 2, 3, 1]))

    def _vector(self, factor: float | F32) -> str:
        """The normalised vector input times `factor`, a number or one a column."""
        spec, parts = self.spec, list(self.spec.taps)
        if spec.spatial is not None and not spec.convolutional:
            parts.append(self._pool(spec.spatial, *self.shapes[spec.spatial][1:]))
        if spec.normalisation == "unit":
            parts = [self._unit(p, _EPSILON) for p in parts]
        centred = self.node("Sub", self.join(parts), self.constant(self.weights["shift"]))
        return self.node("Mul", centred, self.constant((self.weights["scale"] * factor).astype(np.float32)))

    def _unit(self, x: str, epsilon: float) -> str:
        norm = self.node("ReduceL2", x, self.integers(1), keepdims=1)
        return self.node("Div", x, self.node("Max", norm, self.number(epsilon)))

    def _adapted(self) -> str:
        operator, vector = self.spec.operator, vector_width(self.spec, self.shapes)
        if operator == "linear":
            return self._vector(1.0)
        if operator == "fourier":
            return self._fourier(vector)
        if operator == "mlp":
            return self._mlp(self._vector(vector**0.5))
        parts = [self._conv()]
        return self.join([*parts, self._vector(vector**0.5)] if vector else parts)

    def _fourier(self, vector: int) -> str:
        """cos(gain * H S2 H S1 H S0 x + phase); S0, the gain and three times 1/sqrt(n) are in the normalisation."""
        width, n = self.spec.width, next_power_of_two(max(vector, self.spec.width))
        first, *others = (hadamard.signs(self.seed, f"fourier/{i}", n) for i in range(3))
        gain = (2.0 * self.spec.bandwidth * n) ** 0.5 / n**1.5
        transform = _Transform(self, n)
        rows, all_rows = transform.rows(vector), transform.a
        x = transform.lay_out(self._vector(first[:vector] * np.float32(gain)), vector)
        for i, sign in enumerate(others):
            x = transform.apply(x, all_rows if i else rows, all_rows)
            x = self.node("Mul", x, self.cast(sign.astype(np.int8).reshape(transform.a, transform.b)))
        x = transform.flatten(transform.apply(x, all_rows, transform.rows(width)), width)
        words = self.cast(hadamard.phase_words(self.seed, width))
        self._code_scale = (2.0 / width) ** 0.5
        return self.node("Cos", self.node("Add", x, self.node("Mul", words, self.number(hadamard.TURN))))

    def _activated(self, x: str) -> str:
        return self.node("Relu" if self.spec.activation == "relu" else "HardSwish", x)

    def _mlp(self, x: str) -> str:
        for i in range(self.spec.depth):
            name = f"layer{i}"
            y = self._activated(self.node("Gemm", x, self._matrix(name), self._bias(name), transB=1))
            x = self.node("Add", x, y) if self.spec.residual and i else y
        return x

    def _conv(self) -> str:
        spec = self.spec
        assert spec.spatial is not None
        x = self._activated(self.node("Conv", spec.spatial, self._matrix("stem"), self._bias("stem")))
        for i in range(spec.depth):
            y, name = x, f"block{i}"
            if spec.operator == "depthwise":
                y = self.node("Conv", y, self._matrix(f"spread{i}"), pads=[1, 1, 1, 1], group=spec.width)
            y = self._activated(self.node("Conv", y, self._matrix(name), self._bias(name)))
            x = self.node("Add", x, y) if spec.residual else y
        return self._pool(x, *self.shapes[spec.spatial][1:])

    def _read(self, z: str) -> None:
        scale: float | F32 = self._code_scale
        if self.spec.reconfigurator == "prototypes":
            z, scale = self._hypervector(z), self._prototype_scale()
        self.node("Gemm", z, self._matrix("readout", scale), self._bias("readout"), transB=1, output=OUTPUT)

    def _hypervector(self, z: str) -> str:
        adapted = adapted_width(self.spec, self.shapes)
        n = next_power_of_two(max(adapted, PROTOTYPE_DIMENSIONS))
        transform = _Transform(self, n)
        role = hadamard.signs(self.seed, "prototypes", n)[:adapted].astype(np.int8)
        x = transform.lay_out(self.node("Mul", z, self.cast(role)), adapted)
        x = transform.apply(x, transform.rows(adapted), transform.rows(PROTOTYPE_DIMENSIONS))
        epsilon = _EPSILON * n**0.5 / self._code_scale
        return self._unit(transform.flatten(x, PROTOTYPE_DIMENSIONS), epsilon)

    def _prototype_scale(self) -> F32:
        """`(classes,)`: what brings each stored row of prototypes to the length of the inverse temperature."""
        value = self.weights["matrix.readout"]
        if self.spec.bits == 8:
            quantised, step = quantise_rows(value)
            value = quantised * step[:, None]
        norms: F32 = np.maximum(np.linalg.norm(value, axis=1), _EPSILON)
        return (PROTOTYPE_SCALE / norms).astype(np.float32)
