"""No source: a board that answers commands only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from device.daemon.finding import Finding, Machine
from device.daemon.frames import FrameQueue
from device.daemon.sources.base import SourceSection, fine


class NoSource(SourceSection):
    """Frames come with the infer command only."""

    kind: Literal["none"] = "none"

    def open(self, size: tuple[int, int], sink: FrameQueue, clock: Callable[[], float]) -> None:
        return None

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield fine("none: frames come with commands only")
