"""A domain's memory is a plain sum: order-free, mergeable, subtractable, and never aliased."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeear.errors import DataError, UsageError
from edgeear.memory import I64, DomainMemory, learn, merge, subtract
from edgeear.types import F32

CLASSES = ("cat", "dog", "owl")
M = 5


def samples(n: int, seed: int) -> tuple[F32, I64]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 16)).astype(np.float32), rng.integers(0, 3, n)


def assert_same(a: DomainMemory, b: DomainMemory) -> None:
    assert a.classes == b.classes
    np.testing.assert_array_equal(a.counts, b.counts)
    np.testing.assert_allclose(a.class_sums, b.class_sums, atol=1e-5)
    np.testing.assert_allclose(a.gram, b.gram, atol=1e-5)


parts = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 2**31))


@given(parts)
def test_learning_is_order_free(case: tuple[int, int, int]) -> None:
    h, y = samples(case[0], case[2])
    order = np.random.default_rng(case[2]).permutation(case[0])
    assert_same(learn(h, y, CLASSES, M), learn(h[order], y[order], CLASSES, M))


@given(parts)
def test_merging_is_learning_from_the_union_and_commutes(case: tuple[int, int, int]) -> None:
    h, y = samples(case[0] + case[1], case[2])
    a, b = (learn(h[s], y[s], CLASSES, M) for s in (slice(0, case[0]), slice(case[0], None)))
    assert_same(merge(a, b), learn(h, y, CLASSES, M))
    assert_same(merge(a, b), merge(b, a))


@given(parts)
def test_subtracting_undoes_merging(case: tuple[int, int, int]) -> None:
    a, b = learn(*samples(case[0], case[2]), CLASSES, M), learn(*samples(case[1], case[2] + 1), CLASSES, M)
    assert_same(subtract(merge(a, b), b), a)


def test_merging_matches_classes_by_name() -> None:
    h, y = samples(20, 0)
    names = np.array(CLASSES)
    other = ("owl", "emu", "cat", "dog")
    moved = np.array([other.index(name) for name in names[y]])
    a, b = learn(h, y, CLASSES, M), learn(h, moved, other, M)
    both = merge(a, b)
    assert both.classes == ("cat", "dog", "owl", "emu")
    np.testing.assert_array_equal(both.counts, [*(2 * a.counts), 0])
    np.testing.assert_allclose(both.class_sums[:3], 2 * a.class_sums)
    assert_same(subtract(a, b), learn(h[:0], y[:0], CLASSES, M))


def test_statistics_are_those_of_the_samples() -> None:
    h, y = samples(40, 1)
    memory = learn(h, y, CLASSES, M)
    assert (memory.n, memory.dimensions, memory.m) == (40, 16, M)
    np.testing.assert_allclose(memory.mean, h[:, :M].mean(0), atol=1e-6)
    np.testing.assert_allclose(memory.covariance, np.cov(h[:, :M].T, bias=True), atol=1e-6)
    expected = np.stack([h[y == c].sum(0) for c in range(3)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(memory.prototypes, expected, atol=1e-5)


def test_a_class_without_samples_has_no_prototype() -> None:
    h, _ = samples(4, 2)
    memory = learn(h, np.array([0, 0, 2, 2]), CLASSES, M)
    np.testing.assert_array_equal(memory.prototypes[1], 0)
    np.testing.assert_allclose(np.linalg.norm(memory.prototypes, axis=1), [1, 0, 1], atol=1e-6)
    empty = learn(h[:0], np.zeros(0, np.int64), CLASSES, M)
    assert empty.n == 0 and not empty.mean.any() and not empty.prototypes.any()


def test_inputs_are_neither_changed_nor_aliased() -> None:
    h, y = samples(10, 3)
    before, labels = h.copy(), y.copy()
    memory = learn(h, y, CLASSES, M)
    np.testing.assert_array_equal(h, before)
    np.testing.assert_array_equal(y, labels)
    gram = np.array(memory.gram)
    held = replace(memory, gram=gram)
    gram[:] = 0
    np.testing.assert_array_equal(held.gram, memory.gram)
    copies = [memory.counts.copy(), memory.class_sums.copy(), memory.gram.copy()]
    merge(memory, held)
    subtract(memory, held)
    for array, copy in zip((memory.counts, memory.class_sums, memory.gram), copies, strict=True):
        np.testing.assert_array_equal(array, copy)
        assert not array.flags.writeable


def test_size_does_not_grow_with_samples() -> None:
    small, large = learn(*samples(5, 0), CLASSES, M), learn(*samples(500, 0), CLASSES, M)
    assert small.class_sums.nbytes + small.gram.nbytes == large.class_sums.nbytes + large.gram.nbytes


def test_refusals() -> None:
    h, y = samples(6, 4)
    memory = learn(h, y, CLASSES, M)
    for labels in (y[:5], y[:, None], y + 3, y - 3):
        with pytest.raises(UsageError, match="labels"):
            learn(h, labels, CLASSES, M)
    for m in (0, 17):
        with pytest.raises(UsageError, match=f"m is {m}"):
            learn(h, y, CLASSES, m)
    with pytest.raises(DataError, match="NaN"):
        learn(np.full_like(h, np.nan), y, CLASSES, M)
    with pytest.raises(UsageError, match="distinct"):
        learn(h, y, ("a", "a", "b"), M)
    with pytest.raises(UsageError, match=r"\(16, 5\) and \(16, 4\)"):
        merge(memory, learn(h, y, CLASSES, 4))
    with pytest.raises(UsageError, match="negative"):
        subtract(memory, merge(memory, memory))
    with pytest.raises(UsageError, match="yak"):
        subtract(memory, learn(h, y * 0, ("yak",), M))
