"""Frames that come as MQTT messages: JPEG or PNG bytes, handed over by the network thread and decoded in another."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from device.daemon.finding import Finding, Machine
from device.daemon.frames import FrameQueue
from device.daemon.sources.base import SourceSection, fine
from device.daemon.sources.running import RunningSource, Stop
from device.images.decode import UndecodableInput, decode_bytes

MAX_BYTES = 8 << 20
_NAME = Path("message.jpg")  # its suffix says image; which one, the bytes say


class MqttSource(SourceSection):
    """Messages on the topic `frame`."""

    kind: Literal["mqtt"] = "mqtt"

    def open(self, size: tuple[int, int], sink: FrameQueue, clock: Callable[[], float]) -> RunningSource:
        return RunningSource("mqtt", MessageFrames(size, sink, clock, self.queue), sink)

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield fine("frames come by MQTT")


class MessageFrames:
    """At most `limit` undecoded messages wait; one more pushes out the oldest, which is counted."""

    def __init__(self, size: tuple[int, int], sink: FrameQueue, clock: Callable[[], float], limit: int) -> None:
        self._size, self._sink, self._clock, self._limit = size, sink, clock, limit
        self._inbox: deque[tuple[int, float, bytes]] = deque()
        self._changed = threading.Condition()
        self._number = 0

    def offer(self, payload: bytes) -> None:
        """Take a message; never waits, never raises. More than `MAX_BYTES` are undecodable."""
        if len(payload) > MAX_BYTES:
            self._sink.undecodable()
            return
        with self._changed:
            if len(self._inbox) == self._limit:
                self._inbox.popleft()
                self._sink.passed_over(stale=False)
            self._number += 1
            self._inbox.append((self._number, self._clock(), payload))
            self._changed.notify_all()

    def run(self, stop: Stop) -> None:
        while not stop.is_set():
            with self._changed:
                if not self._changed.wait_for(lambda: self._inbox, timeout=0.5):
                    continue
                number, captured, payload = self._inbox.popleft()
            try:
                frame = decode_bytes(payload, _NAME, self._size)
            except UndecodableInput:
                self._sink.undecodable()
            else:
                self._sink.put(frame, captured, f"message {number}")
