"""The inference side of the encoder: which files will do, what encode returns, what check_encoder finds.

The models here are tiny and built by hand; tests/device/encoder/test_export.py has the real one.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from adaptors.archive import pack
from adaptors.spec import HeadSpec, weight_shapes
from device.encoder.cache import prepared_encoder
from device.encoder.engine import OrtEngine
from device.encoder.file import prepared
from device.encoder.metadata import METADATA_KEY, Metadata, Preprocessing, read_metadata, write_metadata
from device.encoder.session import EncoderError, OnnxEncoder, check_encoder, head_shapes, pooled_taps
from edgeear.errors import DataError, FormatError, UsageError
from edgeear.types import Encoder, Tap
from tests.support.tiny_models import NCHW, SIZE, frame, means, model, node, saved, sound

PLAIN = Preprocessing(SIZE, SIZE)
FREE = ("batch", 3, SIZE, SIZE)


# --- encode ---


def test_taps_are_inferred_and_encoded(tmp_path: Path) -> None:
    content = model([node("Relu", ["image"], "map"), means()], {"map": (1, 3, SIZE, SIZE), "mean": (1, 3)})
    encoder: Encoder = OnnxEncoder(saved(tmp_path, content))
    frames = np.stack([frame(0), frame(1)])
    features = encoder.encode(frames, ["mean", "map"])
    assert encoder.taps == (Tap("mean", (3,)), Tap("map", (3, SIZE, SIZE)))
    assert encoder.input_size == (SIZE, SIZE)
    assert encoder.digest == hashlib.sha256(content).hexdigest()
    assert {name: (value.shape, value.dtype.name) for name, value in features.items()} == {
        "mean": ((2, 3), "float32"),
        "map": ((2, 3, SIZE, SIZE), "float32"),
    }
    np.testing.assert_allclose(features["mean"], frames.mean((1, 2)) / 255, rtol=1e-5)
    np.testing.assert_array_equal(features["map"], frames.transpose(0, 3, 1, 2).astype(np.float32) / 255)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("color", ["RGB", "BGR"])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_frame_is_normalised_by_channel(tmp_path: Path, layout: Any, color: Any, dtype: int) -> None:
    wanted = Preprocessing(SIZE, SIZE, (1, 2, 3), (2, 4, 8), layout, color)
    shape = (1, 3, SIZE, SIZE) if layout == "NCHW" else (1, SIZE, SIZE, 3)
    copy = node("Identity", ["image"], "map")
    content = model([copy], {"map": shape}, shape=shape, dtype=dtype, output_type=dtype)
    image = frame()
    found = OnnxEncoder(saved(tmp_path, content), preprocessing=wanted).encode(image[None], ["map"])["map"]
    expected = ((image - np.array([1.0, 2, 3])) / np.array([2, 4, 8]))[..., :: -1 if color == "BGR" else 1]
    np.testing.assert_allclose(found[0], expected.transpose(2, 0, 1), rtol=1e-3)


def test_an_input_of_bytes_takes_the_frame_as_it_is(tmp_path: Path) -> None:
    cast = node("Cast", ["image"], "map", to=TensorProto.FLOAT)
    content = model([cast], {"map": (1, 3, SIZE, SIZE)}, dtype=TensorProto.UINT8)
    encoder = OnnxEncoder(saved(tmp_path, content))
    found = encoder.encode(frame()[None], ["map"])["map"]
    np.testing.assert_array_equal(found[0], frame().transpose(2, 0, 1))
    assert encoder.notes == ()


def test_the_stored_preprocessing_is_used_and_can_be_overridden(tmp_path: Path) -> None:
    stored = Preprocessing(SIZE, SIZE, (10, 20, 30), (2, 2, 2))
    text = write_metadata(Metadata(stored, (Tap("mean", (3,)),)))
    path = saved(tmp_path, sound(metadata={METADATA_KEY: text}))
    white = np.full((1, SIZE, SIZE, 3), 255, np.uint8)
    assert OnnxEncoder(path).preprocessing == stored
    assert OnnxEncoder(path).encode(white, ["mean"])["mean"].tolist() == [[122.5, 117.5, 112.5]]
    assert OnnxEncoder(path, preprocessing=PLAIN).encode(white, ["mean"])["mean"].tolist() == [[1, 1, 1]]


def test_frames_are_encoded_one_by_one_whatever_the_batch(tmp_path: Path) -> None:
    """A graph that mixes the batch cannot mix frames, because they never meet."""
    mixing = node("ReduceMean", ["image"], "neighbours", axes=[0], keepdims=1)
    content = model([mixing, node("Sub", ["image", "neighbours"], "map")], {"map": FREE}, shape=FREE)
    features = OnnxEncoder(saved(tmp_path, content)).encode(np.stack([frame(0), frame(1)]), ["map"])
    assert not features["map"].any()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_features_are_the_callers_to_keep_whatever_is_encoded_next(tmp_path: Path, layout: Any) -> None:
    """The memory that the network writes into is used again, by another choice of taps as well."""
    shape = (1, 3, SIZE, SIZE) if layout == "NCHW" else (1, SIZE, SIZE, 3)
    content = model(
        [node("Relu", ["image"], "map"), node("Neg", ["image"], "minus")], {"map": shape, "minus": shape}, shape=shape
    )
    encoder = OnnxEncoder(saved(tmp_path, content), preprocessing=Preprocessing(SIZE, SIZE, layout=layout))
    choices = [("map", "minus"), ("minus",), ("map", "minus"), ("minus", "map"), ("map",)]
    kept = [encoder.encode(frame(i)[None], taps) for i, taps in enumerate(choices)]
    for i, (taps, features) in enumerate(zip(choices, kept, strict=True)):
        expected = frame(i).transpose(2, 0, 1)[None].astype(np.float32) / 255
        assert tuple(features) == taps
        for name, feature in features.items():
            np.testing.assert_array_equal(feature, -expected if name == "minus" else expected)


def test_threads_share_an_encoder(tmp_path: Path) -> None:
    encoder = OnnxEncoder(saved(tmp_path, sound()))
    frames = [frame(i)[None] for i in range(8)]
    expected = [encoder.encode(f, ["mean"])["mean"] for f in frames]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: encoder.encode(frames[i % 8], ["mean"])["mean"], range(200)))
    for i, feature in enumerate(found):
        np.testing.assert_array_equal(feature, expected[i % 8])


def test_a_tap_named_twice_comes_once_and_none_comes_as_nothing(tmp_path: Path) -> None:
    encoder = OnnxEncoder(saved(tmp_path, sound()))
    assert list(encoder.encode(frame()[None], ["mean", "mean"])) == ["mean"]
    assert encoder.encode(frame()[None], []) == {}
    assert encoder.encode(np.empty((0, SIZE, SIZE, 3), np.uint8), ["mean"])["mean"].shape == (0, 3)


@pytest.mark.parametrize(
    ("frames", "named"),
    [
        (np.zeros((SIZE, SIZE, 3), np.uint8), "uint8 of shape (8, 8, 3)"),
        (np.zeros((1, 3, SIZE, SIZE), np.uint8), "uint8 of shape (1, 3, 8, 8)"),
        (np.zeros((1, SIZE, SIZE + 1, 3), np.uint8), "uint8 of shape (1, 8, 9, 3)"),
        (np.zeros((1, SIZE, SIZE, 3), np.float32), "float32 of shape (1, 8, 8, 3)"),
        ([[0]], "list"),
    ],
)
def test_other_frames_are_refused_by_name(tmp_path: Path, frames: Any, named: str) -> None:
    encoder = OnnxEncoder(saved(tmp_path, sound()))
    with pytest.raises(UsageError) as caught:
        encoder.encode(frames, ["mean"])
    assert named in str(caught.value)
    assert "expected" in str(caught.value) and "uint8 of shape (samples, 8, 8, 3)" in str(caught.value)


def test_an_unknown_tap_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown taps \['deep'\]: this encoder has mean"):
        OnnxEncoder(saved(tmp_path, sound())).encode(frame()[None], ["mean", "deep"])


def test_no_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 threads"):
        OnnxEncoder(saved(tmp_path, sound()), threads=0)


def test_features_that_are_not_finite_are_refused_by_tap(tmp_path: Path) -> None:
    """log(0) is minus infinity, and only the frame's darkest channel has it."""
    content = model([means(), node("Log", ["mean"], "log")], {"mean": (1, 3), "log": (1, 3)})
    encoder = OnnxEncoder(saved(tmp_path, content))
    dark = frame()
    dark[..., 1] = 0
    assert np.isfinite(encoder.encode(frame()[None], ["log"])["log"]).all()
    assert encoder.encode(dark[None], ["mean"])["mean"][0, 1] == 0
    with pytest.raises(DataError, match="tap log"):
        encoder.encode(np.stack([frame(), dark]), ["mean", "log"])


def test_huge_finite_features_pass(tmp_path: Path) -> None:
    huge = {"huge": np.array(1e30, np.float32)}
    content = model([means(), node("Mul", ["mean", "huge"], "tap")], {"tap": (1, 3)}, constants=huge)
    found = OnnxEncoder(saved(tmp_path, content)).encode(frame()[None], ["tap"])["tap"]
    np.testing.assert_allclose(found[0], frame().mean((0, 1)) / 255 * 1e30, rtol=1e-5)


def test_a_gated_tap_is_computed_only_when_named(tmp_path: Path) -> None:
    """The gated branch looks up column 3 * rows of the three that there are: it fails unless no row comes."""
    nodes = [
        means(),
        node("Slice", ["mean", "first", "rows", "first"], "passed"),
        node("Shape", ["passed"], "size"),
        node("Slice", ["size", "first", "one"], "count"),
        node("Mul", ["count", "three"], "outside"),
        node("Gather", ["mean", "outside"], "gated", axis=1),
    ]
    constants = {
        "rows": np.array([9]),
        "first": np.array([0]),
        "one": np.array([1]),
        "three": np.array([3]),
    }
    taps = {"mean": (1, 3), "gated": (1, 1)}
    metadata = Metadata(PLAIN, tuple(Tap(name, shape[1:]) for name, shape in taps.items()), {"gated": "rows"})
    content = model(
        nodes,
        taps,
        constants=constants,
        inputs={"rows": (TensorProto.INT64, [1])},
        metadata={METADATA_KEY: write_metadata(metadata)},
    )
    encoder = OnnxEncoder(saved(tmp_path, content))
    assert encoder.encode(frame()[None], ["mean"])["mean"].shape == (1, 3)
    with pytest.raises(EncoderError, match="ONNX Runtime fails"):
        encoder.encode(frame()[None], ["gated"])


# --- which files will do ---


def test_a_sound_file_without_metadata_gets_one_warning(tmp_path: Path) -> None:
    (problem,) = check_encoder(saved(tmp_path, sound()))
    assert problem.severity == "warning" and "no preprocessing metadata" in problem.what
    assert check_encoder(saved(tmp_path, sound()), preprocessing=PLAIN) == ()


def test_a_sound_file_with_metadata_has_no_problem(tmp_path: Path) -> None:
    text = write_metadata(Metadata(PLAIN, (Tap("mean", (3,)),)))
    assert check_encoder(saved(tmp_path, sound(metadata={METADATA_KEY: text}))) == ()


def random_like() -> bytes:
    nodes = [
        node("RandomUniformLike", ["image"], "noise"),
        node("Add", ["image", "noise"], "sum"),
        means("sum"),
    ]
    return model(nodes, {"mean": (1, 3)})


def batch_statistics() -> bytes:
    nodes = [
        node("ReduceMean", ["image"], "average", axes=[0, 2, 3], keepdims=1),
        node("Sub", ["image", "average"], "centred"),
        means("centred"),
    ]
    return model(nodes, {"mean": ("batch", 3)}, shape=FREE)


def constant_tap() -> bytes:
    zero = {"zero": np.array(0, np.float32)}
    return model([node("Mul", ["image", "zero"], "none"), means("none")], {"mean": (1, 3)}, constants=zero)


def not_finite() -> bytes:
    zero = {"zero": np.array(0, np.float32)}
    return model([node("Div", ["image", "zero"], "inf"), means("inf")], {"mean": (1, 3)}, constants=zero)


def two_inputs() -> bytes:
    other = {"other": (TensorProto.FLOAT, (1, 3))}
    return model([means(), node("Add", ["mean", "other"], "sum")], {"sum": (1, 3)}, inputs=other)


def integer_output() -> bytes:
    nodes = [means(), node("Cast", ["mean"], "whole", to=TensorProto.INT64)]
    return model(nodes, {"whole": (1, 3)}, output_type=TensorProto.INT64)


def external_weights() -> bytes:
    weights = {"w": np.ones((3, 8, 8), np.float32)}
    content = model([node("Add", ["image", "w"], "map")], {"map": NCHW}, constants=weights)
    built = onnx.load_from_string(content)
    weight = built.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    return bytes(built.SerializeToString())


def tagged(text: str) -> Callable[[], bytes]:
    return lambda: sound(metadata={METADATA_KEY: text})


def lying(tap: Tap, gates: dict[str, str] | None = None) -> Callable[[], bytes]:
    return tagged(write_metadata(Metadata(PLAIN, (tap,), gates or {})))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: b"", "not an ONNX file"),
        (lambda: b"<html>not found</html>", "not an ONNX file"),
        (lambda: sound()[:-9], "truncated"),
        (lambda: sound()[:2], "truncated"),
        (external_weights, "weights are kept outside of the file"),
        (integer_output, "encoder without taps, output whole is ignored, it is tensor(int64)"),
        (lambda: model([means(axes=[3])], {"mean": (1, 3, SIZE)}), "encoder without taps"),
        (two_inputs, "2 inputs"),
        (lambda: sound(shape=("b", 3, "h", "w")), "input size h x w is not fixed"),
        (lambda: sound(shape=(1, 4, SIZE, SIZE)), "input shape [1, 4, 8, 8]"),
        (lambda: sound(shape=(2, 3, SIZE, SIZE)), "batch fixed to 2"),
        (lambda: model([means(axes=[2])], {"mean": (1, 3)}, shape=(1, 3, SIZE)), "shape [1, 3, 8]"),
        (lambda: sound(dtype=TensorProto.DOUBLE, output_type=TensorProto.DOUBLE), "tensor(double)"),
        (not_finite, "tap mean: NaN or infinity"),
        (constant_tap, "tap mean: the same features for two different frames"),
        (random_like, "tap mean: another result for the same frame"),
        (batch_statistics, "tap mean: features depend on the other frames"),
        (tagged("{"), "metadata is damaged (not JSON)"),
        (tagged('{"format": 2}'), "metadata of format 2, this program reads up to 1"),
        (tagged('{"format": 1}'), "metadata is damaged"),
        (lying(Tap("deep", (3,))), "names tap deep (3,), the graph has None"),
        (lying(Tap("mean", (4,))), "names tap mean (4,), the graph has (3,)"),
        (lying(Tap("mean", (3,)), {"mean": "valve"}), "names gate valve"),
    ],
)
def test_what_is_wrong_is_found(tmp_path: Path, make: Callable[[], bytes], what: str) -> None:
    problems = check_encoder(saved(tmp_path, make()))
    assert problems[0].severity == "error"
    assert what in problems[0].what and problems[0].remedy


@pytest.mark.parametrize("make", [lambda: b"", two_inputs, integer_output, tagged("{")])
def test_opening_raises_what_the_check_reports(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = saved(tmp_path, make())
    with pytest.raises(FormatError) as caught:
        OnnxEncoder(path)
    assert isinstance(caught.value, EncoderError)
    assert (caught.value.problem,) == check_encoder(path)
    assert str(caught.value) == str(caught.value.problem) and str(path) in str(caught.value)


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    (problem,) = check_encoder(tmp_path)
    assert "not a file" in problem.what
    assert "not a file" in check_encoder(tmp_path / "none.onnx")[0].what


def test_one_constant_tap_among_others_is_only_a_warning(tmp_path: Path) -> None:
    zero = {"zero": np.array(0, np.float32)}
    nodes = [means(), node("Mul", ["mean", "zero"], "none")]
    path = saved(tmp_path, model(nodes, {"mean": (1, 3), "none": (1, 3)}, constants=zero))
    (problem,) = check_encoder(path, preprocessing=PLAIN)
    assert problem.severity == "warning" and problem.what.startswith("tap none: the same features")


def test_an_output_of_another_rank_is_ignored_and_noted(tmp_path: Path) -> None:
    nodes = [means(), means(output="rows", axes=[3])]
    encoder = OnnxEncoder(saved(tmp_path, model(nodes, {"rows": (1, 3, SIZE), "mean": (1, 3)})))
    assert encoder.taps == (Tap("mean", (3,)),)
    assert "output rows is ignored" in encoder.notes[0].what


def test_sizes_that_the_file_leaves_open_are_found_by_running_it(tmp_path: Path) -> None:
    nodes = [node("Relu", ["image"], "map"), means()]
    free = ("batch", 3, "height", "width")
    content = model(nodes, {"map": ("batch", "c", "h", "w"), "mean": ("batch", "c")}, shape=free)
    encoder = OnnxEncoder(saved(tmp_path, content), preprocessing=Preprocessing(4, 6))
    assert encoder.taps == (Tap("mean", (3,)), Tap("map", (3, 4, 6)))
    assert encoder.encode(frame(0, 4, 6)[None], ["map"])["map"].shape == (1, 3, 4, 6)


def test_a_frame_size_that_the_graph_contradicts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="input size 8 x 8, preprocessing says 4 x 8"):
        OnnxEncoder(saved(tmp_path, sound()), preprocessing=Preprocessing(4, SIZE))
    with pytest.raises(EncoderError, match="layout NHWC"):
        OnnxEncoder(saved(tmp_path, sound()), preprocessing=Preprocessing(SIZE, SIZE, layout="NHWC"))


@settings(max_examples=60)
@given(st.data())
def test_a_cut_or_damaged_file_raises_nothing_else(tmp_path_factory: Any, data: st.DataObject) -> None:
    content = bytearray(sound())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = saved(tmp_path_factory.getbasetemp(), bytes(content))
    assert all(problem.what and problem.remedy for problem in check_encoder(path))


# --- outputs and names that other tools make ---


def test_names_that_a_head_needs_for_itself_are_changed(tmp_path: Path) -> None:
    """What torch calls inner tensors begins with a slash, and classifiers call their output `scores`."""
    outputs = ["/backbone/avgpool/Mean_output_0", "scores", "Identity:0", "two words", "line\nbreak"]
    content = model([means(output=name) for name in outputs], {name: (1, 3) for name in outputs})
    encoder = OnnxEncoder(saved(tmp_path, content), preprocessing=PLAIN)
    names = ["backbone/avgpool/Mean_output_0", "encoder.scores", "Identity:0", "two_words", "line_break"]
    assert [tap.name for tap in encoder.taps] == names
    features = encoder.encode(frame()[None], names)
    for name in names:
        np.testing.assert_allclose(features[name][0], frame().mean((0, 1)) / 255, rtol=1e-5)
    spec = HeadSpec(("encoder.scores", "backbone/avgpool/Mean_output_0"), "linear")
    shapes = head_shapes(encoder)
    own = {tap: shapes[tap] for tap in spec.inputs}
    weights = {name: np.ones(shape, np.float32) for name, shape in weight_shapes(spec, own, 2).items()}
    head = pack(spec, shapes, ["x", "y"], weights, 0)
    assert OrtEngine(encoder).scores(head, features).shape == (1, 2)


def test_two_outputs_of_one_tap_name_are_refused_by_check_and_run(tmp_path: Path) -> None:
    path = saved(tmp_path, model([means(), means(output="/mean")], {"mean": (1, 3), "/mean": (1, 3)}))
    with pytest.raises(
        EncoderError, match=r"encoder\.onnx: outputs \['mean', '/mean'\] are both tap 'mean': rename one"
    ):
        OnnxEncoder(path)
    assert check_encoder(path)[0].severity == "error"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_maps_alone_give_their_means_as_pooled_taps(tmp_path: Path, layout: Any) -> None:
    shape = (1, 3, SIZE, SIZE) if layout == "NCHW" else (1, SIZE, SIZE, 3)
    content = model([node("Relu", ["image"], "map")], {"map": shape}, shape=shape)
    encoder = OnnxEncoder(saved(tmp_path, content), preprocessing=Preprocessing(SIZE, SIZE, layout=layout))
    assert pooled_taps(encoder) == (Tap("map.mean", (3,)),)
    for names in (["map.mean"], ["map", "map.mean"]):
        features = encoder.encode(frame()[None], names)
        np.testing.assert_allclose(features["map.mean"][0], frame().mean((0, 1)) / 255, rtol=1e-5)
    np.testing.assert_array_equal(features["map"][0], frame().transpose(2, 0, 1).astype(np.float32) / 255)
    assert check_encoder(saved(tmp_path, content), preprocessing=Preprocessing(SIZE, SIZE, layout=layout)) == ()


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("before", [1, 2, 5])
def test_tokens_give_the_class_token_and_the_mean_of_the_patches(tmp_path: Path, before: int, dtype: int) -> None:
    """16 patches of 2 x 2 pixels; a transformer may have a distillation token or registers beside the class token."""
    kind = np.float32 if dtype == TensorProto.FLOAT else np.float16
    first = np.arange(before * 3, dtype=kind).reshape(1, before, 3)
    nodes = [
        node("AveragePool", ["image"], "pooled", kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["pooled", "flat"], "channels"),
        node("Transpose", ["channels"], "patches", perm=[0, 2, 1]),
        node("Concat", ["first", "patches"], "last_hidden_state", axis=1),
    ]
    content = model(
        nodes,
        {"last_hidden_state": (1, before + 16, 3)},
        constants={"first": first, "flat": np.array([1, 3, 16])},
        dtype=dtype,
        output_type=dtype,
    )
    encoder = OnnxEncoder(saved(tmp_path, content), preprocessing=PLAIN)
    names = ["last_hidden_state.class", "last_hidden_state.mean"]
    assert encoder.taps == tuple(Tap(name, (3,)) for name in names)
    features = encoder.encode(np.stack([frame(0), frame(1)]), names)
    for i in (0, 1):
        np.testing.assert_array_equal(features[names[0]][i], first[0, 0].astype(np.float32))
        np.testing.assert_allclose(features[names[1]][i], frame(i).mean((0, 1)) / 255, rtol=2e-3)


def test_scores_alone_are_taken_although_a_better_output_would_be(tmp_path: Path) -> None:
    path = saved(tmp_path, model([means(output="logits")], {"logits": (1, 3)}))
    assert pooled_taps(OnnxEncoder(path)) == (Tap("logits", (3,)),)
    both = model([means(output="logits"), means()], {"logits": (1, 3), "mean": (1, 3)})
    assert pooled_taps(OnnxEncoder(saved(tmp_path, both))) == (Tap("mean", (3,)),)


def test_class_probabilities_are_warned_of(tmp_path: Path) -> None:
    content = model([means(), node("Softmax", ["mean"], "p", axis=1)], {"p": (1, 3)})
    (problem,) = check_encoder(saved(tmp_path, content), preprocessing=PLAIN)
    assert problem.severity == "warning" and "tap p: class probabilities" in problem.what
    assert "before the softmax" in problem.remedy


# --- preprocessing from outside ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unit", PLAIN),
        ("imagenet", Preprocessing(SIZE, SIZE, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))),
        ("8x8 mean=0.5,0.5,0.5 std=0.5,0.5,0.5 BGR", Preprocessing(8, 8, (127.5,) * 3, (127.5,) * 3, "NCHW", "BGR")),
    ],
)
def test_preprocessing_is_said_in_words(tmp_path: Path, text: str, expected: Preprocessing) -> None:
    encoder = OnnxEncoder(saved(tmp_path, sound()), preprocessing=text)
    found = encoder.preprocessing
    assert (found.size, found.layout, found.color) == (expected.size, expected.layout, expected.color)
    np.testing.assert_allclose([found.mean, found.scale], [expected.mean, expected.scale])
    assert encoder.notes == ()


@pytest.mark.parametrize(
    "text", ["imagnet", "mean=1,2", "mean=a,b,c", "std=0,0,0", "0x8", "4x8", "NHWC", "mean=nan,0,0", "8x8x3"]
)
def test_other_words_are_refused_with_the_ones_that_there_are(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path, sound())
    with pytest.raises((UsageError, EncoderError)) as caught:
        OnnxEncoder(path, preprocessing=text)
    assert len(str(caught.value)) > 30
    assert check_encoder(path, preprocessing=text)[0].severity == "error"


def test_a_size_that_the_file_leaves_open_can_be_said(tmp_path: Path) -> None:
    path = saved(tmp_path, sound(shape=("b", 3, "h", "w")))
    assert OnnxEncoder(path, preprocessing="imagenet 4x6").input_size == (4, 6)
    with pytest.raises(UsageError, match="leaves its input size open; add it"):
        OnnxEncoder(path, preprocessing="imagenet")


def test_a_digest_stands_for_the_preprocessing_too_and_a_prepared_file_has_the_same(tmp_path: Path) -> None:
    path = saved(tmp_path, sound())
    said, plain = OnnxEncoder(path, preprocessing="imagenet"), OnnxEncoder(path)
    copy = tmp_path / "prepared.onnx"
    copy.write_bytes(prepared(path, "imagenet"))
    kept = OnnxEncoder(copy)
    assert said.digest == kept.digest == hashlib.sha256(copy.read_bytes()).hexdigest() != plain.digest
    assert kept.preprocessing == said.preprocessing and kept.notes == ()
    one, other = (encoder.encode(frame()[None], ["mean"])["mean"] for encoder in (said, kept))
    np.testing.assert_array_equal(one, other)
    assert prepared(copy, "imagenet") == copy.read_bytes()
    copy.write_bytes(prepared(copy, "unit"))
    assert OnnxEncoder(copy).preprocessing == PLAIN


def test_a_prepared_encoder_is_cached_once(tmp_path: Path) -> None:
    path = saved(tmp_path, sound())
    assert prepared_encoder(path, None, tmp_path / "cache") == path
    first, again, other = (prepared_encoder(path, text, tmp_path / "cache") for text in ("imagenet", "imagenet", "BGR"))
    assert first == again != other and first.exists()
    assert OnnxEncoder(first).digest == OnnxEncoder(path, preprocessing="imagenet").digest


# --- metadata ---


def test_metadata_survives_the_file() -> None:
    metadata = Metadata(
        Preprocessing(4, 6, (1, 2, 3), (4, 5, 6), "NHWC", "BGR"),
        (Tap("a", (3,)), Tap("b", (3, 2, 2))),
        {"a": "a.rows"},
        {"grid": 28},
        {"architecture": "none", "weights": {"sha256": "0"}},
    )
    assert read_metadata(write_metadata(metadata)) == metadata


def test_a_stored_way_to_resize_is_written_and_never_needed() -> None:
    text = write_metadata(Metadata(PLAIN, (Tap("mean", (3,)),)))
    stored = json.loads(text)
    assert stored["preprocessing"].pop("resize") == "bilinear"
    for content in (stored, {**stored, "preprocessing": {**stored["preprocessing"], "resize": "bicubic"}}):
        assert write_metadata(read_metadata(json.dumps(content))) == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(json_values, st.sampled_from(["format", "preprocessing", "taps", "pooling", "provenance"]))
def test_any_wrong_field_is_an_encoder_error(value: Any, field: str) -> None:
    content = json.loads(write_metadata(Metadata(PLAIN, (Tap("mean", (3,)),))))
    text = json.dumps({**content, field: value})
    try:
        again = write_metadata(read_metadata(text))
    except EncoderError as error:
        assert error.what and error.remedy
    else:
        assert read_metadata(again) == read_metadata(text)


@pytest.mark.parametrize(
    "values",
    [
        {"height": 0},
        {"scale": (1.0, 0.0, 1.0)},
        {"mean": (float("nan"), 0.0, 0.0)},
        {"mean": (1.0, 2.0)},
        {"layout": "CHWN"},
        {"color": "YUV"},
    ],
)
def test_impossible_preprocessing_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Preprocessing(**{"height": 8, "width": 8, **values})


def test_an_encoder_error_crosses_processes() -> None:
    error = EncoderError("x.onnx: not a file", "give a path")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is EncoderError and str(again) == str(error) == "x.onnx: not a file: give a path"
