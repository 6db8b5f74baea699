"""Heads: specification, cost, and the packed graph in ONNX Runtime against the torch module.

The space is sampled with a fixed seed; each specification is a test of its own, so a failure names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptors.archive import METADATA_KEY, ArchiveError, HeadArchive, pack
from adaptors.cost import cost
from adaptors.hadamard import factors, next_power_of_two, phase_words, signs_to_phase, transform_macs
from adaptors.modules import Head, Weights, fwht, pool_map
from adaptors.quantise import F32, dequantised, quantise_rows
from adaptors.search_space import Budget, SearchSpace
from adaptors.spec import HeadSpec, InvalidSpec

SHAPES = {"a.mean": (8,), "b.mean": (16,), "m": (6, 5, 5)}
CLASSES = ("cat", "dog", "owl")
ANYTHING = Budget(10**9, 10**9, 10**12, 1e9)
SPECS = [spec for spec, _ in SearchSpace(SHAPES, 3).sample(64, ANYTHING, seed=1)]
ODD = [  # not in the space, or rare in it
    HeadSpec((), "linear", spatial="m", pool="pyramid"),
    HeadSpec((), "conv", 7, spatial="m", pool="pyramid", reconfigurator="linear"),
    HeadSpec(("a.mean",), "fourier", 37, bandwidth=2.0, spatial="m", pool="gem", normalisation="unit"),
    HeadSpec(("b.mean", "a.mean"), "fourier", 3, bandwidth=0.5, reconfigurator="prototypes", bits=8),
    HeadSpec(("a.mean",), "mlp", 1500, depth=3, residual=True, reconfigurator="prototypes", bits=8),
]
REFERENCE = HeadSpec(("a.mean", "b.mean"), "depthwise", 16, depth=2, spatial="m", reconfigurator="linear", bits=8)


def taps(samples: int, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, F32]:
    rng = np.random.default_rng(seed)
    return {t: rng.normal(1, 2, (samples, *s)).astype(np.float32) for t, s in shapes.items()}


def tensors(arrays: Mapping[str, F32]) -> dict[str, torch.Tensor]:
    return {t: torch.from_numpy(x) for t, x in arrays.items()}


def random_head(spec: HeadSpec, seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Head:
    """Normalisation fitted, biases away from zero."""
    head = Head(spec, shapes, len(CLASSES), seed)
    head.fit_normalisation(tensors(taps(20, seed, shapes)))
    rng = np.random.default_rng(seed)
    head.load({n: rng.normal(size=w.shape).astype(np.float32) for n, w in head.weights().items() if n[:4] == "bias"})
    return head


def packed(head: Head, shapes: Mapping[str, tuple[int, ...]] = SHAPES, weights: Weights | None = None) -> HeadArchive:
    return pack(head.spec, shapes, CLASSES, head.weights() if weights is None else weights, head.seed)


def served(head: HeadArchive, inputs: Mapping[str, F32]) -> F32:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(head.onnx, options, providers=["CPUExecutionProvider"])
    scores: F32 = session.run(["scores"], {t: inputs[t] for t in head.spec.inputs})[0]
    return scores


def modelled(head: Head, inputs: Mapping[str, F32]) -> F32:
    """What torch makes of the weights as they are stored."""
    head.load(dequantised(head.weights(), head.spec.bits))
    with torch.no_grad():
        scores: F32 = head(tensors(inputs)).numpy()
    return scores


def assert_same_scores(found: F32, expected: F32) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("spec", SPECS + ODD, ids=str)
def test_packed_head_equals_the_module(spec: HeadSpec) -> None:
    head = random_head(spec, seed=5)
    archive, inputs = packed(head), taps(4, seed=9)
    assert_same_scores(served(archive, inputs), modelled(head, inputs))
    one = {t: x[:1] for t, x in inputs.items()}
    assert_same_scores(served(archive, one), modelled(head, inputs)[:1])


@pytest.mark.parametrize("spec", SPECS + ODD, ids=str)
def test_cost_is_what_the_head_has(spec: HeadSpec) -> None:
    head = random_head(spec, seed=5)
    price = cost(spec, SHAPES, len(CLASSES))
    learned = sum(p.numel() for p in head.parameters())
    assert price.parameters == learned + 2 * head.shift.numel()
    archive = packed(head)
    assert archive.cost() == price
    assert 0.75 * price.bytes <= len(archive.onnx) <= 1.25 * price.bytes + 4096


def test_cost_of_known_heads() -> None:
    linear = cost(HeadSpec(("a.mean",)), SHAPES, 3)
    assert (linear.parameters, linear.bytes, linear.macs) == (8 * 3 + 3 + 16, 4 * 43, 8 + 24)
    small = cost(HeadSpec(("a.mean",), bits=8), SHAPES, 3)
    assert (small.parameters, small.bytes, small.macs) == (43, 24 + 4 * 3 + 4 * 19, 32)
    deep = cost(REFERENCE, SHAPES, 3)
    assert deep.macs == 25 * (6 * 16 + 2 * (16 * 16 + 9 * 16)) + (16 + 24) * 3
    assert deep.latency_ms > linear.latency_ms


def test_transform_work_counts_the_products_of_the_graph() -> None:
    spec = HeadSpec(("a.mean",), "fourier", 1024, bandwidth=1.0)
    dense = transform_macs(1024, 1024, 1024)
    assert dense == 2 * 32**3
    assert cost(spec, SHAPES, 3).macs == transform_macs(1024, 8, 1024) + 2 * dense + 1024 * (1 + 3)
    assert transform_macs(1024, 8, 1024) == 32 * 32 + 32 * 32
    assert [next_power_of_two(n) for n in (2, 3, 4, 5, 1024, 1025)] == [2, 4, 4, 8, 1024, 2048]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (1, 1), (2, 3)])
def test_pyramid_of_thin_maps(shape: tuple[int, int], bits: int) -> None:
    shapes = {"m": (6, *shape)}
    head = random_head(HeadSpec((), "linear", spatial="m", pool="pyramid", bits=bits), 2, shapes)
    inputs = taps(3, 1, shapes)
    assert_same_scores(served(packed(head, shapes), inputs), modelled(head, inputs))


def test_quadrants_of_an_odd_map_share_its_middle() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert pool_map(x, "pyramid").tolist() == [[2.0, 3.0, 5.0, 6.0]]
    assert pool_map(x, "average").tolist() == [[4.0]] and pool_map(x, "max").tolist() == [[8.0]]
    assert pool_map(x, "gem").item() == pytest.approx(float((np.arange(9.0) ** 3).mean() ** (1 / 3)), rel=1e-4)


def test_a_dead_tap_and_an_empty_class_stay_finite() -> None:
    spec = HeadSpec(("a.mean", "b.mean"), normalisation="unit", reconfigurator="prototypes")
    head = random_head(spec, 3)
    head.matrices["readout"].data[1] = 0
    inputs = {t: np.zeros_like(x) for t, x in taps(2).items()}
    head.shift.zero_()
    expected = modelled(head, inputs)
    np.testing.assert_allclose(expected, np.tile(head.biases["readout"].detach().numpy(), (2, 1)))
    np.testing.assert_allclose(served(packed(head), inputs), expected)


def test_normalisation_gives_mean_zero_and_squared_norm_of_about_one() -> None:
    head = Head(HeadSpec(("a.mean", "b.mean")), SHAPES, 3)
    data = tensors(taps(400))
    data["a.mean"][:, 0] = 7.0  # a dead channel
    head.fit_normalisation(data)
    z = head.adapted(data)
    assert z.mean(0).abs().max() < 1e-5
    assert 0.9 < float(z.square().sum(1).mean()) < 1.0
    assert z[:, 0].abs().max() < 1e-3


def test_fourier_codes_approximate_the_gaussian_kernel() -> None:
    spec = HeadSpec(("a.mean", "b.mean"), "fourier", 8192, bandwidth=0.7)
    head, data = random_head(spec, 4), tensors(taps(12, 4))
    x, z = (head.vector(data) - head.shift) * head.scale, head.adapted(data)
    kernel = torch.exp(-0.7 * torch.cdist(x, x).square())
    assert (z @ z.T - kernel).abs().max() < 0.06


def test_torch_transform_and_phases_follow_the_seeded_numbers() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    left, right = (torch.tensor(f) for f in factors(64))
    torch.testing.assert_close(fwht(x), x @ torch.kron(left, right))
    phase = signs_to_phase(7, 1000)
    assert phase.min() >= 0 and phase.max() < 2 * np.pi and abs(phase.mean() - np.pi) < 0.2
    np.testing.assert_allclose(phase, phase_words(7, 1000) * (2 * np.pi / 65536), rtol=1e-6)
    assert phase_words(7, 3).tolist() == [4293, 58579, 40984]


def test_heads_are_seeded() -> None:
    spec = HeadSpec(("a.mean",), "fourier", 64, bandwidth=1.0)
    inputs = tensors(taps(2))
    first, again, other = (Head(spec, SHAPES, 3, seed)(inputs) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_weights_survive_load() -> None:
    one, other = random_head(REFERENCE, 1), Head(REFERENCE, SHAPES, 3, 1)
    other.load(one.weights())
    assert torch.equal(one(tensors(taps(3))), other(tensors(taps(3))))
    with pytest.raises(KeyError):
        other.load({"matrix.nothing": np.zeros(1, np.float32)})


@given(hnp.arrays(np.float32, (3, 4, 2), elements=st.floats(-1e3, 1e3, width=32)))
def test_quantisation_is_within_half_a_step_of_each_row(weight: F32) -> None:
    quantised, scale = quantise_rows(weight)
    back = quantised.astype(np.float32) * scale[:, None, None]
    assert (np.abs(back - weight) <= 0.5001 * scale[:, None, None]).all()
    peak = np.abs(weight).max((1, 2))
    assert (np.abs(quantised).max((1, 2))[peak > 1e-30] == 127).all()


def test_only_matrices_are_quantised_and_once_is_enough() -> None:
    weights = random_head(REFERENCE, 1).weights()
    assert dequantised(weights, 32) is weights
    once = dequantised(weights, 8)
    assert {n for n in weights if not np.array_equal(once[n], weights[n])} == {n for n in weights if n[:6] == "matrix"}
    for name, value in dequantised(once, 8).items():
        np.testing.assert_allclose(value, once[name], rtol=1e-5)


def test_equal_arguments_give_equal_bytes() -> None:
    head = random_head(REFERENCE, 1)
    archive, again = packed(head), packed(head)
    assert archive.onnx == again.onnx and archive.digest == again.digest
    assert replace(archive, onnx=b"other").digest != archive.digest
    shifted = {**head.weights(), "shift": head.weights()["shift"] + np.float32(1)}
    assert packed(head, weights=shifted).digest != archive.digest


def test_the_graph_describes_itself() -> None:
    archive = packed(random_head(REFERENCE, 6))
    model = onnx.load_from_string(archive.onnx)
    assert [i.name for i in model.graph.input] == ["a.mean", "b.mean", "m"]
    batch, classes = model.graph.output[0].type.tensor_type.shape.dim
    assert (model.graph.output[0].name, batch.dim_param, classes.dim_value) == ("scores", "batch", 3)
    (entry,) = (p for p in model.metadata_props if p.key == METADATA_KEY)
    described = json.loads(entry.value)
    assert described == {k: v for k, v in archive.to_dict().items() if k != "digest"}
    assert HeadSpec.from_dict(described["spec"]) == REFERENCE
    stored = {t.data_type for t in model.graph.initializer if len(t.dims) == 4}
    assert stored == {onnx.TensorProto.INT8}


def test_description_survives_json() -> None:
    archive = packed(random_head(REFERENCE, 6))
    back = HeadArchive.from_dict(json.loads(json.dumps(archive.to_dict())), archive.onnx)
    assert (back.spec, back.shapes, back.classes, back.seed) == (REFERENCE, SHAPES, CLASSES, 6)
    assert back.digest == archive.digest


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"digest": "0" * 64}, "digest"),
        ({"spec": {"taps": ["a.mean"], "colour": 1}}, "colour"),
        ({"spec": {"taps": ["a.mean"], "operator": "magic"}}, "magic"),
        ({"spec": 3}, "parse"),
        ({"shapes": {"a.mean": [8]}}, "b.mean"),
        ({"shapes": {**SHAPES, "extra": [1]}}, "extra"),
        ({"shapes": [8]}, "parse"),
        ({"classes": [1, 2, 3]}, "classes"),
        ({"classes": None}, "parse"),
        ({"seed": "x"}, "parse"),
        ({"more": 1}, "more"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, object], complaint: str) -> None:
    archive = packed(random_head(REFERENCE, 6))
    with pytest.raises(ArchiveError, match=complaint):
        HeadArchive.from_dict({**archive.to_dict(), **change}, archive.onnx)
    with pytest.raises(ArchiveError, match="digest"):
        HeadArchive.from_dict(archive.to_dict(), archive.onnx[:-1])


def test_pack_refuses_arrays_that_do_not_fit() -> None:
    head = random_head(REFERENCE, 6)
    weights = head.weights()
    with pytest.raises(ArchiveError, match=r"matrix\.stem.*absent"):
        packed(head, weights={n: w for n, w in weights.items() if n != "matrix.stem"})
    with pytest.raises(ArchiveError, match=r"scale.*\(3,\), expected \(24,\)"):
        packed(head, weights={**weights, "scale": weights["scale"][:3]})
    with pytest.raises(ArchiveError, match="rename"):
        pack(
            HeadSpec(("scores",)),
            {"scores": (4,)},
            CLASSES,
            Head(HeadSpec(("scores",)), {"scores": (4,)}, 3).weights(),
            0,
        )
    with pytest.raises(InvalidSpec, match="not among"):
        pack(REFERENCE, {"m": (6, 5, 5)}, CLASSES, weights, 0)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"operator": "magic"}, "operator"),
        ({"bits": 4}, "bits"),
        ({"taps": ()}, "at least one tap"),
        ({"taps": ("a", "a")}, "twice"),
        ({"operator": "conv", "width": 8}, "spatial"),
        ({"width": 8}, "no width"),
        ({"operator": "mlp"}, "width >= 1"),
        ({"operator": "fourier", "width": 8}, "bandwidth"),
        ({"operator": "fourier", "width": 8, "bandwidth": float("nan")}, "bandwidth"),
        ({"depth": 0}, "depth"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidSpec, match=complaint):
        HeadSpec.from_dict({"taps": ("a",), **fields})


@pytest.mark.parametrize("spec", SPECS[:8] + ODD, ids=str)
def test_specification_survives_json(spec: HeadSpec) -> None:
    assert HeadSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_specification_refuses_what_it_does_not_know() -> None:
    with pytest.raises(InvalidSpec, match="colour"):
        HeadSpec.from_dict({"taps": ["a"], "colour": "red"})
    with pytest.raises(InvalidSpec, match="taps"):
        HeadSpec.from_dict({"operator": "linear"})
    with pytest.raises(InvalidSpec, match="list of names"):
        HeadSpec.from_dict({"taps": "a"})


def test_taps_must_exist_and_have_the_right_rank() -> None:
    with pytest.raises(InvalidSpec, match=r"'c' is not among the encoder's: a\.mean"):
        cost(HeadSpec(("c",)), SHAPES, 2)
    with pytest.raises(InvalidSpec, match="expected 1 dimension"):
        cost(HeadSpec(("m",)), SHAPES, 2)
    with pytest.raises(InvalidSpec, match="expected 3 dimension"):
        Head(HeadSpec((), "conv", 4, spatial="a.mean"), SHAPES, 2)
