"""Novelty: the two statistics against their definitions, out-of-fold calibration, and p-values that keep their word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import erf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeear.errors import DataError, UsageError
from edgeear.memory import I64, learn, rounded
from edgeear.novelty import LIMIT, Calibration, calibrate, conditional_bounds, detector
from edgeear.shift import LEVELS
from edgeear.types import F32

CLASSES = ("a", "b")
M = 8


def domain(n: int, seed: int, shift: float = 0.0) -> tuple[F32, I64]:
    """Two classes on the first two axes of 32 dimensions, with noise."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    h = rng.normal(shift, 0.3, (n, 32))
    h[np.arange(n), y] += 2
    return h.astype(np.float32), y


def calibration(values: F32, delta: float = 0.01) -> Calibration:
    return Calibration(0.0, 1.0, 0.0, 1.0, values, delta)


def test_angle_is_one_minus_the_best_cosine() -> None:
    h, y = domain(50, 0)
    memory = learn(h, y, CLASSES, M)
    bundle, means = h[:, M:], np.stack([h[y == c, M:].mean(axis=0) for c in (0, 1)])
    norms = np.linalg.norm(bundle, axis=1)[:, None] * np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(detector(memory).angle(h), 1 - (bundle @ means.T / norms).max(axis=1), atol=1e-5)


def test_with_second_order_memory_of_all_coordinates_the_angle_covers_all() -> None:
    h, y = domain(50, 0)
    whole = detector(learn(h, y, CLASSES, 32))
    means = np.stack([h[y == c].mean(axis=0) for c in (0, 1)])
    norms = np.linalg.norm(h, axis=1)[:, None] * np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(whole.angle(h), 1 - (h @ means.T / norms).max(axis=1), atol=1e-5)


def test_an_absent_class_is_no_prototype() -> None:
    h, y = domain(50, 0)
    one = detector(learn(h, y * 0, CLASSES, M))
    against = np.concatenate([np.zeros((1, M), np.float32), -one.prototypes], axis=1)
    np.testing.assert_allclose(one.angle(against), [2], atol=1e-5)
    np.testing.assert_array_equal(one.angle(np.zeros((1, 32), np.float32)), [1])


def test_leverage_is_the_log_mahalanobis_distance_from_the_nearest_class_mean() -> None:
    h, y = domain(60, 1)
    memory = learn(h, y, CLASSES, M)
    r = 0.02 + 0.3 * M / (M + 60)
    means = np.stack([h[y == c, :M].mean(axis=0) for c in (0, 1)]).astype(np.float64)
    within = (h[:, :M] - means[y]).T @ (h[:, :M] - means[y]) / 60
    c = (1 - r) * within + np.diag(r * np.diag(within) + 1e-3 * np.diag(within).mean())
    away = h[:, None, :M] - means
    expected = np.log(np.einsum("nki,ij,nkj->nk", away, np.linalg.inv(c), away).min(axis=1))
    np.testing.assert_allclose(detector(memory).leverage(h), expected, atol=1e-4)


def test_degenerate_memories_still_score() -> None:
    h = np.ones((6, 32), np.float32)
    flat = detector(learn(h, np.zeros(6, np.int64), CLASSES, M))
    for score in (flat.angle(h), flat.leverage(h), flat.leverage(h * 3)):
        assert np.isfinite(score).all()
    held = calibrate(h, np.zeros(6, np.int64), CLASSES, M, seed=0)
    assert np.isfinite(held.values).all()
    with pytest.raises(DataError, match="0 samples"):
        detector(learn(h[:0], np.zeros(0, np.int64), CLASSES, M))


@pytest.mark.parametrize("seed", range(5))
def test_equal_samples_score_after_their_sums_were_rounded(seed: int) -> None:
    h = np.repeat(np.random.default_rng(seed).normal(3, 1, (1, 96)).astype(np.float32), 10, axis=0)
    memory = learn(h, np.zeros(10, np.int64), CLASSES, 64)
    sums, gram = memory.class_sums.astype(np.float32), memory.gram.astype(np.float32)
    stored = replace(memory, class_sums=sums.astype(np.float64), gram=gram.astype(np.float64))
    scores = detector(stored).leverage(h * np.array([[1]] * 9 + [[2]], np.float32))
    assert np.isfinite(scores).all() and scores[-1] > scores[0]


def test_calibration_is_out_of_fold() -> None:
    h, y = domain(40, 2)
    held = calibrate(h, y, CLASSES, M, folds=40, seed=0)
    expected = []
    for i in range(40):
        rest = np.arange(40) != i
        one = detector(learn(h[rest], y[rest], CLASSES, M))
        expected.append((one.angle(h[i : i + 1])[0], one.leverage(h[i : i + 1])[0]))
    a, b = np.array(expected).T
    assert held.angle_mean == pytest.approx(a.mean(), abs=1e-5)
    assert held.leverage_deviation == pytest.approx(b.std(), abs=1e-4)
    novelty = np.maximum((a - a.mean()) / a.std(), (b - b.mean()) / b.std())
    np.testing.assert_allclose(held.values, np.sort(novelty), atol=1e-3)


def test_calibration_is_a_function_of_its_seed() -> None:
    h, y = domain(40, 2)
    first, again, other = (calibrate(h, y, CLASSES, M, seed=s).values for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_false_ood_rate_on_fresh_inputs_is_near_its_level_and_a_shift_is_ood() -> None:
    h, y = domain(400, 3)
    held, known = calibrate(h, y, CLASSES, M, seed=0), detector(learn(h, y, CLASSES, M))
    fresh = held.novelty(known, domain(4000, 4)[0])
    assert 0.01 < (held.p_values(fresh)[0] <= 0.05).mean() < 0.08
    foreign = held.novelty(known, domain(400, 5, shift=1.0)[0])
    assert (held.p_values(foreign)[0] <= 0.05).mean() > 0.95
    assert foreign.mean() > fresh.mean()


def test_p_values_count_the_calibration_values_at_or_above() -> None:
    held = calibration(np.array([3, 1, 2, 2, 5], np.float32))
    novelty = np.array([0, 2, 2.5, 5, 6, np.nan], np.float32)
    np.testing.assert_allclose(held.p_values(novelty)[0], np.array([6, 5, 3, 2, 1, 1]) / 6, rtol=1e-6)
    bounds = conditional_bounds(5, 0.01)
    np.testing.assert_array_equal(held.p_values(novelty)[1], bounds[[5, 4, 2, 1, 0, 0]])


def test_a_calibration_of_fewer_than_ten_can_never_be_evidence_of_a_shift() -> None:
    assert (conditional_bounds(9, 0.01) == 1).all() and conditional_bounds(10, 0.01)[0] == 0.5


@given(st.integers(5, 300), st.floats(0.001, 0.5))
def test_conditional_bounds_are_monotone_and_above_the_conformal_ones(n: int, delta: float) -> None:
    bounds = conditional_bounds(n, delta)
    assert bounds.shape == (n + 1,) and bounds[-1] == 1 and bounds[0] > 0
    assert (np.diff(bounds) >= 0).all()
    assert (bounds >= np.arange(n + 1) / n - 1e-6).all()
    assert set(bounds.tolist()) <= {*LEVELS, 1.0}
    # The smallest bound is the first level that n scores, none of them exceeded, can vouch for.
    vouched = [u for u in LEVELS if (1 - u) ** n <= delta / len(LEVELS)]
    assert bounds[0] == min(vouched, default=1.0)


@pytest.mark.parametrize("n", [20, 300])
def test_conditional_bounds_hold_for_all_thresholds_at_once(n: int) -> None:
    """True tails are known for uniform scores: the bound fails for some threshold in at most delta of the sets."""
    rng, delta, trials = np.random.default_rng(0), 0.1, 4000
    scores = np.sort(rng.random((trials, n)), axis=1)[:, ::-1]
    # The worst threshold with j scores at or above it lies just above the (j + 1)-th largest score.
    failed = (1 - scores > conditional_bounds(n, delta)[:n]).any(axis=1).mean()
    assert 0.01 < failed <= delta + 3 * np.sqrt(delta * (1 - delta) / trials)


@pytest.mark.parametrize("n", [12, 140])
def test_conditional_p_values_are_valid_for_nearly_every_calibration_set(n: int) -> None:
    """Ties included: scores are rounded normals, whose true tails are summed exactly."""
    rng, delta, trials, grid = np.random.default_rng(1), 0.1, 3000, np.arange(-50, 51) / 10
    mass = np.diff([0.0, *(0.5 * (1 + np.array([erf((x + 0.05) / 2**0.5) for x in grid[:-1]]))), 1.0])
    failed = 0
    for _ in range(trials):
        values = np.clip(np.round(rng.normal(size=n), 1), -5, 5).astype(np.float32)
        p = calibration(values, delta).p_values(grid.astype(np.float32))[1]
        failed += any(mass[p <= u].sum() > u + 1e-9 for u in LEVELS)
    assert failed / trials <= delta + 3 * np.sqrt(delta * (1 - delta) / trials)


def copies(h: F32, y: I64, times: int, seed: int) -> tuple[F32, I64]:
    """Every frame `times` times in a row, with a little noise."""
    rng = np.random.default_rng(seed)
    repeated = np.repeat(h, times, axis=0)
    return (repeated + rng.normal(0, 0.01, repeated.shape)).astype(np.float32), np.repeat(y, times)


@pytest.mark.parametrize("times", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_near_copies_of_a_scene_count_once_and_do_not_vouch_for_each_other(times: int, seed: int) -> None:
    h, y = domain(140 // times, seed)
    held = calibrate(*copies(h, y, times, seed), CLASSES, M, seed=seed)
    assert len(held.values) == len(h)
    known = detector(learn(*copies(h, y, times, seed), CLASSES, M))
    fresh = held.novelty(known, domain(4000, seed + 50)[0])
    assert (held.p_values(fresh)[0] <= 0.05).mean() < 0.15
    alone = calibrate(h, y, CLASSES, M, seed=seed)
    assert held.angle_mean == pytest.approx(alone.angle_mean, rel=0.3)


def test_copies_share_a_fold() -> None:
    h, y = domain(20, 2)
    twice, labels = copies(h, y, 2, 0)
    held = calibrate(twice, labels, CLASSES, M, folds=20, seed=0)
    expected = []
    for i in range(20):
        rest = np.arange(40) // 2 != i
        one = detector(learn(twice[rest], labels[rest], CLASSES, M))
        expected.append(float(one.angle(twice[2 * i : 2 * i + 1])[0]))
    assert held.angle_mean == pytest.approx(float(np.mean(expected)), abs=1e-5)


@pytest.mark.parametrize("different", [1, 2, 4])
def test_a_few_scenes_calibrate_but_never_accuse(different: int) -> None:
    h, y = domain(different, 3)
    held = calibrate(*copies(h, y, 12, 0), CLASSES, M, seed=0)
    assert len(held.values) == 5 and held.values.min() >= np.float32(-10)
    p, conditional = held.p_values(np.array([1e6], np.float32))
    assert p[0] == pytest.approx(1 / 6) and conditional[0] == 1


EQUAL: dict[str, Callable[[np.random.Generator], NDArray[np.float64]]] = {
    "black": lambda rng: np.zeros((1, 96)),
    "frozen": lambda rng: rng.normal(3, 1, (1, 96)),
    "two frames": lambda rng: rng.normal(3, 1, (2, 96)),
    "constant in most coordinates": lambda rng: np.where(np.arange(96) < 90, 50.0, rng.normal(0, 1, (20, 96))),
    "far from the origin": lambda rng: 1e4 + rng.normal(0, 1e-3, (20, 96)),
}


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("what", EQUAL)
def test_equal_frames_are_no_foreigners_to_themselves_and_others_are(what: str, classes: int) -> None:
    """What is calibrated is what the store gives back: float32 sums."""
    rng = np.random.default_rng(1)
    h = np.tile(EQUAL[what](rng), (40, 1))[:40].astype(np.float32)
    y = np.arange(40) // 2 % classes
    held, known = calibrate(h, y, CLASSES, 64, seed=0), detector(rounded(learn(h, y, CLASSES, 64)))
    assert not known.repaired
    own = held.novelty(known, h)
    assert np.isfinite(own).all() and not (held.p_values(own)[0] <= 0.05).any()
    foreign = held.novelty(known, (h + rng.normal(0, 1e4, h.shape)).astype(np.float32))
    assert np.isfinite(foreign).all() and foreign.min() > own.max()


def test_sums_that_no_samples_have_still_give_a_detector_that_says_so() -> None:
    h, y = domain(40, 2)
    memory = learn(h, y, CLASSES, M)
    assert not detector(memory).repaired
    damaged = detector(replace(memory, gram=memory.gram - 100 * np.eye(M)))
    assert damaged.repaired and np.isfinite(damaged.leverage(h)).all()
    for gram, sums in ((memory.gram * np.nan, memory.class_sums), (memory.gram, memory.class_sums * np.inf)):
        with pytest.raises(DataError, match="NaN or infinity"):
            detector(replace(memory, gram=gram, class_sums=sums))


def test_too_few_samples_or_folds_are_refused() -> None:
    h, y = domain(4, 0)
    with pytest.raises(DataError, match=r"4 samples .* at least 5"):
        calibrate(h, y, CLASSES, M, seed=0)
    with pytest.raises(UsageError, match="folds is 1"):
        calibrate(*domain(10, 0), CLASSES, M, folds=1, seed=0)
    assert len(calibrate(*domain(5, 0), CLASSES, M, folds=9, seed=0).values) == 5


def test_unusable_calibrations_are_refused() -> None:
    good = np.zeros(5, np.float32)
    for values in (good[:4], good * np.nan):
        with pytest.raises(DataError, match="calibration values"):
            calibration(values)
    for delta in (0.0, 1.0):
        with pytest.raises(UsageError, match="delta"):
            calibration(good, delta)


def test_calibration_is_bounded_and_unaliased() -> None:
    h, y = domain(LIMIT + 50, 6)
    before = h.copy()
    assert len(calibrate(h, y, CLASSES, 2, seed=0).values) == LIMIT
    np.testing.assert_array_equal(h, before)
    values = np.arange(5, dtype=np.float32)
    held = calibration(values)
    values[:] = 9
    np.testing.assert_array_equal(held.values, np.arange(5))
