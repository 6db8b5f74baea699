"""What every kind of source has: settings that open and check it, and a feed that its frames go to."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from device.daemon.finding import Finding, Machine, ok, problem
from device.daemon.frames import FrameQueue
from device.daemon.section import Section
from device.daemon.sources.running import Capture, RunningSource
from device.files import escaped
from edgeear.errors import DataError
from edgeear.types import U8


@dataclass(frozen=True)
class Feed:
    """Where frames go: `size` is their `(height, width)`, `clock` the time that stamps them, in seconds."""

    size: tuple[int, int]
    sink: FrameQueue
    clock: Callable[[], float]

    def put(
        self,
        decode: Callable[[tuple[int, int]], U8],
        captured: float,
        ref: str,
        answered: Callable[[], None] | None = None,
    ) -> bool:
        """Decode a frame to `size` and queue it as `FrameQueue.put` does. False if the queue is closed, or if `decode`
        raises `DataError`, which is counted."""
        try:
            frame = decode(self.size)
        except DataError:
            self.sink.undecodable()
            return False
        return self.sink.put(frame, captured, escaped(ref), answered)


class SourceSection(Section):
    """The settings of one kind. A subclass sets `kind` to a `Literal` with a default and adds its own keys; its
    docstring is one sentence, which `edgeear init` writes. Two kinds that use the same key give it the same range."""

    kind: str
    queue: int = Field(4, ge=1, le=1024, description="Frames that may wait; one more drops the oldest.")
    max_age_s: float = Field(2.0, gt=0, le=3600, description="Seconds after which a waiting frame is never served.")
    silent_s: float | None = Field(
        None,
        ge=1,
        le=604_800,
        description="Seconds without a frame after which this is told. Not set: 30 for a camera, never for others.",
        examples=[300],
    )

    @abstractmethod
    def capture(self, feed: Feed) -> Capture | None:
        """What reads frames into `feed`; None if none come by themselves. Raises `UsageError` for what no retry can
        fix, such as a missing extra."""

    @abstractmethod
    def check(self, machine: Machine) -> Iterator[Finding]:
        """What `edgeear doctor` finds: whether the source is there and this user may use it."""

    def open(self, feed: Feed) -> RunningSource | None:
        """The source, not started. Raises as `capture` does."""
        capture = self.capture(feed)
        return None if capture is None else RunningSource(self.kind, capture, feed.sink, silent_s=self.patience_s)

    @property
    def patience_s(self) -> float | None:
        """Seconds without a frame after which the source is in trouble; None if it may be silent for ever."""
        return self.silent_s


class NoSource(SourceSection):
    """Frames come with the infer command only."""

    kind: Literal["none"] = "none"

    def capture(self, feed: Feed) -> None:
        return None

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield ok("none: frames come with commands only")


def check_folder(kind: str, path: Path, access: int) -> Finding:
    """Whether the folder `path` is there and this user has `access` (`os.R_OK`, ...) to it."""
    if not path.is_dir():
        return problem(f"{path} is not a folder", "create it, or change source.path")
    if not os.access(path, access):
        return problem(f"{path}: this user may not use it", "change its permissions")
    return ok(f"{kind} {path}")


def check_device(kind: str, path: Path, group: str) -> Finding:
    """Whether the device file `path` is there and this user, as a member of `group`, may read and write it."""
    if not path.exists():
        return problem(f"{path} does not exist", "check the cable, or change source.device")
    if not os.access(path, os.R_OK | os.W_OK):
        return problem(f"{path}: this user may not use it", f"add the user to group {group}")
    return ok(f"{kind} {path}")
