"""ONNX models of a few nodes, sound and broken, built without any exporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

SIZE = 8
NCHW: tuple[Any, ...] = (1, 3, SIZE, SIZE)
MEANS = ("mean", (1, 3))

Shape = Sequence[int | str | None]


def node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, list(inputs), [output], **attributes)


def means(source: str = "image", output: str = "mean", axes: Sequence[int] = (2, 3)) -> NodeProto:
    """The mean over all positions: the simplest tap that depends on the frame."""
    return node("ReduceMean", [source], output, axes=list(axes), keepdims=0)


def model(
    nodes: Sequence[NodeProto],
    outputs: Mapping[str, Shape],
    *,
    shape: Shape = NCHW,
    dtype: int = TensorProto.FLOAT,
    constants: Mapping[str, NDArray[Any]] | None = None,
    inputs: Mapping[str, tuple[int, Shape]] | None = None,
    metadata: Mapping[str, str] | None = None,
    output_type: int = TensorProto.FLOAT,
    opset: int = 17,
) -> bytes:
    """A model that takes `image`; `inputs` adds others, which may have a constant as default."""
    stated = {"image": (dtype, shape), **(inputs or {})}
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in stated.items()],
        [helper.make_tensor_value_info(name, output_type, dims) for name, dims in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(built, dict(metadata or {}))
    onnx.checker.check_model(built)
    return bytes(built.SerializeToString())


def sound(**changes: Any) -> bytes:
    """A model with one tap, `mean` (3,): the mean of each input channel."""
    return model([means()], {"mean": (1, 3)}, **changes)


def seeing() -> bytes:
    """An encoder that tells the domains and classes of fakes.py apart: two convolutions, four pooled taps."""
    rng = np.random.default_rng(7)
    nodes: list[NodeProto] = []
    outputs: dict[str, Shape] = {}
    constants: dict[str, NDArray[Any]] = {}
    source = "image"
    for layer, (before, after) in {"a": (3, 12), "b": (12, 16)}.items():
        constants[f"{layer}.weight"] = rng.normal(0, 1 / np.sqrt(before), (after, before, 2, 2)).astype(np.float32)
        nodes += [
            node("Conv", [source, f"{layer}.weight"], f"{layer}.conv", strides=[2, 2]),
            node("Relu", [f"{layer}.conv"], f"{layer}.map"),
            means(f"{layer}.map", f"{layer}.mean"),
            node("ReduceL2", [f"{layer}.map"], f"{layer}.norm", axes=[2, 3], keepdims=0),
        ]
        outputs |= {f"{layer}.mean": (1, after), f"{layer}.norm": (1, after)}
        source = f"{layer}.map"
    return model(nodes, outputs, constants=constants)


def saved(folder: Path, content: bytes) -> Path:
    path = folder / "encoder.onnx"
    path.write_bytes(content)
    return path


def frame(seed: int = 0, height: int = SIZE, width: int = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
