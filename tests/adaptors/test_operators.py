"""A new operator or proxy is one file and one row: toys added to the tables go the whole way, and nothing else is told.

search -> train -> pack -> ONNX Runtime for an operator, search for a proxy.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from adaptors import transfer
from adaptors.archive import HeadArchive, pack
from adaptors.cost import cost
from adaptors.fields import HeadFields
from adaptors.modules import Head
from adaptors.operators import OPERATORS
from adaptors.operators.base import Axis, Layers, Operator, T, axis
from adaptors.proxies import PROXIES, Probe
from adaptors.search import SearchPolicy, search
from adaptors.search_space import Budget, SearchSpace
from adaptors.spec import HeadSpec, InvalidSpec
from adaptors.train import TrainPolicy, accuracy, train
from tests.adaptors.test_search import ANYTHING, SHAPES, labelled


class Narrow(Operator):
    """Learned: one dense layer without activation."""

    def axes(self, taps: Sequence[tuple[str, ...]], maps: Sequence[str]) -> list[Axis]:
        return [axis("taps", *taps), axis("width", 5, 6)]

    def build(self, layers: Layers[T], f: HeadFields) -> T:
        return layers.dense(layers.scaled(), "narrow", f.width)


class Twice(Operator):
    """Nothing is learned: the vector input and itself."""

    learned = False

    def complaint(self, f: HeadFields) -> str | None:
        return "operator 'toy' has no width" if f.width else None

    def axes(self, taps: Sequence[tuple[str, ...]], maps: Sequence[str]) -> list[Axis]:
        return [axis("taps", *taps)]

    def build(self, layers: Layers[T], f: HeadFields) -> T:
        x = layers.vector()
        return layers.add(x, x)

    def kernel(self, gram: Any, f: HeadFields) -> Any:
        return 4 * gram


class Mapped(Narrow):
    """Learned, on the spatial tap."""

    reads_map = True

    def axes(self, taps: Sequence[tuple[str, ...]], maps: Sequence[str]) -> list[Axis]:
        return [axis("spatial", *maps), axis("taps", (), *taps[:2]), axis("width", 5)]

    def build(self, layers: Layers[T], f: HeadFields) -> T:
        return layers.join(layers.pool(layers.spread(layers.conv(layers.map(), "toy", f.width), "toys")))


@pytest.mark.parametrize("toy", [Narrow(), Twice(), Mapped()])
def test_a_new_operator_is_searched_trained_packed_and_served(toy: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(SearchSpace(SHAPES, 3))
    monkeypatch.setitem(OPERATORS, "toy", toy)
    space, (taps, labels) = SearchSpace(SHAPES, 3), labelled(60)
    assert list(space)[: len(before)] == before
    toys = list(space)[len(before) :]
    assert toys and {s.operator for s in toys} == {"toy"} and len(set(toys)) == len(toys)
    assert all(HeadSpec.from_dict(s.to_dict()) == s for s in toys)
    found = search(space, ANYTHING, taps, labels, SearchPolicy(specs=60, filtered=600, samples=40))
    scored = [s for s in found.ranking if s.spec.operator == "toy"]
    assert scored and all(s.score is not None for s in scored)
    assert transfer.family(scored[0].spec).startswith("toy/")
    spec = replace(scored[0].spec, bits=8)
    fitted = train(spec, SHAPES, [taps], labels, 3, TrainPolicy(batch=8, learning_rate=0.03))
    assert accuracy(spec, SHAPES, fitted.weights, taps, labels, 3, 0) > 0.5
    archive = pack(spec, SHAPES, ("a", "b", "c"), fitted.weights, 0)
    assert HeadArchive.from_dict(archive.to_dict(), archive.onnx).cost() == cost(spec, SHAPES, 3)
    assert sum(w.size for w in fitted.weights.values()) == cost(spec, SHAPES, 3).parameters
    head, given = Head(spec, SHAPES, 3, 0), {t: taps[t] for t in spec.inputs}
    head.load(fitted.weights)
    with torch.no_grad():
        expected = head({t: torch.from_numpy(x) for t, x in given.items()}).numpy()
    served = ort.InferenceSession(archive.onnx, providers=["CPUExecutionProvider"]).run(None, given)[0]
    np.testing.assert_allclose(served, expected, atol=1e-4)


@pytest.mark.parametrize("toy", [Narrow(), Twice(), Mapped()])
def test_the_gram_matrix_of_a_new_operator_is_that_of_its_codes(toy: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.adaptors.test_proxies import on, sample

    monkeypatch.setitem(OPERATORS, "toy", toy)
    space = SearchSpace(SHAPES, 3)
    for spec in [s for s in space if s.operator == "toy" and s.reconfigurator != "prototypes"]:
        probe = on(spec, sample())
        torch.testing.assert_close(probe.gram, probe.codes @ probe.codes.T, rtol=1e-4, atol=1e-4)


def test_the_legal_fields_of_an_operator_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSpec, match="operator is 'toy'; allowed: linear, fourier, mlp, conv, depthwise"):
        HeadSpec(("a",), "toy")
    monkeypatch.setitem(OPERATORS, "toy", Twice())
    with pytest.raises(InvalidSpec, match="'toy' has no width"):
        HeadSpec(("a",), "toy", 3)
    assert HeadSpec(("a",), "toy").closed_form


def test_a_new_proxy_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def toy(probe: Probe) -> float | None:
        return None if probe.spec.bits == 8 else -float(probe.cost.parameters)

    monkeypatch.setitem(PROXIES, "toy", toy)
    taps, labels = labelled(60)
    found = search(SearchSpace(SHAPES, 3), Budget(), taps, labels, SearchPolicy(specs=40, samples=30, proxy="toy"))
    defined = [s for s in found.ranking if s.spec.bits == 32]
    assert [s.score for s in defined] == sorted((-float(s.cost.parameters) for s in defined), reverse=True)
    assert list(found.ranking[: len(defined)]) == defined, "what is undefined comes last"


def test_no_operator_imports_torch_or_onnx() -> None:
    told = "import sys, adaptors.operators, adaptors.cost; print([m for m in ('torch', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
