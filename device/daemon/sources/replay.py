"""Replay: the files of a folder as if a camera saw them, at a fixed rate.

Rules of this file:

1. A flat folder is replayed by name. Of `DIR/DOMAIN/CLASS/files` one domain follows another, sorted; in a domain the
   classes are mixed, by the SHA-256 of each path, so that every machine replays the same order.
2. A frame's `ref` is its path relative to the folder, by which a simulation finds its true class.
3. A replay that falls behind continues from where it is; it does not hurry to catch up.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from device.daemon.finding import Finding, Machine
from device.daemon.section import HomePath
from device.daemon.sources.base import Feed, SourceSection, check_folder
from device.daemon.sources.running import Stop
from device.images.decode import SUFFIXES, decode
from edgeear.errors import DeviceError


class ReplaySource(SourceSection):
    """The files of a folder at a fixed rate."""

    kind: Literal["replay"] = "replay"
    path: HomePath = Field(description="the folder.", examples=["/srv/frames"])
    fps: float = Field(5.0, gt=0, le=240, description="frames a second.")
    loop: bool = Field(True, description="start again after the last file.")

    def capture(self, feed: Feed) -> Replay:
        return Replay(self, feed)

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield check_folder("replay", self.path, os.R_OK | os.X_OK)


@dataclass(frozen=True)
class Replay:
    """Frames of a folder, without end or once. `pace` gives seconds that never go back."""

    settings: ReplaySource
    feed: Feed
    pace: Callable[[], float] = time.monotonic

    def run(self, stop: Stop) -> None:
        folder, due = self.settings.path, self.pace()
        while True:
            before = self.feed.sink.counts.received
            for relative in replayed(folder):
                if stop.wait(max(0.0, due - self.pace())):
                    return
                self.feed.put(partial(decode, folder / relative), self.feed.clock(), relative)
                due = max(due + 1 / self.settings.fps, self.pace())
            if not self.settings.loop:
                return
            if self.feed.sink.counts.received == before:
                raise DeviceError(f"{folder}: none of its files gives a frame; add {', '.join(SUFFIXES)} files")


def replayed(folder: Path) -> list[str]:
    """The posix paths of the files under `folder`, relative, in the order of a replay. Raises `DeviceError`."""
    if not folder.is_dir():
        raise DeviceError(f"{folder} is no folder: create it, mount it, or change source.path")
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    visible = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    return sorted(visible, key=_place)


def _place(relative: str) -> tuple[str, str, str]:
    domain, inside, _ = relative.partition("/")
    mixed = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()
    return (domain, mixed, relative) if inside else ("", "", relative)
