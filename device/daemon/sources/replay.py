"""Replay: the files of a folder as if a camera saw them, at a fixed rate.

Rules of this file:

1. A flat folder is replayed by name. Of `DIR/DOMAIN/CLASS/files` one domain follows another, sorted; in a domain the
   classes are mixed, by the SHA-256 of each path, so that every machine replays the same order.
2. A frame's `ref` is its path relative to the folder, which tells a simulation the truth.
3. A replay that falls behind goes on from where it is: it makes up for nothing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from device.daemon.finding import Finding, Machine
from device.daemon.frames import FrameQueue
from device.daemon.section import HomePath
from device.daemon.sources.base import SourceSection, check_folder
from device.daemon.sources.running import RunningSource, Stop
from device.images.decode import SUFFIXES, UndecodableInput, decode
from edgeear.errors import DeviceError


class ReplaySource(SourceSection):
    """The files of a folder at a fixed rate."""

    kind: Literal["replay"] = "replay"
    path: HomePath = Field(description="the folder.", examples=["/srv/frames"])
    fps: float = Field(5.0, gt=0, le=240, description="frames a second.")
    loop: bool = Field(True, description="start again after the last file.")

    def open(self, size: tuple[int, int], sink: FrameQueue, clock: Callable[[], float]) -> RunningSource:
        return RunningSource("replay", Replay(self.path, size, sink, clock, self.fps, self.loop), sink)

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield check_folder("replay", self.path, os.R_OK | os.X_OK)


class Replay:
    """Frames of `folder`, `fps` a second; with `loop` for ever, else once. `pace` gives seconds that never go back."""

    def __init__(
        self,
        folder: Path,
        size: tuple[int, int],
        sink: FrameQueue,
        clock: Callable[[], float],
        fps: float,
        loop: bool,
        pace: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._size, self._sink, self._clock = folder, size, sink, clock
        self._period, self._loop, self._pace = 1 / fps, loop, pace

    def run(self, stop: Stop) -> None:
        due = self._pace()
        while True:
            before = self._sink.counts.received
            for relative in replayed(self._folder):
                if stop.wait(max(0.0, due - self._pace())):
                    return
                self._show(relative)
                due = max(due + self._period, self._pace())
            if not self._loop:
                return
            if self._sink.counts.received == before:
                raise DeviceError(f"{self._folder}: none of its files gives a frame; add {', '.join(SUFFIXES)} files")

    def _show(self, relative: str) -> None:
        captured = self._clock()
        try:
            frame = decode(self._folder / relative, self._size)
        except UndecodableInput:
            self._sink.undecodable()
        else:
            self._sink.put(frame, captured, relative)


def replayed(folder: Path) -> list[str]:
    """The posix paths of the files under `folder`, relative, in the order of a replay. Raises `DeviceError`."""
    if not folder.is_dir():
        raise DeviceError(f"{folder} is no folder: make it, mount it, or change source.path")
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    visible = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    return sorted(visible, key=_place)


def _place(relative: str) -> tuple[str, str, str]:
    domain, inside, _ = relative.partition("/")
    mixed = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()
    return (domain, mixed, relative) if inside else ("", "", relative)
