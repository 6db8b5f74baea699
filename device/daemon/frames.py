"""The frame queue: frames that a source captured and the loop has not served yet.

Rules of this file:

1. At most `limit` frames wait. One more drops the oldest, which is counted, so that a slow board serves recent frames.
2. A frame older than the reader allows is counted and dropped, never returned. So is one whose age is NaN. A frame
   whose source waits for its answer is returned at any age.
3. Every frame is counted: received = served + dropped + stale + waiting, at any time, with any number of threads.
4. After `close` no frame enters and no call waits. Frames in the queue can still be taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Condition

from edgeear.errors import UsageError
from edgeear.types import U8


@dataclass(frozen=True, eq=False)
class Frame:
    """`pixels (height, width, 3)` uint8 at the encoder's size; `captured` in the queue's clock, seconds; `ref` says
    where it came from: a file's path, a sequence number. `answered` is called once the loop answered it; it never
    waits. None for a frame that may be dropped."""

    pixels: U8
    captured: float
    ref: str
    answered: Callable[[], None] | None = None


@dataclass
class FrameCounts:
    """Since the queue was made. `undecodable` inputs gave no frame, so they are not among the `received`."""

    received: int = 0
    served: int = 0
    dropped: int = 0
    stale: int = 0
    undecodable: int = 0
    waiting: int = 0


class FrameQueue:
    """A bounded queue between the threads of sources and the loop.

    `notify` is called after each `put` and `close`, outside the lock: it wakes a loop that waits for other things, too.
    Raises `UsageError` for a `limit` below 1.
    """

    def __init__(self, limit: int, notify: Callable[[], None] = lambda: None) -> None:
        if limit < 1:
            raise UsageError(f"a frame queue of {limit}: it must hold at least 1 frame")
        self._changed = Condition()
        self._frames: deque[Frame] = deque()
        self._limit, self._notify, self._closed = limit, notify, False
        self._counts = FrameCounts()

    def put(self, frame: U8, captured: float, ref: str, answered: Callable[[], None] | None = None) -> bool:
        """Add a frame; False when the queue is closed. With `answered` it is never stale; wait for `room` first, so
        that it is not dropped either."""
        with self._changed:
            if self._closed:
                return False
            if len(self._frames) == self._limit:
                self._frames.popleft()
                self._counts.dropped += 1
            self._frames.append(Frame(frame, captured, ref, answered))
            self._counts.received += 1
            self._changed.notify_all()
        self._notify()
        return True

    def get(self, now: float, max_age_s: float) -> Frame | None:
        """The oldest frame that is not older than `max_age_s`; None when there is none. Never waits."""
        with self._changed:
            self._changed.notify_all()
            while self._frames:
                frame = self._frames.popleft()
                if frame.answered is not None or now - frame.captured <= max_age_s:
                    self._counts.served += 1
                    return frame
                self._counts.stale += 1
            return None

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for a frame; whether there is one. `close` ends the wait."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._closed, timeout)
            return bool(self._frames)

    def room(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for room; whether a frame could enter without dropping one. `close` ends it."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._frames) < self._limit or self._closed, timeout)
            return len(self._frames) < self._limit

    def passed_over(self, *, stale: bool) -> None:
        """Count an input that a source dropped before decoding: too old, or replaced by a newer one."""
        with self._changed:
            self._counts.received += 1
            self._counts.stale += stale
            self._counts.dropped += not stale

    def undecodable(self) -> None:
        """Count an input that gave no frame."""
        with self._changed:
            self._counts.undecodable += 1

    def close(self) -> None:
        """End all waits, now and later. Closing twice is allowed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._notify()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def counts(self) -> FrameCounts:
        """All counters at one moment."""
        with self._changed:
            return replace(self._counts, waiting=len(self._frames))
