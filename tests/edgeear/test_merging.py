"""Two domains made one: memories add up, verdicts stay valid, and the door is the same for all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeear.errors import UsageError
from edgeear.flow import judge
from edgeear.incremental import readout
from edgeear.memory import learn, merge, rounded
from edgeear.merging import merge_calibrations, merge_domains
from edgeear.novelty import Calibration, calibrate
from edgeear.system import Candidate, Domain, Live, Rejected, System, commit
from edgeear.types import F32
from tests.support import fakes


def twin(seed: int = 9, n: int = 60, name: str = "twin", classes: tuple[str, ...] = fakes.CLASSES) -> Domain:
    """Domain 1 grown a second time, from other frames."""
    h = fakes.space().encode(fakes.features(1, n, seed, classes))
    labels = fakes.labels_of(n, len(classes))
    memory = rounded(learn(h, labels, classes, fakes.M))
    calibration = calibrate(h, labels, classes, fakes.M, seed=1)
    head = replace(fakes.domain(1).head, classes=classes)
    return Domain(name, head, memory, calibration, h[:40, : fakes.M].astype(np.float16), {"explanation": "twin"})


def twins(**changed: object) -> System:
    """Domains 0, 1 and its twin; admission would not have let it in."""
    return fakes.grown(0, 1).grown(replace(twin(), **changed))  # type: ignore[arg-type]


def merged(system: System, outcome: Candidate | Rejected) -> Domain:
    assert isinstance(outcome, Candidate), outcome
    assert outcome.base is system and outcome.system.names == ("d0", "d1")
    assert outcome.system.generation == system.generation + 1
    return outcome.system.domain("d1")


def test_twins_become_one_domain_that_serves_both() -> None:
    system = twins()
    outcome = merge_domains(system, "d1", "twin")
    domain = merged(system, outcome)
    assert isinstance(outcome, Candidate) and set(outcome.replay) == {"d0", "d1", "twin"}
    assert max(outcome.replay.values()) <= system.policy.max_stolen_share
    assert commit(Live(system, system), outcome).serving is outcome.system
    assert outcome.system.domains[0] is system.domains[0]
    both = merge(system.domain("d1").memory, system.domain("twin").memory)
    np.testing.assert_allclose(domain.memory.gram, both.gram, rtol=1e-6, atol=1e-6)
    assert domain.memory.n == 120 and len(domain.codes) == system.policy.codes
    fresh = fakes.space().encode(fakes.features(1, n=240, seed=21))
    verdict = judge(outcome.system, fresh)
    assert (verdict.route == 1).mean() > 0.95 and verdict.ood.mean() <= system.policy.alpha + 0.03


def test_a_head_is_refitted_unless_one_is_asked_for() -> None:
    system = twins()
    domain = merged(system, merge_domains(system, "d1", "twin"))
    fresh = fakes.space().encode(fakes.features(1, n=90, seed=5))
    served = fakes.engine().scores(domain.head, {"hypervector": fresh[:, : fakes.M]})
    np.testing.assert_allclose(served, readout(domain.memory).scores(fresh), atol=1e-4)
    assert (served.argmax(1) == fakes.labels_of(90)).mean() > 0.95
    assert merged(system, merge_domains(system, "d1", "twin", "first")).head is system.domain("d1").head
    assert merged(system, merge_domains(system, "d1", "twin", "second")).head is system.domain("twin").head


def test_classes_that_only_one_knows_make_a_new_head() -> None:
    system = fakes.grown(0, 1).grown(twin(classes=("rows", "checks")))
    domain = merged(system, merge_domains(system, "d1", "twin"))
    assert domain.head.classes == ("rows", "columns", "half", "checks")
    fresh = fakes.space().encode(fakes.features(1, n=80, seed=5, classes=domain.head.classes))
    served = fakes.engine().scores(domain.head, {"hypervector": fresh[:, : fakes.M]})
    np.testing.assert_allclose(served, readout(domain.memory).scores(fresh), atol=1e-4)
    assert (served.argmax(1) == fakes.labels_of(80, 4)).mean() > 0.9
    outcome = merge_domains(system, "d1", "twin", "first")
    assert isinstance(outcome, Rejected) and "'d1' does not know checks: refit one" in outcome.reasons[0]


def test_a_merger_that_robs_a_third_domain_is_rejected() -> None:
    system = fakes.grown(0, 1).grown(replace(fakes.domain(0, "again", 120)))
    outcome = merge_domains(system, "d1", "again")
    assert isinstance(outcome, Rejected) and any("of the inputs of" in reason for reason in outcome.reasons)


def test_a_domain_is_not_merged_with_itself_or_with_nothing() -> None:
    with pytest.raises(UsageError, match="with itself"):
        merge_domains(fakes.grown(0, 1), "d1", "d1")
    with pytest.raises(UsageError, match="'d5'; learned so far: d0, d1"):
        merge_domains(fakes.grown(0, 1), "d1", "d5")


# --------------------------------------------------------------------------------------------- calibration

scales = st.tuples(st.floats(-3, 3), st.floats(0.1, 3), st.floats(-3, 3), st.floats(0.1, 3))


def scored(seed: int, n: int, scale: tuple[float, float, float, float]) -> tuple[F32, F32, Calibration]:
    """Raw statistics of `n` samples `(n,)` each, and their calibration in units of `scale`."""
    angle, leverage = np.random.default_rng(seed).normal(size=(2, n)).astype(np.float32)
    units = Calibration(*scale, np.zeros(5, np.float32))
    return angle, leverage, Calibration(*scale, units.combine(angle, leverage))


@given(st.integers(0, 2**31), st.integers(5, 40), st.integers(5, 40), scales, scales)
def test_no_p_value_of_the_merger_is_smaller_than_scoring_all_samples_anew(
    seed: int,
    n: int,
    k: int,
    first: tuple[float, float, float, float],
    second: tuple[float, float, float, float],
) -> None:
    (angle_a, leverage_a, a), (angle_b, leverage_b, b) = scored(seed, n, first), scored(seed + 1, k, second)
    both = merge_calibrations(a, b)
    anew = both.combine(np.concatenate([angle_a, angle_b]), np.concatenate([leverage_a, leverage_b]))
    assert len(both.values) == n + k
    assert (both.values >= np.sort(anew) - 1e-4).all()
    swapped = merge_calibrations(b, a)
    np.testing.assert_allclose(swapped.values, both.values, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**31), st.integers(5, 40), scales)
def test_in_equal_units_values_are_only_put_together(
    seed: int, n: int, scale: tuple[float, float, float, float]
) -> None:
    a, b = scored(seed, n, scale)[2], scored(seed + 1, n, scale)[2]
    together = np.sort(np.concatenate([a.values, b.values]))
    np.testing.assert_allclose(merge_calibrations(a, b).values, together, rtol=1e-3, atol=1e-3)
