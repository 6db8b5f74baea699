"""What may stand in an ONNX file: no weights outside of it, anywhere, and in a head only plain operators."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from adaptors.archive import ArchiveError, HeadArchive, pack
from adaptors.onnx_bytes import CHILDREN, HEAD_NODES, ExternalWeights, ModelError, check_head, check_model
from adaptors.operators import OPERATORS
from adaptors.search_space import Budget, SearchSpace
from adaptors.spec import HeadSpec, weight_shapes
from device.encoder.session import EncoderError, OnnxEncoder
from tests.support.tiny_models import NCHW, SIZE, frame, means, model, node, saved, sound


def outside(name: str = "w", location: str = "weights.bin") -> TensorProto:
    """A `(3, 8, 8)` tensor whose values stand in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[3, SIZE, SIZE])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def inner(tensor: TensorProto | None = None) -> onnx.GraphProto:
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    return helper.make_graph(
        [helper.make_node("Identity", ["w"], ["inner"])], "inner", [], [value], [tensor or outside()]
    )


Edit = Callable[[onnx.ModelProto], object]


def _attribute(built: onnx.ModelProto) -> onnx.AttributeProto:
    made: onnx.AttributeProto = built.graph.node.add(op_type="If").attribute.add(name="a")
    return made


PLACES: dict[str, Edit] = {
    "initialiser": lambda m: m.graph.initializer.append(outside()),
    "sparse values": lambda m: m.graph.sparse_initializer.add().values.CopyFrom(outside()),
    "sparse indices": lambda m: m.graph.sparse_initializer.add().indices.CopyFrom(outside()),
    "constant": lambda m: _attribute(m).t.CopyFrom(outside()),
    "tensors of an attribute": lambda m: _attribute(m).tensors.append(outside()),
    "sparse tensor of an attribute": lambda m: _attribute(m).sparse_tensor.values.CopyFrom(outside()),
    "sparse tensors of an attribute": lambda m: _attribute(m).sparse_tensors.add().indices.CopyFrom(outside()),
    "branch": lambda m: _attribute(m).g.CopyFrom(inner()),
    "graphs of an attribute": lambda m: _attribute(m).graphs.append(inner()),
    "branch of a branch": lambda m: _attribute(m).g.node.add().attribute.add().g.CopyFrom(inner()),
    "function": lambda m: m.functions.add().node.add(op_type="Constant").attribute.add().t.CopyFrom(outside()),
    "default of a function": lambda m: m.functions.add().attribute_proto.add().t.CopyFrom(outside()),
    "training": lambda m: m.training_info.add().initialization.CopyFrom(inner()),
    "the flag alone": lambda m: m.graph.initializer.add(data_location=TensorProto.EXTERNAL),
    "the place alone": lambda m: m.graph.initializer.add().external_data.add(key="location", value="x"),
}


def edited(edit: Edit) -> bytes:
    built = onnx.load_from_string(sound())
    edit(built)
    return bytes(built.SerializeToString())


@pytest.mark.parametrize("place", PLACES)
def test_weights_outside_of_the_file_are_refused_wherever_they_stand(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file with the weights lies in the working directory, where ONNX Runtime would find it."""
    content = edited(PLACES[place])
    with pytest.raises(ExternalWeights):
        check_model(content)
    with pytest.raises(ModelError):
        check_head(content)
    monkeypatch.chdir(tmp_path)
    np.ones((3, SIZE, SIZE), np.float32).tofile("weights.bin")
    with pytest.raises(EncoderError, match=r"encoder\.onnx: weights are kept outside of the file.*one file"):
        OnnxEncoder(saved(tmp_path, content))


def test_the_table_of_places_is_that_of_onnx() -> None:
    """Every field of every message that leads to a tensor, as onnx itself describes them."""
    known = {d.name: d for d in [onnx.ModelProto.DESCRIPTOR]}
    waiting = list(known.values())
    while waiting:
        for field in waiting.pop().fields:
            if field.message_type is not None and field.message_type.name not in known:
                known[field.message_type.name] = field.message_type
                waiting.append(field.message_type)
    leading, before = {"TensorProto"}, 0
    while len(leading) > before:
        before = len(leading)
        leading |= {
            n for n, d in known.items() if any(f.message_type and f.message_type.name in leading for f in d.fields)
        }
    expected = {
        name: {
            f.number: f.message_type.name
            for f in known[name].fields
            if f.message_type and f.message_type.name in leading
        }
        for name in leading
    }
    assert expected == CHILDREN


def test_a_sound_model_passes_and_a_large_tensor_is_skipped() -> None:
    large = {"w": np.zeros((64, 1 << 18), np.float32)}
    content = model(
        [means(), node("Identity", ["w"], "copy")], {"mean": (1, 3), "copy": (64, 1 << 18)}, constants=large
    )
    tracemalloc.start()
    try:
        check_model(content)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20 < len(content) / 32
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_other_bytes_raise_one_error(content: bytes) -> None:
    with pytest.raises(ModelError):
        check_model(content)


@given(st.data())
def test_damaged_bytes_raise_one_error(data: st.DataObject) -> None:
    content = bytearray(edited(PLACES["branch"]))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        check_model(bytes(content))
    except ModelError as error:
        assert str(error)


def test_messages_nested_without_end_are_refused() -> None:
    content = b""
    for _ in range(5000):  # graph { node { attribute { graph { ...
        for key in (b"\x32", b"\x2a", b"\x0a"):
            content = key + _varint(len(content)) + content
    with pytest.raises(ModelError, match="nested"):
        check_model(b"\x3a" + _varint(len(content)) + content)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


# --- heads ---

SHAPES: dict[str, tuple[int, ...]] = {"a": (4,), "m": (3, 5, 5)}
ANYTHING = Budget(10**9, 10**9, 10**12, 1e9)
SPECS = [spec for spec, _ in SearchSpace(SHAPES, 2).sample(60, ANYTHING, 0)]


def packed(spec: HeadSpec) -> HeadArchive:
    rng = np.random.default_rng(0)
    own = {tap: SHAPES[tap] for tap in spec.inputs}
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in weight_shapes(spec, own, 2).items()}
    return pack(spec, own, ["x", "y"], weights, 0)


def head_of(content: bytes) -> HeadArchive:
    """A sound description of a head whose graph is `content`."""
    head = packed(SPECS[0])
    changed = HeadArchive(head.spec, head.shapes, head.classes, head.seed, content)
    return HeadArchive.from_dict(changed.to_dict(), content)


def test_every_head_of_the_search_space_passes() -> None:
    seen = set()
    for spec in SPECS:
        head = packed(spec)
        assert HeadArchive.from_dict(head.to_dict(), head.onnx).digest == head.digest
        seen.add(spec.operator)
    assert seen == set(OPERATORS)


def endless() -> bytes:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
    )
    built = onnx.load_from_string(sound())
    built.graph.node.append(helper.make_node("Loop", ["", "yes"], [], body=body))
    return bytes(built.SerializeToString())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (endless, "'Loop'"),
        (lambda: edited(lambda m: m.graph.node.add(op_type="RandomNormal")), "'RandomNormal'"),
        (lambda: edited(lambda m: m.graph.node.add(op_type="Relu", domain="com.example")), "'com.example:Relu'"),
        (lambda: edited(lambda m: m.graph.node.add(op_type="Relu").attribute.add().g.CopyFrom(inner())), "GraphProto"),
        (lambda: edited(lambda m: m.functions.add(name="Relu")), "FunctionProto"),
        (lambda: edited(lambda m: m.graph.initializer.append(outside())), "weights are kept outside of the file"),
        (lambda: edited(lambda m: [m.graph.node.add(op_type="Relu") for _ in range(HEAD_NODES)]), "nodes"),
        (lambda: b"not a graph", "wire type"),
    ],
)
def test_a_head_of_anything_but_plain_operators_is_refused(make: Callable[[], bytes], named: str) -> None:
    with pytest.raises(ArchiveError, match=named):
        head_of(make())


def test_the_digest_of_an_encoder_stands_for_its_weights(tmp_path: Path) -> None:
    def with_weight(value: float) -> OnnxEncoder:
        constants = {"w": np.full((3, SIZE, SIZE), value, np.float32)}
        content = model([node("Mul", ["image", "w"], "map")], {"map": NCHW}, constants=constants)
        folder = tmp_path / str(value)
        folder.mkdir()
        return OnnxEncoder(saved(folder, content))

    one, two = with_weight(1), with_weight(2)
    assert one.digest != two.digest
    assert not np.array_equal(one.encode(frame()[None], ["map"])["map"], two.encode(frame()[None], ["map"])["map"])
