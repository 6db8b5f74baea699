"""A source's thread: it runs a capture, and runs it again after a failure.

Rules of this file:

1. A capture returns if it is told to stop or comes to its end; it raises if it fails.
2. After a failure the next try waits 0.5 s, then twice as long each time, at most 60 s; a frame in between resets the
   wait. No failure ends the thread: an unattended board has nobody to restart it.
3. Stopping ends every wait at once, also one for a port.
4. The text of a failure is redacted here, before anybody can read it: a camera's URL holds its password.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol

from device.daemon.frames import FrameQueue
from device.files import escaped
from device.redaction import redacted
from edgeear.errors import EdgeearError, UsageError

PAUSES_S = (0.5, 60.0)
"""Seconds between two tries: after the first failure, and at most."""


class Stop:
    """A flag that a capture waits on; its descriptor becomes readable with it, for `select`."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        self._event.set()
        os.eventfd_write(self._descriptor, 1)

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the flag; whether it is set."""
        return self._event.wait(seconds)

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


class Capture(Protocol):
    """One way to get frames."""

    def run(self, stop: Stop) -> None:
        """Put frames into the queue; see rule 1 of this module."""


class RunningSource:
    """A capture in a thread of its own, which feeds the queue. You start and stop it once."""

    def __init__(
        self,
        name: str,
        capture: Capture,
        sink: FrameQueue,
        pauses: tuple[float, float] = PAUSES_S,
        silent_s: float | None = None,
    ) -> None:
        self._capture, self._sink, self._pauses = capture, sink, pauses
        self._stop = Stop()
        self._thread = threading.Thread(target=self._run, name=f"source-{name}", daemon=True)
        self._failing = False
        self.silent_s = silent_s
        """Seconds without a frame after which it is in trouble, though it runs; None for never."""
        self.last_error: str | None = None
        """The last failure, with its remedy; it stays after a recovery."""
        self.finished = False
        """Whether it came to its end by itself, as a replay does."""

    @property
    def alive(self) -> bool:
        """Whether it runs and its device is there."""
        return self._thread.is_alive() and not self._failing

    def start(self) -> None:
        """Start; returns at once."""
        if self._thread.ident is not None:
            raise UsageError("this source was started already: open another one")
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> bool:
        """Stop; whether it has stopped within `timeout` seconds."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def offer(self, payload: bytes) -> None:
        """A frame that came by MQTT, from the network thread; ignored if frames come from elsewhere."""
        take = getattr(self._capture, "offer", None)
        if take is not None:
            take(payload)

    def _run(self) -> None:
        first, most = self._pauses
        pause = first
        while not self._stop.is_set():
            before = self._sink.counts.received
            try:
                self._capture.run(self._stop)
            except Exception as error:
                told = error if isinstance(error, EdgeearError) else f"{type(error).__name__}: {error}"
                self.last_error = redacted(escaped(told))
            else:
                self.finished = not self._stop.is_set()
                return
            if self._sink.counts.received > before:
                pause = first
            self._failing = True
            self._stop.wait(pause)
            self._failing = False
            pause = min(2 * pause, most)
