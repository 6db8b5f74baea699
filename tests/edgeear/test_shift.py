"""The sequential test: few false alarms, short delays, and evidence that behaves."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeear.errors import UsageError
from edgeear.shift import LEVELS, Shift, ShiftPolicy, ShiftState, log_bets, log_e_value, observe
from edgeear.types import F32

POLICY = ShiftPolicy()
p_values = st.floats(0, 1, exclude_min=True)


def first_shift(ps: np.ndarray, policy: ShiftPolicy = POLICY) -> Shift | None:
    state = ShiftState()
    for p in ps.tolist():
        state, shift = observe(state, p, policy)
        if shift is not None:
            return shift
    return None


def alarms(ps: np.ndarray, codes: F32 | None = None, policy: ShiftPolicy = POLICY) -> int:
    """Shifts in a stream that is restarted at each."""
    state, count = ShiftState(), 0
    for i, p in enumerate(ps.tolist()):
        state, shift = observe(state, p, policy, None if codes is None else codes[i])
        if shift is not None:
            state, count = state.restart(), count + 1
    return count


def scenes(count: int, frames: int, seed: int, noise: float = 0.1) -> F32:
    """Hypervectors `(count * frames, 64)`: a random direction each, its frames noisy copies (cosine 0.99)."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(size=(count, 64)), frames, axis=0)
    return (centres + noise * rng.normal(size=centres.shape)).astype(np.float32)


def test_no_false_alarm_in_a_long_quiet_stream() -> None:
    assert first_shift(1 - np.random.default_rng(0).random(100_000)) is None


def test_time_between_false_alarms_is_at_least_one_over_the_rate() -> None:
    policy = ShiftPolicy(false_alarm_rate=0.02, floor=5)
    assert 1 < alarms(1 - np.random.default_rng(1).random(50_000), policy=policy) <= 1000


def test_a_shift_is_declared_soon_and_its_onset_found() -> None:
    rng = np.random.default_rng(2)
    quiet, shifted = 1 - rng.random(1000), np.maximum(rng.beta(0.2, 1, 200), 1e-9)
    shift = first_shift(np.concatenate([quiet, shifted]))
    assert shift is not None
    assert 1000 < shift.at <= 1060
    assert abs(shift.onset - 1000) <= 20
    assert shift.evidence >= math.log(1e6)


@pytest.mark.parametrize(("level", "most"), [(1 / 64, 8), (1 / 8, 16), (1 / 2, 35)])
def test_p_values_that_are_never_extreme_are_evidence_enough(level: float, most: int) -> None:
    """A small calibration set vouches for no small level: at 1/2 twenty coin flips are a million to one."""
    shift = first_shift(np.full(200, level))
    assert shift is not None and math.log(1e6) / math.log(1 / level) < shift.at <= most


def test_every_bet_has_mean_one_when_levels_are_exact() -> None:
    """Uniform p is the worst case that rule 1 admits: P(p <= level) = level everywhere."""
    edges = [0.0, *LEVELS, 1.0]
    e = np.exp([log_bets((a + b) / 2, POLICY) for a, b in pairwise(edges)])
    np.testing.assert_allclose(np.diff(edges) @ e, np.ones(len(LEVELS) * len(POLICY.stakes)), rtol=1e-12)


def test_levels_survive_single_precision() -> None:
    assert tuple(np.array(LEVELS, np.float32).tolist()) == LEVELS == tuple(sorted(LEVELS))


def test_one_step_by_hand() -> None:
    policy = ShiftPolicy(stakes=(0.5,))
    before = tuple(math.log(1 + s) for s in (0.0, 2.0, 0.0, 0.0, 0.0, 5.0))
    state, shift = observe(ShiftState(before, 4, 1), 0.2, policy)
    assert shift is None
    e = [0.5, 0.5, 0.5, 0.5 + 0.5 * 4, 0.5 + 0.5 * 8 / 3, 0.5 + 0.5 * 2]
    assert state.evidence == pytest.approx(
        [math.log(1 + (1 + s) * x) for s, x in zip((0, 2, 0, 0, 0, 5), e, strict=True)]
    )
    assert (state.samples, state.onset) == (5, 5)  # the mean of S is below the floor
    assert log_e_value(0.2, policy) == pytest.approx(math.log(np.mean(e)))


@given(st.floats(0, 1e6), p_values, p_values)
def test_evidence_falls_as_p_rises(evidence: float, p: float, q: float) -> None:
    state = ShiftState((evidence,) * (len(LEVELS) * 2), 3, 1)
    low, _ = observe(state, min(p, q), POLICY)
    high, _ = observe(state, max(p, q), POLICY)
    for a, b in zip(low.evidence, high.evidence, strict=True):
        assert a >= b and a >= 0 and math.isfinite(a)


@given(st.lists(p_values, max_size=50))
def test_observing_is_pure(ps: list[float]) -> None:
    state, codes = ShiftState(), scenes(50, 1, seed=9)
    for p, code in zip(ps, codes, strict=False):
        before = ShiftState(state.evidence, state.samples, state.onset)
        first, again = observe(state, p, POLICY, code), observe(state, p, POLICY, code)
        assert first == again and state == before
        state = first[0]
    assert state.samples == len(ps)
    np.testing.assert_array_equal(codes, scenes(50, 1, seed=9))


def test_nothing_overflows_and_a_shift_repeats_until_restarted() -> None:
    state, shift = ShiftState(), None
    for _ in range(5000):
        state, shift = observe(state, 5e-324, POLICY)
    assert all(map(math.isfinite, state.evidence))
    assert shift is not None and shift.at == 5000 and shift.onset == 0
    assert state.restart() == ShiftState((), 5000, 5000)


# ----------------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("frames", [5, 50])
def test_bursts_of_one_scene_fire_no_false_alarm(frames: int) -> None:
    """One strange frame in a hundred is normal; fifty copies of it must not become fifty witnesses."""
    p = np.repeat(1 - np.random.default_rng(3).random(1000), frames)
    assert alarms(p) > 3
    assert alarms(p, scenes(1000, frames, seed=3)) == 0


def test_false_alarms_are_bounded_by_scenes_however_many_frames_show_each() -> None:
    policy, rng = ShiftPolicy(false_alarm_rate=0.02, floor=5), np.random.default_rng(4)
    p = np.repeat(1 - rng.random(5000), 7)
    assert 1 < alarms(p, scenes(5000, 7, seed=4), policy) <= 100


def test_one_foreign_scene_is_no_shift_however_long_it_is_stared_at() -> None:
    assert alarms(np.full(3600, 1 / 64), scenes(1, 3600, seed=5)) == 0
    to_and_fro = np.tile(scenes(POLICY.scenes, 1, seed=5), (200, 1))
    assert alarms(np.full(len(to_and_fro), 1 / 8), to_and_fro) == 0


@pytest.mark.parametrize("frames", [1, 10])
def test_a_shift_in_bursts_is_declared_after_as_many_scenes_as_without(frames: int) -> None:
    p = 1 / 8 * np.ones(30)
    alone = first_shift(p)
    state, codes = ShiftState(), scenes(30, frames, seed=6)
    for code in codes:
        state, shift = observe(state, 1 / 8, POLICY, code)
        if shift is not None:
            break
    assert alone is not None and shift is not None
    assert shift.at == (alone.at - 1) * frames + 1


@given(st.lists(st.tuples(st.integers(0, 9), p_values), min_size=1, max_size=40))
def test_repeated_frames_count_but_change_no_evidence(stream: list[tuple[int, float]]) -> None:
    """The state after any stream is that of its frames that began a scene; at most `scenes` are kept."""
    directions, policy = np.eye(10, dtype=np.float32), ShiftPolicy(scenes=3)
    state, plain, recent = ShiftState(), ShiftState(), list[int]()
    for k, p in stream:
        state, _ = observe(state, p, policy, directions[k])
        if k not in recent:
            plain, _ = observe(plain, p, policy)
            recent = [*recent, k][-3:]
        assert state.evidence == plain.evidence
        assert [int(s.argmax()) for s in state.scenes] == recent
    assert state.samples == len(stream)


def test_domains_whose_frames_look_alike_raise_the_bound() -> None:
    code, near = np.array([1, 0], np.float32), np.array([0.98, 0.199], np.float32)
    state, _ = observe(ShiftState(), 1 / 64, POLICY, code)
    assert observe(state, 1 / 64, POLICY, near)[0].evidence == state.evidence
    assert observe(state, 1 / 64, POLICY, near, alike=0.99)[0].evidence > state.evidence
    assert observe(state, 1 / 64, POLICY, near, alike=0.5)[0].evidence == state.evidence
    alone = ShiftPolicy(scenes=0)
    assert observe(ShiftState(), 1 / 64, alone, code)[0].scenes == ()


def test_a_restart_forgets_evidence_and_keeps_the_scenes() -> None:
    code = np.ones(4, np.float32)
    state, _ = observe(ShiftState(), 1 / 64, POLICY, code)
    again, _ = observe(state.restart(), 1 / 64, POLICY, code)
    assert again.evidence == () and len(again.scenes) == 1


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("p", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_other_p_values_are_refused(p: float) -> None:
    with pytest.raises(UsageError, match="p-value"):
        observe(ShiftState(), p, POLICY)
    seen, _ = observe(ShiftState(), 1.0, POLICY, np.ones(4, np.float32))
    with pytest.raises(UsageError, match="p-value"):
        observe(seen, p, POLICY, np.ones(4, np.float32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"false_alarm_rate": 0.0},
        {"false_alarm_rate": 1.0},
        {"stakes": ()},
        {"stakes": (1.0,)},
        {"false_alarm_rate": 0.1, "floor": 10},
        {"floor": 0},
        {"alike": 0},
        {"alike": 1.1},
        {"scenes": -1},
    ],
)
def test_unusable_policies_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ShiftPolicy(**wrong)  # type: ignore[arg-type]
