"""The learned combination of proxies: what it learns, what it must not see, and the file that ships."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptors import transfer
from adaptors.fields import TapShapes
from adaptors.search_space import BUDGETS, SearchSpace
from adaptors.spec import HeadSpec
from adaptors.transfer import INPUTS, Example, Ranker, estimates, family, fit, logit, standardised
from benchmarks import ranker as shipped
from device.evaluation.nas_table import examples

F64 = NDArray[np.float64]
SHAPES: TapShapes = {**{f"s{i}.{k}": (8 * i,) for i in range(1, 6) for k in ("mean", "std")}, "m": (16, 7, 7)}


def drawn(heads: int, seed: int) -> list[HeadSpec]:
    return [spec for spec, _ in SearchSpace(SHAPES, 5).sample(heads, BUDGETS["large"], seed)]


def columns(heads: int, seed: int) -> dict[str, F64]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=heads) for name in INPUTS[:2]} | {"parameters": np.exp(rng.normal(9, 1, heads))}


def made(domain: str, seed: int, level: float = 1.0, scale: float = 1.0) -> Example:
    """A domain where conv heads are two logits worse, spectral tells the rest, and everything else is noise."""
    specs, scores = drawn(100, seed), columns(100, seed)
    z = (scores["spectral"] - scores["spectral"].mean()) / scores["spectral"].std()
    truth = level + 0.5 * z - 2.0 * np.array([s.convolutional for s in specs])
    scores["spectral"] = scale * scores["spectral"] + 7
    return Example(domain, specs, scores, 1 / (1 + np.exp(-truth)))


def test_it_learns_what_holds_on_every_domain() -> None:
    learned = fit([made("a", 1), made("b", 2, level=0.2, scale=30)])
    unseen = made("c", 3, level=-1, scale=0.01)
    found = learned.score(unseen.specs, unseen.scores, unseen.scores)
    expected = logit(unseen.accuracy)
    assert np.corrcoef(found, expected)[0, 1] > 0.97
    assert np.ptp(found) == pytest.approx(np.ptp(expected), rel=0.25)
    assert learned.learned_on == ("a", "b")


def test_the_prior_is_the_part_that_needs_no_score() -> None:
    learned = fit([made("a", 1), made("b", 2)])
    specs = drawn(60, 5)
    prior = learned.prior(specs)
    convolutional = np.array([s.convolutional for s in specs])
    assert prior[convolutional].max() < prior[~convolutional].min()
    flat = {name: np.ones(60) for name in INPUTS}
    np.testing.assert_allclose(learned.score(specs, flat, flat), prior)


def test_scores_count_relative_to_the_random_draw_and_are_bounded() -> None:
    reference = {"spectral": np.array([0.0, 2.0]), "class_means": np.array([np.nan, 1.0]), "parameters": np.exp([1, 3])}
    scores = {
        "spectral": np.array([1.0, 3.0, 1e9, np.nan]),
        "class_means": np.array([5.0, 1.0, 0.0, 2.0]),
        "parameters": np.exp([2.0, 3.0, 1.0, 2.0]),
    }
    z = standardised(scores, reference)
    assert z["spectral"].tolist() == [0.0, 2.0, 4.0, 0.0]
    assert z["class_means"].tolist() == [0.0] * 4, "one known value has no deviation"
    np.testing.assert_allclose(z["parameters"], [0.0, 1.0, -1.0, 0.0], atol=1e-12)


def test_estimates_are_accuracies_whose_level_comes_from_class_means() -> None:
    specs = [HeadSpec(("s1.mean",), reconfigurator="prototypes"), HeadSpec(("s1.mean",)), HeadSpec(("s2.mean",))]
    flat = {"spectral": np.zeros(3), "class_means": np.array([0.8, 0.1, 0.1]), "parameters": np.ones(3)}
    learned = Ranker({"linear/ridge": 1.0, "linear/prototypes": 0.0}, ("a",))
    found = estimates(specs, flat, 2, learned)
    assert found[0] == pytest.approx(0.8)
    assert logit(found[1:]) == pytest.approx(logit(found[:1])[0] + 1.0)
    lost = estimates(specs[1:], {n: c[1:] for n, c in flat.items()}, 2, learned)
    assert np.isfinite(lost).all() and lost[0] == lost[1], "no level is known: the order stands"


def test_words_tell_every_axis_of_the_space_apart() -> None:
    rng = np.random.default_rng(0)
    specs = drawn(300, 7)
    names = sorted({n for s in specs for n in transfer._words_of(s)})
    learned = Ranker(dict(zip(names, rng.normal(size=len(names)).tolist(), strict=True)), ("a",))
    base = HeadSpec(("s5.mean",), "depthwise", 32, spatial="m", reconfigurator="linear")
    for change in (
        {"depth": 2},
        {"residual": True},
        {"activation": "hardswish"},
        {"normalisation": "unit"},
        {"bits": 8},
        {"width": 64},
        {"pool": "pyramid"},
        {"taps": ("s4.mean", "s5.mean")},
        {"taps": ()},
        {"operator": "conv"},
        {"reconfigurator": "prototypes"},
    ):
        a, b = learned.prior([base, replace(base, **change)])
        assert a != b, change


def test_accuracies_of_none_and_all_have_a_logit() -> None:
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()
    assert logit(np.array([0.5])) == pytest.approx(0)


def test_a_ranker_needs_a_table() -> None:
    with pytest.raises(ValueError, match="at least one domain"):
        fit([])


def test_the_shipped_ranker_is_learned_from_the_tables() -> None:
    stored, learned = json.loads(shipped.SHIPPED.read_text()), json.loads(shipped.learned())
    assert stored["learned_on"] == learned["learned_on"]
    assert stored["weights"] == pytest.approx(learned["weights"], abs=1e-3), "make it again: benchmarks.ranker"
    again = transfer.built_in()
    assert json.loads(transfer.to_json(again)) == json.loads(shipped.SHIPPED.read_text())
    assert set(again.learned_on) == {t.domain for t in shipped.tables()} and len(again.learned_on) >= 4


def test_on_every_domain_the_combination_of_the_others_beats_each_of_its_inputs() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the bench extra")
    tables = shipped.tables()
    gains = []
    for truth in tables:
        learned = fit([e for o in tables if o is not truth for e in examples(o)])
        for e in examples(truth):
            combined = stats.kendalltau(learned.score(e.specs, e.scores, e.scores), e.accuracy)[0]
            gains.append(combined - max(stats.kendalltau(e.scores[n], e.accuracy)[0] for n in INPUTS))
    assert np.mean(gains) > 0.1
    assert {family(s) for t in tables for s in t.specs} >= {"linear/ridge", "mlp/linear", "conv/prototypes"}
