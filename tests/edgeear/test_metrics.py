"""Figures of a run against hand-computed examples and against their definitions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeear.metrics import auroc, bwt, confusion, forgetting, fpr95

ACCURACY = np.array([[0.9, 0.2, 0.1], [0.95, 0.8, 0.3], [0.85, 0.6, 0.7]])
# Few distinct values, so that ties are common.
scores = st.lists(st.integers(-4, 4), min_size=1, max_size=40)


def f32(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, np.float32)


def test_bwt_is_the_mean_change_since_each_domain_was_learned() -> None:
    assert bwt(ACCURACY) == pytest.approx(((0.85 - 0.9) + (0.6 - 0.8)) / 2)
    assert bwt(np.array([[0.3, 0.0], [0.5, 0.9]])) == pytest.approx(0.2)


def test_one_domain_cannot_transfer_backwards() -> None:
    assert bwt(np.array([[0.7]])) == 0.0
    assert forgetting(np.array([[0.7]])) == [0.0]


def test_forgetting_counts_from_the_best_since_learned() -> None:
    assert forgetting(ACCURACY) == pytest.approx([0.10, 0.2, 0.0])
    early = np.array([[0.5, 0.99], [0.6, 0.4]])
    assert forgetting(early) == pytest.approx([0.0, 0.0]), "accuracy before a domain was learned does not count"


def test_confusion_rows_are_true_domains() -> None:
    routes = [np.array([0, 0, 1, 2]), np.array([1, 1]), np.array([], np.int64)]
    expected = [[0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(confusion(routes, 3), expected)


def test_auroc_of_hand_computed_scores() -> None:
    assert auroc(f32([1, 2, 3]), f32([2, 4])) == pytest.approx((1 + 0.5 + 0 + 3) / 6)
    assert auroc(f32([5, 6]), f32([1, 2])) == 0.0
    assert auroc(f32([3, 3]), f32([3])) == 0.5


@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_order(known: list[int], unknown: list[int]) -> None:
    pairs = [(u > k) + Fraction(u == k, 2) for u in unknown for k in known]
    assert auroc(f32(known), f32(unknown)) == pytest.approx(float(sum(pairs) / len(pairs)))
    assert auroc(f32(unknown), f32(known)) == pytest.approx(1 - auroc(f32(known), f32(unknown)))


def test_fpr95_of_hand_computed_scores() -> None:
    known, unknown = f32(list(range(10))), f32(list(range(5, 25)))
    # Of 20 unknown scores 19 must be found: the threshold is the second smallest, 6, and 6 to 9 are above it.
    assert fpr95(known, unknown) == pytest.approx(0.4)
    assert fpr95(f32([0, 1]), f32([2, 3])) == 0.0
    assert fpr95(f32([2, 3]), f32([0, 1])) == 1.0


@given(scores, scores)
def test_fpr95_is_the_least_of_thresholds_that_find_enough(known: list[int], unknown: list[int]) -> None:
    enough = [t for t in unknown if 20 * sum(u >= t for u in unknown) >= 19 * len(unknown)]
    least = min(sum(k >= t for k in known) / len(known) for t in enough)
    assert fpr95(f32(known), f32(unknown)) == pytest.approx(least)
