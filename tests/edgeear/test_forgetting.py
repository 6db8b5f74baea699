"""Forgetting on request: what answers afterwards is what never having learned it would answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeear.errors import UsageError
from edgeear.flow import infer, judge
from edgeear.forgetting import RESIDUE, forget_class, forget_domain, without_class, without_samples
from edgeear.incremental import STRENGTHS, readout
from edgeear.memory import I64, DomainMemory, learn, merge, rounded
from edgeear.novelty import detector
from edgeear.router import router
from edgeear.shift import ShiftState
from edgeear.system import Candidate, Domain, Live, Rejected, System, commit
from edgeear.types import F32
from tests.support import fakes

CLASSES = ("cat", "dog", "owl")
M = 8


def population(seed: int, counts: tuple[int, ...], common: bool = False) -> tuple[F32, I64]:
    """Hypervectors of 24 dimensions around a mean for each class; `common`: every class scatters alike."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    mean, spread = rng.normal(size=(len(counts), 24)), rng.uniform(0.2, 1.5, (len(counts), 24))
    noise = rng.normal(size=(len(labels), 24)) * (0.5 if common else spread[labels])
    order = rng.permutation(len(labels))
    return (mean[labels] + noise).astype(np.float32)[order], labels[order].astype(np.int64)


cases = st.tuples(st.integers(0, 2**31), st.tuples(*[st.integers(2, 40)] * 3), st.integers(0, 2), st.booleans())


def answers(memory: DomainMemory, other: DomainMemory, probe: F32, stored: bool) -> list[F32]:
    """Everything that a memory decides: prototypes and distances of its detector, its head, its routes. The choice
    among ridge strengths may turn on the rounding of stored sums, so there it is made beforehand."""
    found, head = detector(memory), readout(memory, [0.1] if stored else STRENGTHS)
    return [found.angle(probe), found.leverage(probe), head.scores(probe), router([memory, other]).scores(probe)]


@settings(deadline=None)
@given(cases)
def test_a_class_whose_samples_are_at_hand_was_never_seen(
    case: tuple[int, tuple[int, int, int], int, bool],
) -> None:
    seed, counts, gone, stored = case
    h, y = population(seed, counts)
    whole = learn(h, y, CLASSES, M)
    memory = without_samples(rounded(whole) if stored else whole, CLASSES[gone], h[y == gone])
    stay = [k for k in range(3) if k != gone]
    never = learn(h[y != gone], np.searchsorted(stay, y[y != gone]), [CLASSES[k] for k in stay], M)
    assert memory.classes == never.classes
    np.testing.assert_array_equal(memory.counts, never.counts)
    np.testing.assert_allclose(memory.covariance, never.covariance, atol=1e-5)
    other = learn(*population(seed + 1, (9, 9, 9)), CLASSES, M)
    probe = population(seed + 2, (5, 5, 5))[0]
    for ours, theirs in zip(answers(memory, other, probe, stored), answers(never, other, probe, stored), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4 if stored else 1e-5, atol=1e-4 if stored else 1e-5)


@settings(deadline=None)
@given(cases)
def test_from_sums_alone_only_the_covariance_within_classes_remembers(
    case: tuple[int, tuple[int, int, int], int, bool],
) -> None:
    seed, counts, gone, _ = case
    h, y = population(seed, counts)
    memory = without_class(learn(h, y, CLASSES, M), CLASSES[gone])
    stay = [k for k in range(3) if k != gone]
    never = learn(h[y != gone], np.searchsorted(stay, y[y != gone]), [CLASSES[k] for k in stay], M)
    assert memory.classes == never.classes
    np.testing.assert_array_equal(memory.counts, never.counts)
    np.testing.assert_allclose(memory.class_sums, never.class_sums)
    np.testing.assert_allclose(memory.mean, never.mean, atol=1e-12)
    # The rest of the Gram matrix is that of scatter shared by all three: it depends on the class by its scatter alone.
    moved = h + np.where(y == gone, 3.0, 0.0).astype(np.float32)[:, None]
    elsewhere = without_class(learn(moved, y, CLASSES, M), CLASSES[gone])
    np.testing.assert_allclose(elsewhere.covariance, memory.covariance, atol=1e-4)
    assert np.linalg.eigvalsh(memory.covariance).min() > -1e-9


def test_classes_that_scatter_alike_are_forgotten_well_without_samples() -> None:
    h, y = population(3, (4000, 4000, 4000), common=True)
    memory = without_class(learn(h, y, CLASSES, M), "owl")
    never = learn(h[y != 2], y[y != 2], CLASSES[:2], M)
    np.testing.assert_allclose(memory.covariance, never.covariance, atol=0.01)
    kept = learn(h, y, CLASSES, M).covariance
    assert np.abs(kept - never.covariance).max() > 0.1  # which no removal at all would leave


def test_other_samples_than_those_learned_are_refused() -> None:
    h, y = population(1, (10, 10, 10))
    memory = learn(h, y, CLASSES, M)
    with pytest.raises(UsageError, match="9 samples of 'dog' given, 10 were learned"):
        without_samples(memory, "dog", h[y == 1][:9])
    with pytest.raises(UsageError, match="of the class's sum"):
        without_samples(memory, "dog", h[y == 2])
    slightly = h[y == 1] * np.float32(1 + RESIDUE / 10)
    assert without_samples(memory, "dog", slightly).classes == ("cat", "owl")


# ------------------------------------------------------------------------------------------------- systems


def seen(background: int, label: str | None = None) -> F32:
    """Hypervectors that `fakes.domain` learned, of one class or all."""
    h = fakes.space().encode(fakes.features(background))
    return h if label is None else h[fakes.labels_of(len(h)) == fakes.CLASSES.index(label)]


def rows_of(domain: Domain) -> I64:
    """Which of the samples that `fakes.domain(1)` learned each kept code is, `(codes,)`."""
    at = {code.tobytes(): i for i, code in enumerate(seen(1)[:, : fakes.M].astype(np.float16))}
    return np.array([at[code.tobytes()] for code in domain.codes], np.int64)


def same(a: System, b: System, backgrounds: tuple[int, ...]) -> None:
    """The two systems answer alike, bit for bit, on fresh frames."""
    engine = fakes.engine()
    for background in backgrounds:
        for frame in fakes.frames(background, fakes.CLASSES, fakes.labels_of(6), 11):
            x, y = (infer(s, engine, ShiftState(), frame)[0] for s in (a, b))
            assert (x.label, x.route, x.novelty, x.p, x.ood) == (y.label, y.route, y.novelty, y.p, y.ood)
            assert x.scores.tobytes() == y.scores.tobytes()


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_system_answers_as_one_that_never_saw_the_domain(gone: int) -> None:
    system = fakes.grown(0, 1, 2)
    candidate = forget_domain(system, f"d{gone}")
    stay = [k for k in (0, 1, 2) if k != gone]
    same(candidate.system, fakes.grown(*stay), (0, 1, 2))
    assert all(candidate.system.domain(f"d{k}") is system.domain(f"d{k}") for k in stay)
    assert candidate.system.generation == system.generation + 1
    assert set(candidate.replay) == {f"d{k}" for k in stay}
    assert commit(Live(system, system), candidate).serving is candidate.system
    assert system.names == ("d0", "d1", "d2")


def test_the_last_domain_can_be_forgotten() -> None:
    candidate = forget_domain(fakes.grown(0), "d0")
    assert candidate.system.domains == () and candidate.replay == {}
    same(candidate.system, fakes.empty(), (0,))


def forgotten(outcome: Candidate | Rejected, system: System) -> Domain:
    assert isinstance(outcome, Candidate), outcome
    assert outcome.base is system
    return outcome.system.domain("d1")


@pytest.mark.parametrize("exact", [True, False])
def test_a_forgotten_class_is_never_answered_again(exact: bool) -> None:
    system = fakes.grown(0, 1)
    domain = forgotten(forget_class(system, "d1", "columns", seen(1, "columns") if exact else None), system)
    assert domain.memory.classes == domain.head.classes == ("rows", "half")
    fresh = fakes.features(1, seed=4)
    h = fakes.space().encode(fresh)
    scores = fakes.engine().scores(domain.head, {**fresh, "hypervector": h[:, : fakes.M]})
    labels = fakes.labels_of(len(h))
    right = np.array(domain.head.classes)[scores.argmax(1)] == np.array(fakes.CLASSES)[labels]
    assert right[labels != 1].mean() > 0.9 and not right[labels == 1].any()
    assert domain.growth["chosen_by"] != system.domain("d1").growth.get("chosen_by")


def test_with_its_samples_at_hand_codes_and_head_are_those_of_never_having_seen_the_class() -> None:
    system = fakes.grown(0, 1)
    domain = forgotten(forget_class(system, "d1", "columns", seen(1, "columns")), system)
    h, y = seen(1), fakes.labels_of(60)
    never = learn(h[y != 1], np.where(y[y != 1] == 2, 1, 0), ("rows", "half"), fakes.M)
    kept = rows_of(system.domain("d1"))
    assert len(set(kept)) == 40 and (y[kept] == 1).any()
    np.testing.assert_array_equal(rows_of(domain), kept[y[kept] != 1])
    fresh = fakes.space().encode(fakes.features(1, seed=4))
    served = fakes.engine().scores(domain.head, {"hypervector": fresh[:, : fakes.M]})
    # Sums are stored as float32; the weak ridge chosen here makes a few 1e-4 of their rounding.
    np.testing.assert_allclose(served, readout(never).scores(fresh), atol=2e-3)


def test_without_samples_the_codes_that_look_like_the_class_go() -> None:
    system = fakes.grown(0, 1)
    domain = forgotten(forget_class(system, "d1", "columns"), system)
    before = rows_of(system.domain("d1"))
    labels, stayed = fakes.labels_of(60)[before], np.isin(before, rows_of(domain))
    assert not stayed[labels == 1].any() and stayed[labels != 1].mean() > 0.9


def test_false_verdicts_stay_bounded_after_a_class_is_forgotten() -> None:
    """Of many samples, as the calibration by few may be unlucky with or without the class; then against before."""
    fresh = fakes.space().encode(fakes.features(1, n=240, seed=6, classes=("rows", "half")))
    for n, most in ((240, 0.05), (60, 1.0)):
        system = fakes.grown(0).grown(fakes.domain(1, n=n))
        gone = fakes.space().encode(fakes.features(1, n))[fakes.labels_of(n) == 1]
        outcome = forget_class(system, "d1", "columns", gone)
        assert isinstance(outcome, Candidate)
        before, after = (judge(s, fresh).ood.mean() for s in (system, outcome.system))
        assert after <= min(before + 0.02, system.policy.alpha + most)


def test_the_only_class_takes_its_domain_along() -> None:
    alone = replace(fakes.domain(1), memory=learn(seen(1), np.zeros(60, np.int64), ("rows",), fakes.M))
    system = fakes.grown(0).grown(alone)
    outcome = forget_class(system, "d1", "rows")
    assert isinstance(outcome, Candidate) and outcome.system.names == ("d0",)


def test_where_nothing_to_serve_with_is_left_the_class_is_not_forgotten() -> None:
    few = replace(fakes.domain(1), codes=seen(1, "columns")[:5, : fakes.M].astype(np.float16))
    outcome = forget_class(fakes.grown(0).grown(few), "d1", "columns", seen(1, "columns"))
    assert isinstance(outcome, Rejected) and "0 codes are left: forget the whole domain" in outcome.reasons[0]


def test_unknown_names_are_refused_with_those_there_are() -> None:
    system = fakes.grown(0, 1)
    with pytest.raises(UsageError, match="'d7'; learned so far: d0, d1"):
        forget_domain(system, "d7")
    with pytest.raises(UsageError, match="'d7'; learned so far: d0, d1"):
        forget_class(system, "d7", "rows")
    with pytest.raises(UsageError, match="no class 'bird': it knows rows, columns, half"):
        forget_class(system, "d1", "bird")


# ----------------------------------------------------------------------------------------- between devices


@settings(deadline=None)
@given(cases)
def test_two_devices_memories_add_up_to_what_one_would_have_learned(
    case: tuple[int, tuple[int, int, int], int, bool],
) -> None:
    seed, counts, _, stored = case
    h, y = population(seed, counts)
    first = np.random.default_rng(seed).random(len(h)) < 0.5
    parts = [learn(h[s], y[s], CLASSES, M) for s in (first, ~first)]
    a, b = (rounded(p) if stored else p for p in parts)
    both, one = merge(a, b), learn(h, y, CLASSES, M)
    np.testing.assert_array_equal(both.counts, one.counts)
    np.testing.assert_allclose(both.mean, one.mean, atol=1e-5)
    np.testing.assert_allclose(both.covariance, one.covariance, atol=1e-5)
    np.testing.assert_allclose(both.prototypes, one.prototypes, atol=1e-5)
    probe = population(seed + 2, (5, 5, 5))[0]
    for ours, theirs in zip(answers(both, a, probe, stored), answers(one, a, probe, stored), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4 if stored else 1e-5, atol=1e-4 if stored else 1e-5)
