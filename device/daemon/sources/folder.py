"""A watched folder: files that appear in it become frames.

Rules of this file:

1. The folder is polled five times a second with one `stat`. It is listed if its time stamp changed, if that is so
   recent that another change may have the same one, and now and then to find files that were written in place; listing
   takes at most 0.2 % of the time. So no inotify is needed, and network file systems work.
2. A file is read if two polls in a row see the same size and time, so that a file is not read while it is written. A
   file that changes later is a new frame. One that is written anew before every poll, such as a camera's `latest.jpg`,
   is read as it is, if it decodes and does not change meanwhile. Hidden files, suffixes that device.images.decode does
   not read and entries that are no readable file are skipped.
3. Files wait on disk: one is decoded when the queue has room. A frame is stamped when its file was first seen as it is.
   With `keep`, a file older than `max_age_s` is skipped and counted as stale.
4. Kept files are remembered by name, size and time while they exist, and while their file system is not mounted. Those
   that are there at the start, or come with another file system, are not read.
5. With `delete`, every file is read, however long it waits, and removed once its frame was answered, unless it changed
   since. A file that gets no answer stays.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from device.daemon.finding import Finding, Machine
from device.daemon.section import HomePath
from device.daemon.sources.base import Feed, SourceSection, check_folder
from device.daemon.sources.running import Stop
from device.images.decode import SUFFIXES, decode, decode_bytes, read_input
from edgeear.errors import DataError, DeviceError
from edgeear.types import U8

PERIOD_S = 0.2
_FRESH_S = 2.5  # FAT keeps times to 2 s
_REST = 500  # after a listing, wait this many times as long as it took
_RESTLESS = 3  # polls in a row that saw another version of a file
Mark = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""


class FolderSource(SourceSection):
    """Files that appear in a folder."""

    kind: Literal["folder"] = "folder"
    path: HomePath = Field(description="the folder.", examples=["/srv/frames"])
    after: Literal["keep", "delete"] = Field(
        "keep",
        description="what happens to files. keep: those that are there at the start, or that wait longer than "
        "source.max_age_s, are not read. delete: every file is read, and removed once it was answered.",
    )

    def capture(self, feed: Feed) -> WatchedFolder:
        return WatchedFolder(self, feed)

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield check_folder("folder", self.path, os.R_OK | os.X_OK | (os.W_OK if self.after == "delete" else 0))


@dataclass(frozen=True)
class _File:
    """A file as a poll saw it: its mark and inode, and when this mark was `seen` first. `still`: the poll before
    saw the same mark. `changes`: polls in a row that saw another one. `anew`: it did more than grow in these."""

    mark: Mark
    inode: int
    seen: float
    still: bool = False
    changes: int = 0
    anew: bool = False

    def after(self, before: _File | None) -> _File:
        """This file, with what the poll `before` saw."""
        if before is None:
            return self
        if before.mark == self.mark:
            return replace(before, inode=self.inode, still=True, changes=0, anew=False)
        replaced = before.inode != self.inode or self.mark[0] <= before.mark[0]
        return replace(self, changes=before.changes + 1, anew=before.anew or replaced)

    @property
    def restless(self) -> bool:
        """Whether it is written anew all the time."""
        return self.anew and self.changes >= _RESTLESS


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
        self._files: dict[str, _File] = {}
        self._done: dict[str, tuple[Mark, int]] | None = None
        """Of files that are not read again: the mark, and the file system that they were seen on."""
        self._answered: deque[tuple[str, Mark]] = deque()
        self._unread, self._system, self._changed_ns, self._rested = False, 0, 0, 0.0

    def run(self, stop: Stop) -> None:
        try:
            while not stop.is_set():
                self.look(stop)
                stop.wait(PERIOD_S)
        finally:
            self._remove_answered()

    def look(self, stop: Stop) -> None:
        """Poll the folder once and read the files that are ready. Raises `DeviceError` if it cannot be listed, or if an
        answered file cannot be removed; that file is not read again."""
        self._remove_answered()
        try:
            status, begun = os.stat(self._folder), self._pace()
            changed = status.st_mtime_ns
            fresh = self._wall() - changed / 1e9 < _FRESH_S
            if changed == self._changed_ns and not fresh and not self._unread and begun < self._rested:
                return
            found, hidden = self._listed()
            self._rested = begun + _REST * (self._pace() - begun)
        except OSError as error:
            remedy = "create it, mount it, or change source.path"
            raise DeviceError(f"{self._folder}: cannot be watched ({error.strerror}); {remedy}") from error
        self._changed_ns = changed
        for name in self._ready(found, hidden, status.st_dev):
            if stop.is_set():
                return
            self._read(name, stop)
            self._remove_answered()

    def _listed(self) -> tuple[dict[str, _File], set[str]]:
        """The files, and the names of entries that cannot be looked at, such as a link to itself."""
        found, hidden, now = dict[str, _File](), set[str](), self._feed.clock()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                    continue
                try:
                    if entry.is_file():
                        status = entry.stat()
                        found[entry.name] = _File(_mark(status), status.st_ino, now)
                except FileNotFoundError:
                    continue  # removed since the listing
                except OSError:
                    hidden.add(entry.name)
        return found, hidden

    def _ready(self, found: dict[str, _File], hidden: set[str], system: int) -> list[str]:
        """Names of unread files that stand still, or never do, the longest waiting first. `system`: the file system."""
        self._files = {name: file.after(self._files.get(name)) for name, file in found.items()}
        done = self._done or {}
        first = self._done is None or (system != self._system and not done.keys() & found.keys())
        if first and not self._delete:
            done |= {name: (file.mark, system) for name, file in found.items()}
        self._system = system
        read = {name for name, file in found.items() if name in done and done[name][0] == file.mark}
        gone = {name for name, (_, on) in done.items() if on == system and name not in found and name not in hidden}
        self._done = {n: (mark, system if n in read else on) for n, (mark, on) in done.items() if n not in gone}
        unread = {name: file for name, file in self._files.items() if name not in read}
        self._unread = bool(unread)
        ready = [name for name, file in unread.items() if file.still or file.restless]
        return sorted(ready, key=lambda name: (unread[name].seen, unread[name].mark[1], name))

    def _read(self, name: str, stop: Stop) -> None:
        file, sink = self._files[name], self._feed.sink
        while not (late := not self._delete and self._feed.clock() - file.seen > self._max_age_s):
            if sink.room(PERIOD_S):
                break
            if stop.is_set() or sink.closed:
                return
        path, done = self._folder / name, (file.mark, self._system)
        assert self._done is not None
        if late:
            self._done[name] = done
            sink.passed_over(stale=True)
        elif file.restless:
            if (pixels := _as_it_is(path, file.mark, self._feed.size)) is not None:
                self._done[name] = done
                self._feed.put(lambda _: pixels, file.seen, name, self._on_answer(name, file.mark))
        else:
            self._done[name] = done
            self._feed.put(partial(decode, path), file.seen, name, self._on_answer(name, file.mark))

    def _on_answer(self, name: str, mark: Mark) -> Callable[[], None] | None:
        return partial(self._answered.append, (name, mark)) if self._delete else None

    def _remove_answered(self) -> None:
        while self._answered:
            name, mark = self._answered.popleft()
            path = self._folder / name
            try:
                if _mark(path.stat()) == mark:
                    path.unlink()
            except FileNotFoundError:
                continue  # somebody else removed it
            except OSError as error:
                remedy = "allow this user to write to the folder, or set source.after = keep"
                raise DeviceError(f"{path}: was answered and cannot be removed ({error.strerror}); {remedy}") from error


def _mark(status: os.stat_result) -> Mark:
    return status.st_size, status.st_mtime_ns


def _as_it_is(path: Path, mark: Mark, size: tuple[int, int]) -> U8 | None:
    """The frame of a file that may change at any moment; None if it changed, or does not decode."""
    try:
        data = read_input(path)
        return decode_bytes(data, path, size) if _mark(path.stat()) == mark else None
    except (DataError, OSError):
        return None
