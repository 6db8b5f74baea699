"""The archive of a head: one ONNX graph and the description that goes with it.

Rules of this file:

1. The graph computes what `adaptors.modules.Head` computes, for every specification; a test compares them.
2. Equal arguments give equal bytes: the digest of the bytes names the head.
3. No torch here, and onnx only inside `pack`, so that the inference process can import this file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from adaptors import hadamard
from adaptors.cost import Cost, cost
from adaptors.fields import TapShapes
from adaptors.graph import EPSILON, HeadGraph, Transform
from adaptors.onnx_bytes import ModelError, check_head
from adaptors.quantise import F32, quantise_rows
from adaptors.spec import (
    PROTOTYPE_DIMENSIONS,
    PROTOTYPE_SCALE,
    HeadSpec,
    InvalidSpec,
    check_taps,
    weight_shapes,
)

METADATA_KEY = "edgeear.head"
OUTPUT = "scores"
OPSET, IR_VERSION = 18, 10
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
        """Inverse of `to_dict`; raises ArchiveError when a field is wrong or the bytes are not those described, or
        are a graph that no head may have (`adaptors.onnx_bytes.check_head`)."""
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
        try:
            check_head(onnx)
        except ModelError as error:
            raise ArchiveError(f"{error}; learn the head again, or fetch it from its source") from error
        _check_size(spec, shapes, len(classes), len(onnx))
        return head


def _check_size(spec: HeadSpec, shapes: TapShapes, classes: int, held: int) -> None:
    """Raises ArchiveError unless a graph of `held` bytes can hold what the head learned: whatever is built for the head
    later is in proportion to these sizes."""
    sizes = (spec.width, spec.depth, *(n for shape in shapes.values() for n in shape))
    if not all(type(n) is int for n in sizes) or max(sizes) > held or min(min(s) for s in shapes.values()) < 1:
        raise ArchiveError(f"a head of sizes {sizes} cannot stand in {held} bytes: fetch the file again")
    arrays = weight_shapes(spec, shapes, classes)
    needed = sum(
        math.prod(shape) * (spec.bits // 8 if name.startswith("matrix") else 4) for name, shape in arrays.items()
    )
    if needed > held:
        raise ArchiveError(f"a head that needs {needed} bytes is described, the file has {held}: fetch it again")


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
    graph = HeadGraph(spec, spec.parts, own, weights, seed)
    _read(graph, spec, spec.row.graph(graph, spec))
    description = _description(spec, own, classes, seed)
    return HeadArchive(spec, own, tuple(classes), seed, _serialised(graph, len(classes), description))


def _description(spec: HeadSpec, shapes: TapShapes, classes: Sequence[str], seed: int) -> dict[str, object]:
    listed = {t: list(s) for t, s in shapes.items()}
    return {"spec": spec.to_dict(), "shapes": listed, "classes": list(classes), "seed": seed}


def _serialised(head: HeadGraph, classes: int, description: dict[str, object]) -> bytes:
    from onnx import TensorProto, checker, helper

    inputs = [
        helper.make_tensor_value_info(t, TensorProto.FLOAT, ["batch", *shape]) for t, shape in head.shapes.items()
    ]
    output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", classes])
    graph = helper.make_graph(head.nodes, "head", inputs, [output], head.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    helper.set_model_props(model, {METADATA_KEY: json.dumps(description, sort_keys=True, separators=(",", ":"))})
    checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _read(graph: HeadGraph, spec: HeadSpec, z: str) -> None:
    """The reconfigurator: class scores of the adapted features `z`."""
    scale: float | F32 = graph.code_scale
    if spec.reconfigurator == "prototypes":
        z, scale = _hypervector(graph, spec, z), _prototype_scale(graph.weights["matrix.readout"], spec.bits)
    graph.node("Gemm", z, graph.matrix("readout", scale), graph.bias("readout"), transB=1, output=OUTPUT)


def _hypervector(graph: HeadGraph, spec: HeadSpec, z: str) -> str:
    adapted = spec.adapted_width(graph.shapes)
    n = hadamard.next_power_of_two(max(adapted, PROTOTYPE_DIMENSIONS))
    transform = Transform(graph, n)
    role = hadamard.signs(graph.seed, "prototypes", n)[:adapted].astype(np.int8)
    x = transform.lay_out(graph.node("Mul", z, graph.cast(role)), adapted)
    x = transform.apply(x, transform.rows(adapted), transform.rows(PROTOTYPE_DIMENSIONS))
    return graph.unit(transform.flatten(x, PROTOTYPE_DIMENSIONS), EPSILON * n**0.5 / graph.code_scale)


def _prototype_scale(readout: F32, bits: int) -> F32:
    """`(classes,)`: what brings each stored row of prototypes to the length of the inverse temperature."""
    if bits == 8:
        quantised, step = quantise_rows(readout)
        readout = quantised * step[:, None]
    norms: F32 = np.maximum(np.linalg.norm(readout, axis=1), EPSILON)
    return (PROTOTYPE_SCALE / norms).astype(np.float32)
