"""No source: a board that only answers commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from device.daemon.finding import Finding, Machine
from device.daemon.sources.base import Feed, SourceSection, fine


class NoSource(SourceSection):
    """Frames come with the infer command only."""

    kind: Literal["none"] = "none"

    def capture(self, feed: Feed) -> None:
        return None

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield fine("none: frames come with commands only")
