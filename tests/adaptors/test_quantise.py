"""Int8 heads: rounding against ONNX Runtime's own, weights unfolded at load, and the head that stays fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization.quant_utils import compute_data_quant_params, quantize_onnx_initializer

from adaptors.archive import pack
from adaptors.quantise import F32, quantise_rows
from adaptors.search import Scored, SearchResult
from adaptors.search_space import Budget, SearchSpace
from adaptors.spec import HeadSpec
from adaptors.train import Trained, accuracy, train
from device.encoder.runtime import open_session
from edgeear import growth
from edgeear.samples import AdaptPolicy
from tests.adaptors.test_heads import REFERENCE, packed, random_head, served, taps
from tests.support import fakes

LINEAR = HeadSpec(("b.mean",), bits=8)
LARGE = Budget(10**6, 10**6, 10**9, 1e3)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 9)),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    )
)
@settings(max_examples=200)
def test_rows_are_rounded_as_onnx_runtime_rounds_channels(weight: F32) -> None:
    quantised, scale = quantise_rows(weight)
    found = [compute_data_quant_params(row, TensorProto.INT8, symmetric=True) for row in weight]
    zero, theirs = np.array([f[0] for f in found], np.int8), np.array([f[1] for f in found], np.float32)
    assert not zero.any()
    np.testing.assert_allclose(scale, theirs, rtol=2e-7)
    reference = quantize_onnx_initializer(numpy_helper.from_array(weight, "w"), TensorProto.INT8, zero, scale, axis=0)
    np.testing.assert_array_equal(quantised, numpy_helper.to_array(reference))


def test_a_served_int8_head_has_its_weights_unfolded_once(tmp_path: Path) -> None:
    archive, inputs = packed(random_head(REFERENCE, 3)), taps(2, 4)
    session = open_session(archive.onnx)
    again = session.get_session_options()
    again.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(archive.onnx, again, providers=["CPUExecutionProvider"])
    stored, loaded = onnx.load_from_string(archive.onnx), onnx.load(tmp_path / "loaded.onnx")
    assert "DequantizeLinear" in {node.op_type for node in stored.graph.node}
    assert "DequantizeLinear" not in {node.op_type for node in loaded.graph.node}
    scores = session.run(["scores"], {t: inputs[t] for t in REFERENCE.inputs})[0]
    np.testing.assert_allclose(scores, served(archive, inputs), rtol=1e-4, atol=1e-4)


def grown(monkeypatch: pytest.MonkeyPatch, budget: Budget, spec: HeadSpec, outlier: float) -> Any:
    """What `grow_head` makes of `spec`, with the readout's weight of a feature that is always the same at `outlier`."""
    given = fakes.samples(0)
    view = {t: x.copy() for t, x in given.views[0].items()}
    view["b.mean"][:, 0] = 0.5
    given = replace(given, views=[view])

    def picked(space: SearchSpace, *_: object) -> SearchResult:
        return SearchResult((Scored(spec, space.cost(spec), 1.0),), "picked by the test")

    def trained(*arguments: Any) -> Trained:
        assert arguments[0].bits == 32
        fitted = train(*arguments)
        fitted.weights["matrix.readout"][:, 0] = outlier
        return fitted

    monkeypatch.setattr(growth, "search", picked)
    monkeypatch.setattr(growth, "train", trained)
    head, record = growth.grow_head(given, AdaptPolicy(budget), 0, lambda *_: None)
    plain = {t: view[t] for t in spec.inputs}
    right = (open_session(head.onnx).run(["scores"], plain)[0].argmax(1) == given.labels).mean()
    return head, record, right


def test_a_head_that_int8_spoils_stays_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    head, record, right = grown(monkeypatch, LARGE, LINEAR, outlier=1e5)
    assert head.spec == replace(LINEAR, bits=32) and record["spec"] == head.spec.to_dict()
    assert record["quantised"].startswith("kept fp32: int8 loses ") and record["bytes"] == len(head.onnx)
    assert (record["parameters"], record["macs"]) == (head.cost().parameters, head.cost().macs)
    assert right > 0.9


def test_a_head_that_int8_leaves_alone_is_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    head, record, right = grown(monkeypatch, LARGE, LINEAR, outlier=0.0)
    assert head.spec == LINEAR and record["quantised"] == "int8: loses 0.0 points" and right > 0.9
    assert "DequantizeLinear" in {node.op_type for node in onnx.load_from_string(head.onnx).graph.node}


def test_a_spoiled_head_is_int8_where_fp32_is_over_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = replace(LARGE, bytes=SearchSpace({"b.mean": (16,)}, 3).cost(LINEAR).bytes)
    head, record, right = grown(monkeypatch, tight, LINEAR, outlier=1e5)
    assert head.spec == LINEAR and "but fp32 exceeds the budget" in record["quantised"] and right < 0.9


def test_an_fp32_head_is_not_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    head, record, _ = grown(monkeypatch, LARGE, replace(LINEAR, bits=32), outlier=1e5)
    assert head.spec.bits == 32 and record["quantised"] is None


@pytest.mark.parametrize("bits", [32, 8])
def test_accuracy_is_that_of_the_stored_head(bits: int) -> None:
    given, spec = fakes.samples(0, 300), replace(LINEAR, bits=bits, reconfigurator="prototypes")
    shapes = {"b.mean": (16,)}
    weights = random_head(replace(spec, bits=32), 1, shapes).weights()
    scores = open_session(pack(spec, shapes, fakes.CLASSES, weights, 1).onnx).run(
        ["scores"], {"b.mean": given.views[0]["b.mean"]}
    )[0]
    found = accuracy(spec, shapes, weights, given.views[0], given.labels, 3, 1)
    assert found == pytest.approx((scores.argmax(1) == given.labels).mean(), abs=1e-6)
