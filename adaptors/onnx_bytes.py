"""What an ONNX file holds, read from its bytes without onnx, so that the inference process can check a file before it
is opened.

Rules of this file:

1. Weights outside of the file are refused wherever a tensor may stand: initialisers, sparse tensors, attributes,
   subgraphs, functions. A digest of the file then covers all of its weights, and no other file is read.
2. Bytes that are not a well-formed protobuf message are refused, so nothing can hide behind a second reading.
3. A head may use only the operators in `HEAD_OPERATORS`: their running time is bounded by their shapes. Loops,
   branches, functions and random numbers are refused.

The field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

_OPERATORS = """
Abs Add ArgMax AveragePool BatchNormalization Cast Clip Concat Conv Cos DequantizeLinear Div Elu Erf Exp Expand Flatten
Gelu Gemm GlobalAveragePool GlobalMaxPool GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization
LayerNormalization LeakyRelu Log LogSoftmax MatMul Max MaxPool Min Mish Mul Neg PRelu Pad Pow QuantizeLinear Reciprocal
ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape Selu Sigmoid Sign Sin Slice Softmax Softplus Softsign
Split Sqrt Squeeze Sub Sum Tanh Transpose Unsqueeze
"""
HEAD_OPERATORS = frozenset(_OPERATORS.split())
HEAD_NODES = 1000
"""Most nodes of a head; ours have fewer than 50."""
_DEPTH = 100  # protobuf's own limit of nested messages
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "TensorProto": {},
}
"""Every message that may hold a tensor, by the fields that lead to one."""


class ModelError(ValueError):
    """The bytes are no ONNX file that may be opened; the message says why."""


class ExternalWeights(ModelError):
    """Weights outside of the file."""


def check_model(content: bytes) -> None:
    """Raises `ExternalWeights` for weights outside of `content`, `ModelError` unless it is an ONNX model. Reads each
    field once; large tensors are skipped."""
    for _ in _walk(content):
        pass


def check_head(content: bytes) -> None:
    """`check_model`, and the rules of a head. Raises `ModelError`."""
    nodes = 0
    for kind, message in _walk(content):
        if kind in ("FunctionProto", "TrainingInfoProto") or (kind == "GraphProto" and nodes):
            raise ModelError(f"a head holds a {kind} beside its graph: only plain graphs are allowed")
        if kind == "NodeProto":
            nodes += 1
            _check_node(message)
            if nodes > HEAD_NODES:
                raise ModelError(f"a head of more than {HEAD_NODES} nodes: learn it again")


def appended(content: bytes, key: str, value: str) -> bytes:
    """The model with one more entry in its metadata: messages that follow each other are one message."""
    entry = b"".join(_field(number, text.encode()) for number, text in ((1, key), (2, value)))
    return content + _field(14, entry)


def _field(number: int, value: bytes) -> bytes:
    length, out = len(value), bytearray([number << 3 | _BYTES])
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes([*out, length]) + value


def _check_node(message: memoryview) -> None:
    named: dict[int, str] = {1: "", 4: "", 7: ""}
    for number, value in fields(message):
        if number in (4, 7) and isinstance(value, memoryview):
            named[number] = bytes(value).decode("utf-8", "backslashreplace")
    operator, domain = named[4], named[7]
    if operator not in HEAD_OPERATORS or domain not in ("", "ai.onnx"):
        name = f"{domain}:{operator}" if domain else operator
        raise ModelError(f"a head with operator {name[:100]!r}: allowed are {', '.join(sorted(HEAD_OPERATORS))}")


def _walk(content: bytes) -> Iterator[tuple[str, memoryview]]:
    """Every message of `content` that may hold a tensor, and its bytes, parents first."""
    waiting = [("ModelProto", memoryview(content), 0)]
    graphs = 0
    while waiting:
        kind, message, depth = waiting.pop()
        if depth > _DEPTH:
            raise ModelError(f"messages nested more than {_DEPTH} deep")
        yield kind, message
        children = []
        for number, value in fields(message):
            if kind == "TensorProto" and (number == 13 or (number == 14 and value)):
                raise ExternalWeights("weights are kept outside of the file")
            if isinstance(value, memoryview) and (child := CHILDREN[kind].get(number)):
                children.append((child, value, depth + 1))
                graphs += child == "GraphProto"
        waiting += reversed(children)
    if not graphs:
        raise ModelError("no ONNX model: it holds no graph")


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protobuf message; fixed-size numbers come as their bytes' length.

    Raises `ModelError` for bytes that are no message."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise ModelError(f"field number {number} is not that of a protobuf message")
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ModelError(f"field of wire type {kind}, which ONNX does not use")
        if length > end - at:
            raise ModelError(f"field {number} claims {length} bytes, {end - at} are left: truncated or damaged")
        yield number, message[at : at + length] if kind == _BYTES else length
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ModelError("truncated in a number")
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ModelError("a number of more than 64 bits")
