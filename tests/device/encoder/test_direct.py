"""The direct form of Fourier heads: the graph's scores, and a refusal of every graph that it does not know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptors.archive import HeadArchive
from adaptors.hadamard import fwht, thirds
from adaptors.spec import HeadSpec
from device.encoder.direct import DirectHead, direct
from device.encoder.engine import OrtEngine
from device.encoder.runtime import open_session
from edgeear.types import F32, Features
from tests.adaptors.test_heads import ODD, SPECS, packed, random_head
from tests.support import fakes

WIDE = [
    HeadSpec(("a.mean", "b.mean"), "fourier", 512, bandwidth=0.3, normalisation=normalisation, bits=bits)
    for normalisation in ("unit", "standard")
    for bits in (8, 32)
]
HEADS = SPECS + ODD + WIDE


def graph_scores(head: HeadArchive, features: Features) -> F32:
    out: F32 = open_session(head.onnx).run(["scores"], {t: features[t] for t in head.spec.inputs})[0]
    return out


def inputs(head: HeadArchive, seed: int = 0) -> dict[str, F32]:
    rng = np.random.default_rng(seed)
    return {t: rng.standard_normal((1, *shape)).astype(np.float32) for t, shape in head.shapes.items()}


def found(head: HeadArchive) -> DirectHead | None:
    return direct(head, lambda features: graph_scores(head, features))


@pytest.mark.parametrize("spec", HEADS, ids=str)
def test_a_direct_head_gives_the_scores_of_its_graph(spec: HeadSpec) -> None:
    head = packed(random_head(spec, 1))
    ours = found(head)
    assert (ours is not None) == (
        spec.operator == "fourier" and spec.reconfigurator != "prototypes" and spec.spatial is None
    )
    for seed in range(3 if ours else 0):
        assert ours is not None
        given, expected = inputs(head, seed), graph_scores(head, inputs(head, seed))
        np.testing.assert_allclose(ours.scores(given), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_silent_tap_gives_the_scores_of_the_graph() -> None:
    head = packed(random_head(WIDE[0], 1))
    ours, silent = found(head), {t: 1e-8 * x for t, x in inputs(head).items()}
    assert ours is not None
    np.testing.assert_allclose(ours.scores(silent), graph_scores(head, silent), atol=1e-5)


def test_a_graph_that_computes_something_else_keeps_its_session() -> None:
    head, other = (packed(random_head(WIDE[0], seed)) for seed in (1, 2))
    assert direct(head, lambda features: graph_scores(other, features)) is None
    assert direct(replace(head, seed=head.seed + 1), lambda features: graph_scores(head, features)) is None
    for broken in (b"", other.onnx[: len(other.onnx) // 2], b"\x3a\x02\x0a\x00"):
        assert direct(replace(head, onnx=broken), lambda features: graph_scores(head, features)) is None


def test_the_engine_answers_one_input_and_many_alike() -> None:
    head, engine = packed(random_head(WIDE[0], 1)), OrtEngine(fakes.FakeEncoder())
    one, other = inputs(head, 1), inputs(head, 2)
    both = engine.scores(head, {t: np.concatenate([one[t], other[t]]) for t in one})
    for row, given in zip(both, (one, other), strict=True):
        np.testing.assert_allclose(engine.scores(head, given)[0], row, atol=1e-5 * np.abs(both).max())


@pytest.mark.parametrize("exponent", range(14))
def test_three_factors_make_the_transform(exponent: int) -> None:
    n = 1 << exponent
    left, middle, right = thirds(n)
    assert len(left) * len(middle) * len(right) == n
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    y = left @ (middle @ (x.reshape(-1, len(right)) @ right).reshape(len(left), len(middle), -1)).reshape(len(left), -1)
    np.testing.assert_allclose(y.reshape(-1) / np.sqrt(n), fwht(x), atol=1e-5)
