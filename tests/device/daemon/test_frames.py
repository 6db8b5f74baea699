"""The frame queue: bounds, staleness, and that no frame is lost uncounted, from one thread and from many."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from device.daemon.frames import Frame, FrameCounts, FrameQueue
from edgeear.errors import UsageError
from edgeear.types import U8

PIXELS: U8 = np.zeros((2, 2, 3), np.uint8)


class AgainstAList(RuleBasedStateMachine):
    """The queue does what a list with the rules written out does."""

    @initialize(limit=st.integers(1, 4))
    def make(self, limit: int) -> None:
        self.limit, self.queue = limit, FrameQueue(limit)
        self.model: list[tuple[float, str]] = []
        self.received = self.served = self.dropped = self.stale = self.undecodable = 0
        self.closed = False

    @rule(captured=st.floats(-10, 10) | st.just(float("nan")))
    def put(self, captured: float) -> None:
        ref = str(self.received)
        assert self.queue.put(PIXELS, captured, ref) is not self.closed
        if not self.closed:
            self.received += 1
            self.model.append((captured, ref))
            if len(self.model) > self.limit:
                del self.model[0]
                self.dropped += 1

    @rule(now=st.floats(-10, 10), age=st.floats(0.1, 5))
    def get(self, now: float, age: float) -> None:
        expected = None
        while self.model and expected is None:
            captured, ref = self.model.pop(0)
            if now - captured <= age:
                expected, self.served = ref, self.served + 1
            else:
                self.stale += 1
        frame = self.queue.get(now, age)
        assert (frame.ref if frame else None) == expected

    @rule()
    def fail_to_decode(self) -> None:
        self.undecodable += 1
        self.queue.undecodable()

    @rule(stale=st.booleans())
    def pass_over(self, stale: bool) -> None:
        self.received += 1
        self.stale += stale
        self.dropped += not stale
        self.queue.passed_over(stale=stale)

    @rule()
    def close(self) -> None:
        self.closed = True
        self.queue.close()

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.wait(0) is bool(self.model)
            assert self.queue.room(0) is (len(self.model) < self.limit)
            assert self.queue.closed is self.closed
            assert self.queue.counts == FrameCounts(
                self.received, self.served, self.dropped, self.stale, self.undecodable, len(self.model)
            )


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=40, stateful_step_count=30)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0, 100), st.floats(0, 10))
def test_what_comes_out_is_fresh_and_in_order(times: list[float], now: float, age: float) -> None:
    queue = FrameQueue(len(times))
    for number, captured in enumerate(times):
        queue.put(PIXELS, captured, str(number))
    out: list[Frame] = []
    while (frame := queue.get(now, age)) is not None:
        out.append(frame)
    assert [frame.ref for frame in out] == [str(n) for n, captured in enumerate(times) if now - captured <= age]


def test_a_frame_of_no_age_is_stale() -> None:
    queue = FrameQueue(1)
    queue.put(PIXELS, float("nan"), "a")
    assert queue.get(0.0, 1e9) is None and queue.counts.stale == 1


@pytest.mark.parametrize("limit", [0, -1])
def test_an_empty_bound_is_refused(limit: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        FrameQueue(limit)


def joined(*work: Callable[[], None]) -> None:
    """Run all at once; fails where one does not end."""
    threads = [threading.Thread(target=one, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("limit", [1, 3, 64])
def test_threads_lose_nothing_uncounted_and_keep_each_source_in_order(limit: int) -> None:
    queue, each, seen = FrameQueue(limit), 500, list[tuple[str, int]]()
    left = threading.Semaphore(0)

    def produce(name: str) -> None:
        for number in range(each):
            queue.put(PIXELS, 1.0 if number % 5 else 0.0, f"{name} {number}")
        left.release()

    def consume() -> None:
        while queue.wait(30):
            frame = queue.get(1.0, 0.5)
            if frame is not None:
                name, number = frame.ref.split()
                seen.append((name, int(number)))

    def close() -> None:
        for _ in range(3):
            left.acquire()
        queue.close()

    joined(consume, close, *(lambda name=name: produce(name) for name in "abc"))
    counts = queue.counts
    assert counts.received == 3 * each == counts.served + counts.dropped + counts.stale + counts.waiting
    assert counts.served == len(seen) > 0 and all(number % 5 for _, number in seen)
    for name in "abc":
        own = [number for source, number in seen if source == name]
        assert own == sorted(set(own))


def test_a_frame_and_the_end_both_wake_who_waits() -> None:
    queue, answers = FrameQueue(1), list[bool]()
    joined(lambda: answers.append(queue.wait(600)), lambda: queue.put(PIXELS, 0.0, "a"))  # type: ignore[arg-type]
    assert queue.get(0.0, 1.0) is not None
    joined(lambda: answers.append(queue.wait(600)), queue.close)
    assert answers == [True, False]
    assert queue.wait(30) is False


def test_room_and_the_end_both_wake_a_source() -> None:
    queue, answers = FrameQueue(1), list[bool]()
    queue.put(PIXELS, 0.0, "a")
    joined(lambda: answers.append(queue.room(600)), lambda: queue.get(0.0, 1.0))  # type: ignore[arg-type]
    queue.put(PIXELS, 0.0, "b")
    joined(lambda: answers.append(queue.room(600)), queue.close)
    assert answers == [True, False]


def test_the_loop_is_told_outside_the_lock() -> None:
    told: list[FrameCounts] = []
    queue = FrameQueue(2, lambda: told.append(queue.counts))
    queue.put(PIXELS, 0.0, "a")
    queue.close()
    queue.put(PIXELS, 0.0, "b")
    assert [counts.received for counts in told] == [1, 1]
