"""A watched folder: files that appear in it become frames.

Rules of this file:

1. The folder is polled five times a second with one `stat`. It is listed if its time stamp changed, if that is so
   recent that another change may have the same one, and now and then to find files that were written in place; listing
   takes at most 0.2 % of the time. So no inotify is needed, and network file systems work.
2. A file is read if two polls in a row see the same size and time, so that a file is not read while it is written. A
   file that changes later is a new frame. Hidden files and suffixes that device.images.decode does not read are
   skipped.
3. Files wait on disk: one is decoded when the queue has room. A frame is stamped when its file was first seen as it
   is; a file older than `max_age_s` is skipped and counted as stale.
4. Kept files are remembered by name, size and time while they exist; those that are there at the start are not read.
   With `delete`, a file is removed once it was read or skipped as stale; one that cannot be decoded stays.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pydantic import Field

from device.daemon.finding import Finding, Machine
from device.daemon.section import HomePath
from device.daemon.sources.base import Feed, SourceSection, check_folder
from device.daemon.sources.running import Stop
from device.images.decode import SUFFIXES, decode
from edgeear.errors import DeviceError

PERIOD_S = 0.2
_FRESH_S = 2.5  # FAT keeps times to 2 s
_REST = 500  # after a listing, wait this many times as long as it took
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

    def capture(self, feed: Feed) -> WatchedFolder:
        return WatchedFolder(self, feed)

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield check_folder("folder", self.path, os.R_OK | os.X_OK | (os.W_OK if self.after == "delete" else 0))


@dataclass(frozen=True)
class _Waiting:
    """A file that is not read yet; `seen` is when it was first seen with this mark."""

    mark: Mark
    seen: float


class WatchedFolder:
    """Frames from a folder; `wall` gives the file system's time, `pace` seconds that never go back."""

    def __init__(
        self,
        settings: FolderSource,
        feed: Feed,
        wall: Callable[[], float] = time.time,
        pace: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder, self._feed, self._wall, self._pace = settings.path, feed, wall, pace
        self._delete, self._max_age_s = settings.after == "delete", settings.max_age_s
        self._done: dict[str, Mark] | None = None
        self._waiting: dict[str, _Waiting] = {}
        self._changed_ns, self._rested = 0, 0.0

    def run(self, stop: Stop) -> None:
        while not stop.is_set():
            self.look(stop)
            stop.wait(PERIOD_S)

    def look(self, stop: Stop) -> None:
        """Poll the folder once and read the files that are ready. Raises `DeviceError` if it cannot be listed."""
        try:
            changed, begun = os.stat(self._folder).st_mtime_ns, self._pace()
            fresh = self._wall() - changed / 1e9 < _FRESH_S
            if changed == self._changed_ns and not fresh and not self._waiting and begun < self._rested:
                return
            found = self._listed()
            self._rested = begun + _REST * (self._pace() - begun)
        except OSError as error:
            remedy = "create it, mount it, or change source.path"
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
                    continue  # removed since the listing
        return found

    def _ready(self, found: dict[str, Mark]) -> list[str]:
        """Names of files that have not changed since the last poll, the longest waiting first."""
        if self._done is None:
            self._done = {} if self._delete else dict(found)
        self._done = {name: mark for name, mark in self._done.items() if name in found}
        before, now = self._waiting, self._feed.clock()
        unread = {name: mark for name, mark in found.items() if self._done.get(name) != mark}
        ready = [name for name, mark in unread.items() if name in before and before[name].mark == mark]
        self._waiting = {name: _Waiting(mark, now) for name, mark in unread.items()} | {
            name: before[name] for name in ready
        }
        return sorted(ready, key=lambda name: (self._waiting[name].seen, self._waiting[name].mark[1], name))

    def _read(self, name: str, stop: Stop) -> None:
        file, path = self._waiting[name], self._folder / name
        while not (late := self._feed.clock() - file.seen > self._max_age_s) and not self._feed.sink.room(PERIOD_S):
            if stop.is_set() or self._feed.sink.closed:
                return
        assert self._done is not None
        del self._waiting[name]
        self._done[name] = file.mark
        if late:
            self._feed.sink.passed_over(stale=True)
        elif not self._feed.put(partial(decode, path), file.seen, name):
            return
        if self._delete:
            path.unlink(missing_ok=True)
