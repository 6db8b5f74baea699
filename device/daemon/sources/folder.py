"""A watched folder: files that appear in it become frames.

Rules of this file:

1. It looks five times a second, by one `stat` of the folder. It lists the folder when that changed, when its last
   change is so fresh that another may hide behind the same time stamp, and now and then for files that were written
   in place, but spends at most 0.2 % of the time on that. So it needs no inotify and works on network file systems.
2. A file is read when its size and time were the same at two looks in a row: what is being written is left alone.
   A file that changes later is a new frame. Hidden names and suffixes that device.images.decode does not
   read are passed over.
3. Files that wait do so on disk: one is decoded when the queue has room. A frame is as old as the first sight of its
   file in that state; a file older than `max_age_s` is passed over, and counted as stale.
4. Kept files are remembered by name, size and time for as long as they are there; those that were there at the start
   are not read. With `delete`, every file is removed once it was read or passed over; one that gives no frame stays,
   for a person to see.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

PERIOD_S = 0.2
_FRESH_S = 2.5  # FAT keeps times to 2 s
_REST = 500  # so many times as long as a listing took, the next one waits
Mark = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""


class FolderSource(SourceSection):
    """Files that appear in a folder."""

    kind: Literal["folder"] = "folder"
    path: HomePath = Field(description="the folder.", examples=["/srv/frames"])
    after: Literal["keep", "delete"] = Field(
        "keep",
        description="what happens to files that were read. keep: files that are there at the start are not read.",
    )

    def open(self, size: tuple[int, int], sink: FrameQueue, clock: Callable[[], float]) -> RunningSource:
        watched = WatchedFolder(self.path, size, sink, clock, self.after == "delete", self.max_age_s)
        return RunningSource("folder", watched, sink)

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield check_folder("folder", self.path, os.R_OK | os.X_OK | (os.W_OK if self.after == "delete" else 0))


@dataclass(frozen=True)
class _Waiting:
    """A file that is not read yet; `seen` is when it was first seen as it is."""

    mark: Mark
    seen: float


class WatchedFolder:
    """Frames from `folder`; `wall` tells the file system's time, `pace` seconds that never go back."""

    def __init__(
        self,
        folder: Path,
        size: tuple[int, int],
        sink: FrameQueue,
        clock: Callable[[], float],
        delete: bool,
        max_age_s: float,
        wall: Callable[[], float] = time.time,
        pace: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder, self._size, self._sink, self._clock = folder, size, sink, clock
        self._delete, self._max_age_s, self._wall, self._pace = delete, max_age_s, wall, pace
        self._done: dict[str, Mark] | None = None
        self._waiting: dict[str, _Waiting] = {}
        self._changed_ns, self._rested = 0, 0.0

    def run(self, stop: Stop) -> None:
        while not stop.is_set():
            self.look(stop)
            stop.wait(PERIOD_S)

    def look(self, stop: Stop) -> None:
        """One look at the folder, and what is ready is read. Raises `DeviceError` where it cannot be listed."""
        try:
            changed, begun = os.stat(self._folder).st_mtime_ns, self._pace()
            fresh = self._wall() - changed / 1e9 < _FRESH_S
            if changed == self._changed_ns and not fresh and not self._waiting and begun < self._rested:
                return
            found = self._listed()
            self._rested = begun + _REST * (self._pace() - begun)
        except OSError as error:
            remedy = "make it, mount it, or change source.path"
            raise DeviceError(f"{self._folder}: cannot be watched ({error.strerror}); {remedy}") from error
        self._changed_ns = changed
        for name in self._ready(found):
            if stop.is_set():
                return
            self._read(name, stop)

    def _listed(self) -> dict[str, Mark]:
        found = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                    continue
                try:
                    if entry.is_file():
                        status = entry.stat()
                        found[entry.name] = (status.st_size, status.st_mtime_ns)
                except FileNotFoundError:
                    continue  # it went while we looked
        return found

    def _ready(self, found: dict[str, Mark]) -> list[str]:
        """Names of files that have not changed since the last look, the longest waiting first."""
        if self._done is None:
            self._done = {} if self._delete else dict(found)
        self._done = {name: mark for name, mark in self._done.items() if name in found}
        before, now = self._waiting, self._clock()
        unread = {name: mark for name, mark in found.items() if self._done.get(name) != mark}
        ready = [name for name, mark in unread.items() if name in before and before[name].mark == mark]
        self._waiting = {name: _Waiting(mark, now) for name, mark in unread.items()} | {
            name: before[name] for name in ready
        }
        return sorted(ready, key=lambda name: (self._waiting[name].seen, self._waiting[name].mark[1], name))

    def _read(self, name: str, stop: Stop) -> None:
        file, path = self._waiting[name], self._folder / name
        while not (late := self._clock() - file.seen > self._max_age_s) and not self._sink.room(PERIOD_S):
            if stop.is_set() or self._sink.closed:
                return
        assert self._done is not None
        del self._waiting[name]
        self._done[name] = file.mark
        if late:
            self._sink.passed_over(stale=True)
        elif not self._decoded(path, file.seen):
            return
        if self._delete:
            path.unlink(missing_ok=True)

    def _decoded(self, path: Path, seen: float) -> bool:
        try:
            frame = decode(path, self._size)
        except UndecodableInput:
            self._sink.undecodable()
            return False
        return self._sink.put(frame, seen, path.name)
