"""The figures of a window: a fair sample in bounded memory, and always a message; the readings of the machine."""

from __future__ import annotations

import math
import mmap
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.daemon import machine
from device.daemon.machine import CpuShare
from device.daemon.telemetry import KEPT, Reservoir, Window
from device.mqtt import messages
from edgeear.flow import Prediction

REST: dict[str, Any] = dict(
    session="0123456789abcdef", boot=1, seq=1, time=1.0, from_time=0.0, to_time=1.0, dropped=0, stale=0,
    undecodable=0, phase="serving", generation=1, temperature_c=None, rss_mb=1.0, cpu_share=0.1,
    outbox={"depth": 0, "bytes": 0, "oldest_s": None}, refused_messages=0,
)  # fmt: skip
"""What a window does not know of a telemetry message."""


def prediction(novelty: float = 0.5, route: str | None = "day", ood: bool = False) -> Prediction:
    return Prediction(None, np.zeros(0, np.float32), route, novelty, 0.5, ood)


def window(seed: int = 0) -> Window:
    return Window(0.0, random.Random(seed))


def told(filled: Window) -> messages.Telemetry:
    facts: dict[str, Any] = {**REST, **filled.facts()}
    return messages.Telemetry(**facts)


def test_every_value_is_as_likely_to_be_kept_as_any_other() -> None:
    offered, rounds, tenths = 4 * KEPT, 25, np.zeros(10)
    for seed in range(rounds):
        reservoir = Reservoir(random.Random(seed))
        for value in range(offered):
            reservoir.add(value)
        tenths += np.histogram(reservoir.values, bins=10, range=(0, offered))[0]
    expected = rounds * KEPT / 10
    chi = ((tenths - expected) ** 2 / expected).sum()
    assert chi < 27.9  # the 99.9 % quantile of chi squared with 9 degrees of freedom
    assert tenths.sum() == rounds * KEPT


@given(st.lists(st.floats(), max_size=50), st.integers(0, 3 * KEPT))
def test_a_reservoir_never_holds_more_than_it_may_nor_what_is_no_number(values: list[float], more: int) -> None:
    reservoir = Reservoir(random.Random(1))
    for value in [*values, *range(more)]:
        reservoir.add(value)
    finite = sum(math.isfinite(value) for value in values) + more
    assert reservoir.seen == finite and len(reservoir.values) == min(finite, 4096)
    assert all(math.isfinite(value) for value in reservoir.values)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=300))
def test_quantiles_are_values_that_occurred_in_order(values: list[float]) -> None:
    reservoir = Reservoir(random.Random(1))
    for value in values:
        reservoir.add(value)
    found = reservoir.quantiles()
    assert found is not None and set(found.values()) <= set(values)
    assert found["p50"] <= found["p90"] <= found["p99"]
    assert sum(value <= found["p90"] for value in values) >= 0.9 * len(values)


def test_quantiles_of_a_known_sample() -> None:
    reservoir = Reservoir(random.Random(1))
    for value in random.Random(2).sample(range(1, 101), 100):
        reservoir.add(value)
    assert reservoir.quantiles() == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert Reservoir(random.Random(1)).quantiles() is None


predictions = st.builds(
    prediction, st.floats(), st.none() | st.text("abcäß雪 -", min_size=1, max_size=40), ood=st.booleans()
)


@given(st.lists(st.tuples(predictions, st.floats(0, 1e300)), max_size=40))
def test_any_window_is_a_telemetry_message(seen: list[tuple[Prediction, float]]) -> None:
    filled = window()
    for answer, seconds in seen:
        filled.add(answer, seconds)
    message = told(filled)
    assert messages.parse(messages.Telemetry, message.payload()) == message
    assert message.frames == len(seen) == message.abstained + sum(message.routes.values())
    assert message.ood == sum(answer.ood for answer, _ in seen)


def test_before_anything_is_learned_there_is_no_novelty() -> None:
    filled = window()
    filled.add(prediction(math.inf, None, True), 0.01)
    facts = filled.facts()
    assert facts["novelty"] is None and facts["latency_ms"] == {"p50": 10.0, "p90": 10.0, "p99": 10.0}


def test_more_routes_than_a_message_holds_leave_the_most_frequent() -> None:
    filled = window()
    for number in range(256 + 20):
        for _ in range(2 if number >= 20 else 1):
            filled.add(prediction(route=f"d{number}"), 0.01)
    message = told(filled)
    assert set(message.routes) == {f"d{number}" for number in range(20, 256 + 20)}


@pytest.mark.parametrize(
    ("readings", "hottest"),
    [
        ([], None),
        (["41000\n", "65500\n"], 65.5),
        (["-274000\n", "41000\n"], 41.0),
        (["2147483647\n"], None),
        (["nonsense", "\xff", "30000"], 30.0),
    ],
)
def test_the_hottest_sensor_that_does_not_rave(tmp_path: Path, readings: list[str], hottest: float | None) -> None:
    for number, text in enumerate(readings):
        zone = tmp_path / f"thermal_zone{number}"
        zone.mkdir()
        (zone / "temp").write_bytes(text.encode("latin-1"))
    (tmp_path / "thermal_zone99").mkdir()  # without a reading
    assert machine.temperature_c(tmp_path) == hottest


def test_no_thermal_zones_at_all(tmp_path: Path) -> None:
    assert machine.temperature_c(tmp_path / "none") is None


def test_resident_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    statm = tmp_path / "statm"
    statm.write_text("9999 512 1 1 0 1 0\n")
    assert machine.rss_mb(statm) == 512 * mmap.PAGESIZE / 2**20
    assert 1 < machine.rss_mb() < 100_000


@pytest.mark.parametrize("text", [None, "", "1", "a b c"])
def test_resident_memory_without_proc_is_the_most_it_ever_was(tmp_path: Path, text: str | None) -> None:
    statm = tmp_path / "statm"
    if text is not None:
        statm.write_text(text)
    assert machine.rss_mb(statm) > 1


def test_the_share_of_a_core_is_that_since_the_last_question(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"monotonic": 100.0, "process_time": 5.0}
    for name in clock:
        monkeypatch.setattr(time, name, lambda name=name: clock[name])
    share = CpuShare()
    clock.update(monotonic=110.0, process_time=7.5)
    assert share.read() == 0.25
    clock.update(monotonic=112.0, process_time=7.5)
    assert share.read() == 0.0
    assert share.read() == 0.0  # no time passed
