"""A Fourier head without its graph: the same scores from a few matrix products, for one input at a time.

A call of a second session costs more than the head's arithmetic, because the encoder has just overwritten the CPU
caches.

Rules of this file:

1. The weights are read from the head's ONNX bytes. A head is served from here only if its scores on a probe agree with
   the graph's (`AGREEMENT`). Every other head, and every graph with another structure, uses its session.
2. onnx is not imported, because an inference process does not have it: adaptors/onnx_bytes.py reads the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from adaptors.archive import HeadArchive
from adaptors.hadamard import TURN, next_power_of_two, phase_words, signs, thirds
from adaptors.onnx_bytes import fields
from edgeear.types import F32, Features

AGREEMENT = 1e-5
"""Largest difference from the graph's scores, relative to the largest of them."""
EPSILON = 1e-6
_NODE, _INITIALIZER = 1, 5


@dataclass(frozen=True, eq=False)
class DirectHead:
    """The weights. `scale` includes the first signs and the gain, `readout (classes, width)` the amplitude."""

    taps: tuple[str, ...]
    unit: bool
    shift: F32
    scale: F32
    signs: tuple[F32, F32]
    phase: F32
    readout: F32
    bias: F32

    def scores(self, features: Features) -> F32:
        """Class scores `(1, classes)` of one input; `features` must hold every tap, batch first."""
        parts = [features[tap] for tap in self.taps]
        if self.unit:
            parts = [part / max(math.sqrt(np.vecdot(part, part)[0]), EPSILON) for part in parts]
        x = np.zeros(len(self.signs[0]), np.float32)
        vector = x[: len(self.shift)]
        np.subtract(np.concatenate(parts, axis=1)[0], self.shift, out=vector)
        vector *= self.scale
        for sign in self.signs:
            x = _transform(x) * sign
        code = np.cos(_transform(x)[: len(self.phase)] + self.phase)
        out: F32 = (self.readout @ code + self.bias)[None]
        return out


def direct(head: HeadArchive, graph: Callable[[Features], F32]) -> DirectHead | None:
    """The direct form of a head, or None if it has none that agrees with `graph`, which computes its scores."""
    spec = head.spec
    if spec.operator != "fourier" or spec.reconfigurator == "prototypes" or spec.spatial is not None:
        return None
    try:
        found = _read(head)
        probe = _probe(head)
        expected, scores = graph(probe), found.scores(probe)
    except (ValueError, IndexError, KeyError, StopIteration):  # another structure
        return None
    return found if np.abs(scores - expected).max() <= AGREEMENT * np.abs(expected).max() else None


def _transform(x: F32) -> F32:
    """The unnormalised Walsh-Hadamard transform of `(n,)`."""
    left, middle, right = thirds(len(x))
    last = x.reshape(-1, len(right)) @ right
    both = middle @ last.reshape(len(left), len(middle), -1)
    out: F32 = (left @ both.reshape(len(left), -1)).reshape(-1)
    return out


def _probe(head: HeadArchive) -> dict[str, F32]:
    rng = np.random.default_rng(0)
    return {t: rng.random((1, *shape), np.float32) for t, shape in head.shapes.items()}


def _read(head: HeadArchive) -> DirectHead:
    """Find the weights in the graph: inputs of the first `Sub`, of the `Mul` after it and of the `Gemm` at the end."""
    nodes, constants = _graph(head.onnx)
    sub = next(node for node in nodes if node.operator == "Sub")
    mul = next(node for node in nodes if node.operator == "Mul" and node.inputs[0] == sub.outputs[0])
    gemm = next(node for node in nodes if node.operator == "Gemm")
    spec, classes = head.spec, len(head.classes)
    shift, scale = (np.frombuffer(constants[node.inputs[1]], "<f4") for node in (sub, mul))
    n = next_power_of_two(max(len(shift), spec.width))
    return DirectHead(
        spec.taps,
        spec.normalisation == "unit",
        shift,
        scale,
        (signs(head.seed, "fourier/1", n), signs(head.seed, "fourier/2", n)),
        (phase_words(head.seed, spec.width) * TURN).astype(np.float32),
        _readout(gemm.inputs[1], nodes, constants).reshape(classes, spec.width),
        np.frombuffer(constants[gemm.inputs[2]], "<f4"),
    )


def _readout(name: str, nodes: list[_Node], constants: dict[str, bytes]) -> F32:
    if name in constants:
        return np.frombuffer(constants[name], "<f4")
    folded = next(node for node in nodes if node.operator == "DequantizeLinear" and name in node.outputs)
    quantised, steps = (constants[given] for given in folded.inputs[:2])
    rows = np.frombuffer(steps, "<f4")[:, None]
    whole: F32 = np.frombuffer(quantised, np.int8).reshape(len(rows), -1) * rows
    return whole


@dataclass(frozen=True)
class _Node:
    inputs: list[str]
    outputs: list[str]
    operator: str


def _graph(onnx: bytes) -> tuple[list[_Node], dict[str, bytes]]:
    """Nodes, and constants by name. The field numbers are those of onnx.proto."""
    graph = next(value for number, value in _parts(memoryview(onnx)) if number == 7)
    nodes, constants = [], {}
    for number, value in _parts(graph):
        if number == _NODE:
            named = list(_parts(value))
            inputs, outputs, operator = ([bytes(v).decode() for k, v in named if k == field] for field in (1, 2, 4))
            nodes.append(_Node(inputs, outputs, operator[0]))
        elif number == _INITIALIZER:
            parts = dict(_parts(value))
            constants[bytes(parts[8]).decode()] = bytes(parts.get(9, b""))
    return nodes, constants


def _parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields that hold bytes: texts, arrays and messages."""
    return ((number, value) for number, value in fields(message) if isinstance(value, memoryview))
