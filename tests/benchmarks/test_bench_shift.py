"""The shift benchmark measures what it says: its fast test equals the core's, its delays and streams are right."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.shift import video
from benchmarks.shift.bounds import count_alarms
from benchmarks.shift.streams import BURST, FRAMES, Stream, bursts, joined, measured, ramp
from edgeear.shift import ShiftPolicy, ShiftState, observe


def frames(n: int, foreign: bool = False) -> Stream:
    number = np.arange(n, dtype=np.float32)
    return Stream(number, np.full(n, 0.5, np.float32), number[:, None], np.full(n, foreign))


def test_counting_on_arrays_equals_observing_one_by_one() -> None:
    policy, p = ShiftPolicy(false_alarm_rate=0.01), np.random.default_rng(0).beta(0.6, 1, (4, 400)) + 1e-9
    expected = []
    for row in p:
        state, count = ShiftState(), 0
        for value in row.tolist():
            state, shift = observe(state, value, policy)
            if shift is not None:
                state, count = state.restart(), count + 1
        expected.append(count)
    assert min(expected) > 0
    np.testing.assert_array_equal(count_alarms(p, policy), expected)


def test_delays_misses_and_false_alarms_are_counted_by_episode() -> None:
    stream = joined(frames(100), frames(50, True), frames(100), frames(50, True))
    found = measured(stream, iter([20, 104, 130, 160, 299]))
    assert found == {"false_per_10k": 100.0, "delay": (5 + 50) / 2, "missed": 0.0}
    assert measured(stream, iter([104]))["missed"] == 0.5
    assert np.isnan(measured(stream, iter(()))["delay"])
    assert measured(frames(10), iter(range(10))) == {"false_per_10k": 10_000.0}
    assert measured(stream, iter([40, 60]), began=50) == {"false_per_10k": 200.0, "delay": 11.0, "missed": 0.0}


def test_a_ramp_rises_and_a_burst_stays_with_its_image() -> None:
    rng = np.random.default_rng(1)
    mixed = ramp(frames(400), frames(400, True), 400, rng)
    assert len(mixed) == 400 and mixed.foreign[:100].mean() < 0.25 < 0.75 < mixed.foreign[300:].mean()
    shown = bursts(frames(FRAMES * 1000), 3000, rng).novelty // FRAMES
    lengths = np.diff(np.flatnonzero(np.diff(shown, prepend=-1, append=-1)))
    assert len(shown) >= 3000 and lengths.min() >= BURST[0] and np.median(lengths) < BURST[1]


@pytest.mark.parametrize("rate", [1e-2, 1e-3])
def test_false_alarms_stay_below_the_bound_in_the_worst_case(rate: float) -> None:
    p = 1 - np.random.default_rng(2).random((100, 5000))
    alarms = count_alarms(p, ShiftPolicy(false_alarm_rate=rate)).sum()
    assert 0.2 < alarms / (rate * p.size) <= 1


def film(stills: int, seed: int, shift: float = 0.0) -> video.Film:
    """Hypervectors of stills of two classes and of their frames, which differ little."""
    rng = np.random.default_rng(seed)
    labels = np.arange(stills) % 2
    h = rng.normal(shift, 0.3, (stills, 1, 600)) + 2 * np.eye(600)[labels][:, None]
    return video.Film((h + rng.normal(0, 0.01, (stills, video.FRAMES, 600))).astype(np.float32), {}, labels)


@pytest.mark.parametrize(("scenes", "times"), video.LABELS)
def test_video_is_calibrated_by_scenes(scenes: int, times: int) -> None:
    row = video._calibrated(film(400, 0), {"moved": film(100, 1, shift=0.3)}, scenes, times, seeds=3)
    assert row["counted"] == [scenes] * 3 and row["alarms"] == [0] * 3
    assert row["false_ood_mean"] == np.mean(row["false_ood"]) < 0.1
    assert all(delay is not None and delay <= 30 for delay in row["delay_moved"])


def test_a_jittered_frame_is_a_near_copy_of_another_size_never() -> None:
    frame = np.random.default_rng(0).integers(100, 120, (32, 24, 3), dtype=np.uint8)
    seen = [video.jittered(frame, np.random.default_rng(k)) for k in range(8)]
    assert all(one.shape == frame.shape and one.dtype == np.uint8 for one in seen)
    assert 0 < max(abs(float(one.mean()) - float(frame.mean())) for one in seen) < 8
