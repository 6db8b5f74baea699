"""The ONNX side of an export: taps, the gated classifier, and the clean-up that makes an export reproducible.

Rules of this file:

1. The statistics of a map are computed from centred values on a regular grid of its positions, as
   `device.encoder.export` says. The grid is a max-pooling of kernel 1: ONNX Runtime runs it in its blocked layout, so
   only the sampled positions of a large map are reordered.
2. The last map's statistics come first in the file: ONNX Runtime orders nodes backwards from the outputs, the last
   output first, so each map is pooled while it is still in the CPU caches.
3. Doc strings and node metadata (stack traces, local paths) are removed from every part of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from device.encoder.metadata import METADATA_KEY, Metadata, write_metadata

EPSILON = 1e-6
INPUT = "image"
OPSET, IR_VERSION = 18, 10
LOGITS, LOGITS_GATE = "logits", "logits.rows"
_ALL_ROWS = np.iinfo(np.int32).max
_POSITIONS, _EPSILON, _FIRST = "edgeear.positions", "edgeear.epsilon", "edgeear.first"
_NOTES = ("doc_string", "metadata_props")


def grid_step(height: int, width: int, grid: int | None) -> int:
    """The smallest step that leaves at most `grid` rows and columns. 1 for `grid` None."""
    return 1 if grid is None else -(-max(height, width) // grid)


def map_name(tap: str) -> str:
    """The name of the map whose statistics are `TAP.mean` and `TAP.std`; also of its spatial tap."""
    return f"{tap}.map"


def add_statistics(graph: onnx.GraphProto, maps: Mapping[str, tuple[int, ...]], grid: int | None) -> None:
    """Append `TAP.mean` and `TAP.std` `(1, C)` for every tap -> `(1, C, H, W)` whose map is in the graph."""
    _constant(graph, _POSITIONS, np.array([2, 3], np.int64))
    _constant(graph, _EPSILON, np.array(EPSILON, np.float32))
    for tap, shape in reversed(list(maps.items())):
        step = grid_step(shape[2], shape[3], grid)
        sampled = map_name(tap)
        if step > 1:
            strides = {"kernel_shape": [1, 1], "strides": [step, step]}
            sampled = _node(graph, "MaxPool", [sampled], f"{tap}.grid", **strides)
        mean = _node(graph, "ReduceMean", [sampled, _POSITIONS], f"{tap}.mean_map", keepdims=1)
        _node(graph, "Squeeze", [mean, _POSITIONS], f"{tap}.mean")
        centred = _node(graph, "Sub", [sampled, mean], f"{tap}.centred")
        square = _node(graph, "Mul", [centred, centred], f"{tap}.square")
        variance = _node(graph, "ReduceMean", [square, _POSITIONS], f"{tap}.variance", keepdims=0)
        raised = _node(graph, "Add", [variance, _EPSILON], f"{tap}.raised")
        _node(graph, "Sqrt", [raised], f"{tap}.std")


def add_classifier(graph: onnx.GraphProto, tap: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
    """Append `logits = weight @ tap + bias`, `weight (classes, channels)`, behind the gate `logits.rows`.

    The gate is the number of rows that reach the classifier: by default all, none when it is fed with 0.
    """
    graph.input.append(helper.make_tensor_value_info(LOGITS_GATE, TensorProto.INT64, [1]))
    _constant(graph, LOGITS_GATE, np.array([_ALL_ROWS], np.int64))
    _constant(graph, _FIRST, np.array([0], np.int64))
    _constant(graph, "logits.weight", weight)
    _constant(graph, "logits.bias", bias)
    rows = _node(graph, "Slice", [tap, _FIRST, LOGITS_GATE, _FIRST], "logits.input")
    _node(graph, "Gemm", [rows, "logits.weight", "logits.bias"], LOGITS, transB=1)


def finish(model: onnx.ModelProto, metadata: Metadata) -> bytes:
    """The file's bytes, with exactly the taps of `metadata` as outputs."""
    graph = model.graph
    del graph.output[:], graph.value_info[:], model.metadata_props[:]
    for tap in metadata.taps:
        rows = "rows" if tap.name in metadata.gates else 1
        graph.output.append(helper.make_tensor_value_info(tap.name, TensorProto.FLOAT, [rows, *tap.shape]))
    _drop_unused(graph)
    _strip(model)
    graph.name = "encoder"
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "edgeear", ""
    helper.set_model_props(model, {METADATA_KEY: write_metadata(metadata)})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and weights that lead to no output."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    _replace(graph.node, reversed(kept))
    _replace(graph.initializer, [value for value in graph.initializer if value.name in needed])


def _replace(field: Any, values: Iterable[Any]) -> None:
    copies = list(values)
    del field[:]
    field.extend(copies)


def _strip(message: Any) -> None:
    for field, value in message.ListFields():
        if field.name in _NOTES:
            message.ClearField(field.name)
        elif hasattr(value, "ListFields"):
            _strip(value)
        elif field.message_type is not None:
            for item in value:
                _strip(item)


def _node(graph: onnx.GraphProto, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
    graph.node.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
    return output


def _constant(graph: onnx.GraphProto, name: str, value: NDArray[Any]) -> None:
    graph.initializer.append(numpy_helper.from_array(value, name))
