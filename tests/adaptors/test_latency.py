"""Predicted latency: the work counted against packed graphs, the fit against known prices, the profile file.

No test looks at real time: the clock is made up wherever one is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import nnls

from adaptors.cost import cost
from adaptors.latency import DEFAULT, InvalidModel, LatencyModel, fit
from adaptors.plan import LANES, UNITS, Work
from adaptors.search_space import BUDGETS, Budget, SearchSpace
from adaptors.spec import HeadSpec
from device.evaluation.profile import Profile, ProfileError, measure, profile, read_latency, read_profile, to_json
from edgeear.errors import DataError, FormatError, UsageError
from tests.adaptors.test_heads import CLASSES, ODD, SHAPES, SPECS, packed, random_head
from tests.device.cli.test_cli import code
from tests.support import fakes

FAKE = {t.name: t.shape for t in fakes.TAPS}
HEADS = SPECS + ODD


def work(spec: HeadSpec, shapes: Mapping[str, tuple[int, ...]], classes: int) -> Work:
    return spec.plan(shapes, classes).work


def graph_work(spec: HeadSpec) -> Counter[str]:
    """The work of a packed graph on one input, counted from its nodes and their inferred shapes."""
    model = onnx.load_from_string(packed(random_head(spec, 1)).onnx)
    for tap in model.graph.input:
        tap.type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    shape = {c.name: tuple(c.dims) for c in inferred.initializer}
    for value in [*inferred.value_info, *inferred.input, *inferred.output]:
        shape[value.name] = tuple(d.dim_value or 1 for d in value.type.tensor_type.shape.dim)
    live, found = {tap.name for tap in inferred.input}, Counter({"call": 1, "tap": len(inferred.input)})
    for node in inferred.node:
        if not live & set(node.input):
            continue  # of constants only: folded when the head is loaded
        live |= set(node.output)
        out = shape[node.output[0]]
        found["view" if node.op_type in ("Reshape", "Flatten") else "node"] += 1
        if node.op_type == "Gemm":
            columns, depth = shape[node.input[1]]
            found["gemm"] += depth * -(-columns // LANES) * LANES
        elif node.op_type == "Conv":
            weight = shape[node.input[1]]
            found["depthwise" if weight[2] == 3 else "conv"] += int(np.prod(out)) * int(np.prod(weight[1:]))
        elif node.op_type == "MatMul":
            found["hadamard"] += int(np.prod(out)) * shape[node.input[0]][-1]
        elif node.op_type == "Cos":
            found["cosine"] += int(np.prod(out))
        elif node.op_type == "Pow":
            found["power"] += int(np.prod(out))
        elif node.op_type == "GlobalMaxPool":
            found["max"] += int(np.prod(shape[node.input[0]]))
        elif node.op_type in ("Relu", "HardSwish"):
            vector = len(out) == 2
            found["node"] += (1 if vector else -1) if node.op_type == "HardSwish" else -1
            found["hardswish"] += int(np.prod(out)) if node.op_type == "HardSwish" and not vector else 0
    found["node"] += 2 * spec.convolutional  # ONNX Runtime's layout of convolutions, entered and left
    return found


@pytest.mark.parametrize("spec", HEADS, ids=str)
def test_work_is_that_of_the_packed_graph(spec: HeadSpec) -> None:
    counted = graph_work(spec)
    kinds = set(UNITS) - {"element", "average", "pyramid", "reorder"}
    found = work(spec, SHAPES, len(CLASSES))
    assert {k: found[k] for k in kinds} == {k: counted[k] for k in kinds}
    assert set(found) == set(UNITS)


def test_multiply_accumulates_agree_with_the_cost() -> None:
    for spec in HEADS:
        if spec.convolutional and spec.reconfigurator == "linear":
            found, readout = work(spec, SHAPES, LANES), cost(spec, SHAPES, LANES).macs
            assert found["conv"] + found["depthwise"] + found["gemm"] == readout


PRICES = st.fixed_dictionaries({kind: st.floats(0, 1e3) for kind in UNITS})


@given(PRICES, st.sampled_from(HEADS), st.integers(1, 30))
def test_more_work_never_takes_less_time(prices: dict[str, float], spec: HeadSpec, classes: int) -> None:
    model, larger = LatencyModel(prices), [replace(spec, residual=True)]
    if spec.operator in ("mlp", "conv", "depthwise"):
        larger += [replace(spec, depth=spec.depth + 1)]
    if spec.reconfigurator == "linear":  # prototypes pad what does not fill a row: more may be a node less
        larger += [replace(spec, width=2 * spec.width)] if spec.width else []
        larger += [replace(spec, taps=tuple(t for t in SHAPES if len(SHAPES[t]) == 1))]
    least = model.ms(work(spec, SHAPES, classes))
    allowed = least * (1 - 1e-12)
    assert all(model.ms(work(more, SHAPES, classes)) >= allowed for more in larger)
    assert model.ms(work(spec, SHAPES, classes + 1)) >= allowed
    if spec.spatial is not None and spec.pool != "pyramid":
        assert model.ms(work(spec, {**SHAPES, "m": (6, 9, 9)}, classes)) >= allowed


def test_bits_cost_no_time_and_a_board_twice_as_slow_takes_twice_as_long() -> None:
    slow = LatencyModel({kind: 2 * price for kind, price in DEFAULT.prices.items()})
    for spec in HEADS:
        once = DEFAULT.ms(work(spec, SHAPES, 3))
        assert slow.ms(work(spec, SHAPES, 3)) == pytest.approx(2 * once)
        assert DEFAULT.ms(work(replace(spec, bits=40 - spec.bits), SHAPES, 3)) == once


def test_the_cost_and_the_space_use_the_model_that_they_are_given() -> None:
    slow = LatencyModel({kind: 1e3 * price for kind, price in DEFAULT.prices.items()})
    space, fast = SearchSpace(SHAPES, 3, slow), SearchSpace(SHAPES, 3)
    limit = Budget(10**9, 10**9, 10**12, latency_ms=1.01 * min(fast.cost(s).latency_ms for s in fast) * 1e3)
    assert cost(HEADS[0], SHAPES, 3).latency_ms == DEFAULT.ms(work(HEADS[0], SHAPES, 3))
    for spec, price in space.sample(5, limit, 0):
        assert price.latency_ms == slow.ms(work(spec, SHAPES, 3)) <= limit.latency_ms
    assert len(fast.sample(50, limit, 0)) > len(space.sample(50, limit, 0))


def test_fit_finds_the_prices_that_made_the_times() -> None:
    rng = np.random.default_rng(3)
    true = LatencyModel({kind: price * rng.uniform(0.2, 5) for kind, price in DEFAULT.prices.items()})
    shapes = {"a.mean": (8,), "b.mean": (100,), "c.mean": (320,), "m": (64, 14, 14), "n": (96, 7, 7)}
    heads = [s for s, _ in SearchSpace(shapes, 7).sample(200, BUDGETS["large"], 0)]
    ms = np.array([true.ms(work(s, shapes, 7)) for s in heads])
    works = [work(s, shapes, 7) for s in heads]
    exact = fit(works[:120], ms[:120], DEFAULT)
    assert dict(exact.prices) == pytest.approx(dict(true.prices), rel=1e-6)
    noisy = fit(works[:120], ms[:120] * rng.uniform(0.95, 1.05, 120), DEFAULT)
    off = [abs(noisy.ms(work(s, shapes, 7)) / t - 1) for s, t in zip(heads[120:], ms[120:], strict=True)]
    assert np.mean(np.array(off) < 0.05) > 0.9


def test_fit_leaves_alone_what_no_head_does() -> None:
    heads = [HeadSpec(("a.mean",)), HeadSpec(("b.mean",)), HeadSpec(("a.mean", "b.mean"), normalisation="unit")]
    found = fit([work(s, SHAPES, 3) for s in heads], np.array([0.01, 0.02, 0.03]), DEFAULT)
    assert found.prices["cosine"] == DEFAULT.prices["cosine"] and found.prices["conv"] == DEFAULT.prices["conv"]


@given(hnp.arrays(np.float64, 9, elements=st.floats(0.01, 9)))
@settings(max_examples=50)
def test_fitted_prices_are_the_nonnegative_ones_of_least_relative_error(ms: np.ndarray) -> None:
    works = [work(s, SHAPES, 3) for s in HEADS[:9]]
    found = fit(works, ms, DEFAULT)
    kinds = [k for k in UNITS if any(w[k] for w in works)]
    rows = np.array([[w[k] for k in kinds] for w in works]) / 1e3 / ms[:, None]
    best = nnls(rows, np.ones(len(ms)))[1]
    errors = [found.ms(w) / t - 1 for w, t in zip(works, ms, strict=True)]
    assert min(found.prices.values()) >= 0
    assert np.linalg.norm(errors) == pytest.approx(best, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf"), "1", True, None])
def test_prices_that_cannot_be_are_refused(price: object) -> None:
    with pytest.raises(InvalidModel, match="'gemm'"):
        LatencyModel({**DEFAULT.prices, "gemm": price})  # type: ignore[dict-item]
    with pytest.raises(InvalidModel, match="no-such-kind"):
        LatencyModel({**DEFAULT.prices, "no-such-kind": 1.0})
    with pytest.raises(InvalidModel, match="gemm"):
        LatencyModel({kind: 1.0 for kind in UNITS if kind != "gemm"})


def test_measuring_takes_the_quietest_median_of_each_call() -> None:
    """Two calls of 1 and 3 ms on a machine that stops for half a second now and then, and is slow in early rounds."""
    now, count, told = 0.0, 0, []

    def call(seconds: float) -> None:
        nonlocal now, count
        count += 1
        now += seconds * (1.5 if count < 100 else 1.0) + (0.5 if count % 5 == 0 else 0.0)

    calls = [lambda: call(0.001), lambda: call(0.003)]
    ms = measure(calls, 12, 0, lambda: now, lambda *at: told.append(at))
    np.testing.assert_allclose(ms, [1.0, 3.0], rtol=1e-6)
    assert told[-1] == ("measure", 12, 12)


class Ticks:
    """A clock that advances by a millisecond whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def small() -> Profile:
    return profile(FAKE, 12, 1, rounds=1, clock=Ticks())


def test_a_profile_measures_fits_and_validates() -> None:
    phases: list[tuple[str, int, int]] = []
    found = profile(FAKE, 12, 1, rounds=1, clock=Ticks(), on_progress=lambda *at: phases.append(at))
    assert (found.heads_fitted, found.heads_validated, found.threads) == (8, 4, 1)
    assert {phase for phase, done, total in phases if done == total} == {"open heads", "measure"}
    # Every call takes one tick, so a good model says a millisecond for every head.
    spec = HeadSpec(("a.mean",))
    assert found.latency.ms(work(spec, FAKE, 10)) == pytest.approx(1.0, rel=0.5)
    assert found.within_20_percent == pytest.approx(round(found.within_20_percent * 4) / 4)
    assert 0 <= found.median_error <= found.worst_error
    with pytest.raises(UsageError, match="at least 5"):
        profile(FAKE, 4, 0)


def test_a_profile_comes_back_as_it_was_written(tmp_path: Path) -> None:
    found, path = small(), tmp_path / "p.json"
    path.write_text(to_json(found))
    assert read_profile(path) == found
    assert read_latency(path) == found.latency and read_latency(None) is None


def changed(**values: object) -> str:
    return json.dumps({**small().model_dump(), **values})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (lambda: to_json(small())[:-40], "not a profile"),
        (lambda: "", "not a profile"),
        (lambda: "[1, 2]", "not a profile"),
        (lambda: '{"heads": 120, "proxies": []}', "not a profile"),
        (lambda: changed(format=2), "format 2, this version reads 1"),
        (lambda: changed(microseconds={"gemm": 1.0}), "prices must be given for exactly"),
        (lambda: changed(microseconds={kind: -1.0 for kind in UNITS}), "it must be a finite number from 0"),
        (lambda: changed(within_20_percent=7.0), "within_20_percent"),
    ],
)
def test_a_damaged_or_foreign_profile_is_refused_with_a_remedy(content, complaint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "p.json"
    path.write_text(content())
    with pytest.raises(ProfileError, match="edgeear profile") as caught:
        read_profile(path)
    assert complaint in str(caught.value) and isinstance(caught.value, FormatError)


def test_bytes_and_absent_files_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="edgeear profile"):
        read_profile(tmp_path / "b")
    with pytest.raises(DataError, match=r"cannot be read.*edgeear profile"):
        read_profile(tmp_path / "none.json")


def test_the_command_writes_a_profile_into_the_cache_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("device.encoder.session.OnnxEncoder", lambda path: fakes.FakeEncoder())
    monkeypatch.setattr("device.evaluation.profile.ROUNDS", 1)
    monkeypatch.setenv("EDGEEAR_CACHE", str(tmp_path / "cache"))
    arguments: list[str | Path] = [
        "profile",
        "--encoder",
        tmp_path / "e.onnx",
        "--heads",
        "5",
        "--seed",
        "2",
        "--quiet",
    ]
    assert code(*arguments) == 0
    assert read_profile(tmp_path / "cache" / "profile.json").heads_fitted == 3
    assert code(*arguments, "--json", tmp_path / "mine.json") == 0
    assert "heads within 20 %" in capsys.readouterr().out
    text = (tmp_path / "mine.json").read_text()
    assert set(json.loads(text)["microseconds"]) == set(UNITS)


def test_a_profile_that_is_asked_for_and_damaged_stops_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.json").write_text("{}")
    arguments: list[str | Path] = ["--data", tmp_path, "--encoder", "e.onnx", "--profile", tmp_path / "p.json"]
    for command in (["simulate"], ["eval", "--json", str(tmp_path / "o.json")]):
        assert code(*command, *arguments) == 2
        assert "not a profile of a board" in capsys.readouterr().err
