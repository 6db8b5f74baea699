"""Frames that come as MQTT messages: JPEG or PNG bytes, handed over by the network thread and decoded in another."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from device.daemon.finding import Finding, Machine, ok
from device.daemon.sources.base import Feed, SourceSection
from device.daemon.sources.running import Stop
from device.images.decode import decode_bytes, sent
from edgeear.types import U8

MAX_BYTES = 8 << 20
_NAME = Path("message.jpg")  # the suffix says that it is an image; the bytes say which


class MqttSource(SourceSection):
    """Messages on the topic `frame`."""

    kind: Literal["mqtt"] = "mqtt"

    def capture(self, feed: Feed) -> MessageFrames:
        return MessageFrames(feed, self.queue)

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield ok("frames come by MQTT")


class MessageFrames:
    """At most `limit` undecoded messages wait; one more drops the oldest, which is counted."""

    def __init__(self, feed: Feed, limit: int) -> None:
        self._feed, self._limit = feed, limit
        self._inbox: deque[tuple[int, float, bytes]] = deque()
        self._changed = threading.Condition()
        self._number = 0

    def offer(self, payload: bytes) -> None:
        """Take a message; never waits, never raises. More than `MAX_BYTES` count as undecodable."""
        if len(payload) > MAX_BYTES:
            self._feed.sink.undecodable()
            return
        with self._changed:
            if len(self._inbox) == self._limit:
                self._inbox.popleft()
                self._feed.sink.passed_over(stale=False)
            self._number += 1
            self._inbox.append((self._number, self._feed.clock(), payload))
            self._changed.notify_all()

    def run(self, stop: Stop) -> None:
        while not stop.is_set():
            with self._changed:
                if not self._changed.wait_for(lambda: self._inbox, timeout=0.5):
                    continue
                number, captured, payload = self._inbox.popleft()
            self._feed.put(partial(_decoded, payload), captured, f"message {number}")


def _decoded(payload: bytes, size: tuple[int, int]) -> U8:
    return decode_bytes(payload, _NAME, size, sent(size))
