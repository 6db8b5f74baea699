"""The sequential test: few false alarms, short delays, and evidence that behaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeear.errors import UsageError
from edgeear.shift import Shift, ShiftPolicy, ShiftState, log_e_value, observe

POLICY = ShiftPolicy()
p_values = st.floats(0, 1, exclude_min=True)


def first_shift(ps: np.ndarray, policy: ShiftPolicy = POLICY) -> Shift | None:
    state = ShiftState()
    for p in ps.tolist():
        state, shift = observe(state, p, policy)
        if shift is not None:
            return shift
    return None


def test_no_false_alarm_in_a_long_quiet_stream() -> None:
    assert first_shift(1 - np.random.default_rng(0).random(200_000)) is None


def test_time_between_false_alarms_is_at_least_one_over_the_rate() -> None:
    policy, rng, state, alarms = ShiftPolicy(false_alarm_rate=0.01), np.random.default_rng(1), ShiftState(), 0
    for p in (1 - rng.random(50_000)).tolist():
        state, shift = observe(state, p, policy)
        if shift is not None:
            state, alarms = state.restart(), alarms + 1
    assert 1 < alarms <= 500


def test_a_shift_is_declared_soon_and_its_onset_found() -> None:
    rng = np.random.default_rng(2)
    quiet, shifted = 1 - rng.random(1000), np.maximum(rng.beta(0.2, 1, 200), 1e-9)
    shift = first_shift(np.concatenate([quiet, shifted]))
    assert shift is not None
    assert 1000 < shift.at <= 1060
    assert abs(shift.onset - 1000) <= 15
    assert shift.evidence >= math.log(1e6)


def test_e_values_have_mean_one_under_uniform_p() -> None:
    edges, policy = np.linspace(-60, 0, 20_001), ShiftPolicy(exponents=(0.25, 0.5))
    p = np.exp((edges[1:] + edges[:-1]) / 2)
    e = np.array([math.exp(log_e_value(x, policy)) for x in p.tolist()])
    assert float((e * np.diff(np.exp(edges))).sum()) == pytest.approx(1, abs=1e-3)


def test_one_step_by_hand() -> None:
    e = (0.25 * 0.01**-0.75 + 0.5 * 0.01**-0.5) / 2
    state, shift = observe(ShiftState(math.log(1 + 2.0), 4, 1), 0.01, ShiftPolicy(exponents=(0.25, 0.5)))
    assert shift is None
    assert state.evidence == pytest.approx(math.log(1 + 3 * e))
    assert (state.samples, state.onset) == (5, 1)
    quiet, _ = observe(ShiftState(0.0, 4, 1), 0.9, POLICY)
    assert quiet.onset == 5


@given(st.floats(0, 1e6), p_values, p_values)
def test_evidence_falls_as_p_rises(evidence: float, p: float, q: float) -> None:
    state = ShiftState(evidence, 3, 1)
    low, _ = observe(state, min(p, q), POLICY)
    high, _ = observe(state, max(p, q), POLICY)
    assert low.evidence >= high.evidence - 1e-9 * (1 + evidence)
    assert low.evidence >= 0 and math.isfinite(low.evidence)


@given(st.lists(p_values, max_size=50))
def test_observing_is_pure(ps: list[float]) -> None:
    state = ShiftState()
    for p in ps:
        before = ShiftState(state.evidence, state.samples, state.onset)
        first, again = observe(state, p, POLICY), observe(state, p, POLICY)
        assert first == again and state == before
        state = first[0]
    assert state.samples == len(ps)


def test_nothing_overflows_and_a_shift_repeats_until_restarted() -> None:
    state, shift = ShiftState(), None
    for _ in range(5000):
        state, shift = observe(state, 5e-324, POLICY)
    assert math.isfinite(state.evidence)
    assert shift is not None and shift.at == 5000 and shift.onset == 0
    assert state.restart() == ShiftState(0.0, 5000, 5000)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_other_p_values_are_refused(p: float) -> None:
    with pytest.raises(UsageError, match="p-value"):
        observe(ShiftState(), p, POLICY)


@pytest.mark.parametrize(
    ("rate", "exponents", "floor"),
    [
        (0.0, (0.5,), 10),
        (1.0, (0.5,), 10),
        (0.1, (), 5),
        (0.1, (1.0,), 5),
        (0.1, (0.5,), 10),
        (0.1, (0.5,), 0),
    ],
)
def test_unusable_policies_are_refused(rate: float, exponents: tuple[float, ...], floor: float) -> None:
    with pytest.raises(UsageError):
        ShiftPolicy(rate, exponents, floor)
