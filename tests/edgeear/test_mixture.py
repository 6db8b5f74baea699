"""Two heads answer where two domains explain an input, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptors.archive import HeadArchive
from device.evaluation.data import DomainData
from device.evaluation.run import predict
from edgeear.errors import UsageError
from edgeear.flow import infer, judge
from edgeear.mixture import answer, second_route
from edgeear.shift import ShiftState
from edgeear.system import System, SystemPolicy
from edgeear.types import F32, Features
from tests.support import fakes


@dataclass
class Scripted:
    """An engine whose heads say what they are told, by the names of their classes."""

    said: dict[tuple[str, ...], list[float]]

    def encode(self, frame: NDArray[np.uint8], taps: tuple[str, ...]) -> dict[str, F32]:
        return fakes.FakeEncoder().encode(frame[None], taps)

    def scores(self, head: HeadArchive, features: Features) -> F32:
        return np.array([self.said[head.classes]], np.float32)


def pair(first: tuple[str, ...], second: tuple[str, ...], **policy: object) -> System:
    """Two domains whose heads have these classes."""
    system = fakes.grown(0, 1, **policy)
    heads = [replace(d.head, classes=c) for d, c in zip(system.domains, (first, second), strict=True)]
    return replace(system, domains=tuple(replace(d, head=h) for d, h in zip(system.domains, heads, strict=True)))


def test_one_head_answers_with_its_own_scores() -> None:
    system, engine = pair(("a", "b"), ("b", "c")), Scripted({("a", "b"): [5.0, -1.0], ("b", "c"): [0.0, 2.0]})
    classes, scores = answer(system, engine, {}, 1)
    assert classes == ("b", "c")
    np.testing.assert_array_equal(scores, [[0.0, 2.0]])


def test_of_two_heads_classes_are_matched_by_name_and_shares_add_up() -> None:
    system, engine = pair(("a", "b"), ("b", "c")), Scripted({("a", "b"): [1.0, 0.0], ("b", "c"): [3.0, 0.0]})
    classes, scores = answer(system, engine, {}, 0, 1)
    large = 1 / (1 + np.exp(-4.0))  # two scores are always two deviations apart, and the temperature is a half
    assert classes == ("a", "b", "c")
    np.testing.assert_allclose(scores, [[large / 2, (1 - large + large) / 2, (1 - large) / 2]], atol=1e-6)


def test_the_unit_of_a_heads_scores_does_not_matter() -> None:
    a, b = ("a", "b", "c"), ("c", "b", "a")
    scores = [
        answer(pair(a, b), Scripted({a: [0.1, 0.2, 0.4], b: [k * 2.0 + 7, k * 1.0 + 7, 7.0]}), {}, 0, 1)[1]
        for k in (0.01, 1, 100)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    np.testing.assert_allclose(scores[2], scores[1], atol=1e-4)


def test_heads_without_an_opinion_share_equally() -> None:
    a, b = ("a", "b"), ("b", "a")
    _, scores = answer(pair(a, b), Scripted({a: [2.0, 2.0], b: [0.0, 0.0]}), {}, 0, 1)
    np.testing.assert_allclose(scores, [[0.5, 0.5]])


@pytest.mark.parametrize(
    ("margin", "p", "second"),
    [(1.0, (0.5, 0.4), 1), (3.0, (0.5, 0.4), -1), (1.0, (0.5, 0.05), -1), (1.0, (0.05, 0.5), -1)],
)
def test_two_answer_only_where_both_explain_and_the_margin_is_small(
    margin: float, p: tuple[float, float], second: int
) -> None:
    scores = np.array([[4.0 + margin, 4.0, 1.0]], np.float32)
    contenders, explained = np.array([[0, 1, 2]]), np.array([[*p, 0.9]], np.float32)
    assert second_route(contenders, scores, explained, fakes.empty()).tolist() == [second]


def test_one_contender_has_no_second() -> None:
    one = np.array([[0]])
    assert second_route(one, np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32), fakes.empty()).tolist() == [-1]


def test_the_flow_blends_what_two_domains_explain() -> None:
    a, b = ("a", "b"), ("c", "b")
    engine = Scripted({a: [1.0, 0.9], b: [1.0, 0.9]})
    frame = fakes.frames(0, fakes.CLASSES, fakes.labels_of(1), 3)[0]
    alone = infer(pair(a, b, mixture=0.0), engine, ShiftState(), frame)[0]
    both = infer(pair(a, b, mixture=1e6, alpha=0.0), engine, ShiftState(), frame)[0]
    assert alone.route == both.route == "d0"
    assert (alone.label, both.label) == ("a", "a") and len(alone.scores) == 2 and len(both.scores) == 3
    np.testing.assert_allclose(both.scores.sum(), 1, atol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 1e6])
def test_the_protocol_answers_as_the_flow_does(margin: float) -> None:
    system, n = fakes.grown(0, 1, mixture=margin, alpha=0.0), 12
    labels = fakes.labels_of(n)
    shown, seen = fakes.frames(3, fakes.CLASSES, labels, 5), fakes.features(3, n, 5)
    h = fakes.space().encode(seen)
    domain = DomainData("d3", (dict(seen),), labels, h, dict(seen), labels, h, ())
    said = [infer(system, fakes.engine(), ShiftState(), frame)[0] for frame in shown]
    answered, route = predict(system, fakes.engine(), fakes.CLASSES, domain)
    assert [fakes.CLASSES[k] for k in answered] == [p.label for p in said]
    assert [system.names[k] for k in route] == [p.route for p in said]
    assert (judge(system, h).second >= 0).all() == (margin > 0)


def test_distinct_domains_are_served_by_one_head() -> None:
    system = fakes.grown(0, 1, 2)
    for background in (0, 1, 2):
        h = fakes.space().encode(fakes.features(background, seed=4))
        assert (judge(system, h).second == -1).all()


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_negative_limits_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match="mixture is"):
        SystemPolicy(mixture=value)
    with pytest.raises(UsageError, match="recognise is"):
        SystemPolicy(recognise=value)
