"""Disks that fail on purpose, for the tests of the store: they stop, fill up, or lose what was not fsynced.

Run as a program with a directory on a small file system, it fills that file system and rolls back on it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from device.state.store import Disk, Store, StoreFull

Act = Callable[[Store], object]
SHARED = bytes(range(256)) * 4


def contents(number: int) -> dict[str, bytes]:
    """Every generation has one file of its own, one that all share, and an empty one."""
    return {"memory.bin": b"generation %d " % number * 40, "head.onnx": SHARED, "empty": b""}


def write(number: int) -> Act:
    return lambda store: store.write(contents(number), created=float(number))


SCRIPT: tuple[tuple[str, int, Act], ...] = (
    ("write", 1, write(1)),
    ("commit", 1, lambda store: store.commit(1)),
    ("confirm", 1, lambda store: store.confirm(1)),
    ("write", 2, write(2)),
    ("commit", 2, lambda store: store.commit(2)),
    ("rollback", 1, lambda store: store.rollback()),
    ("write", 3, write(3)),
    ("commit", 3, lambda store: store.commit(3)),
    ("confirm", 3, lambda store: store.confirm(3)),
    ("write", 4, write(4)),
    ("collect", 2, lambda store: store.collect()),
    ("commit", 4, lambda store: store.commit(4)),
    ("confirm", 4, lambda store: store.confirm(4)),
    ("write", 5, write(5)),
    ("collect", 1, lambda store: store.collect()),
    ("commit", 5, lambda store: store.commit(5)),
)
"""A store's life with `keep=1`: what is done, the number that it is about, and how."""


def perform(store: Store, tell: Callable[[str, str, int], None]) -> None:
    """Runs the script, telling `begin` and `end` of each act."""
    for act, number, do in SCRIPT:
        tell("begin", act, number)
        do(store)
        tell("end", act, number)


@dataclass
class Promised:
    """What must hold after a crash: the live and confirmed numbers are among these, `highest` is on disk."""

    live: set[int | None] = field(default_factory=lambda: {None})
    confirmed: set[int | None] = field(default_factory=lambda: {None})
    highest: int = 0

    def tell(self, when: str, act: str, number: int) -> None:
        """From the beginning of an act to its end, both the old number and the new one are right."""
        numbers = {"commit": self.live, "rollback": self.live, "confirm": self.confirmed}.get(act)
        if numbers is not None:
            if when == "end":
                numbers.clear()
            numbers.add(number)
        if act == "write" and when == "end":
            self.highest = number


class StepDisk(Disk):
    """Calls `step` with each operation's name before it happens, and once in the middle of each write."""

    def step(self, operation: str) -> None:
        raise NotImplementedError

    def create(self, path: Path) -> int:
        self.step("create")
        return super().create(path)

    def write(self, descriptor: int, data: bytes) -> None:
        self.step("write")
        super().write(descriptor, data[: len(data) // 2])
        self.step("write")
        super().write(descriptor, data[len(data) // 2 :])

    def sync(self, descriptor: int) -> None:
        self.step("sync")

    def sync_dir(self, path: Path) -> None:
        self.step("sync_dir")

    def mkdir(self, path: Path) -> None:
        self.step("mkdir")
        super().mkdir(path)

    def link(self, source: Path, target: Path) -> None:
        self.step("link")
        super().link(source, target)

    def replace(self, source: Path, target: Path) -> None:
        self.step("replace")
        super().replace(source, target)

    def unlink(self, path: Path) -> None:
        self.step("unlink")
        super().unlink(path)

    def rmdir(self, path: Path) -> None:
        self.step("rmdir")
        super().rmdir(path)


class CountDisk(StepDisk):
    """Counts operations; fsync does nothing, which is all that a test of logic needs."""

    def __init__(self) -> None:
        self.count = 0

    def step(self, operation: str) -> None:
        self.count += 1


class KillDisk(CountDisk):
    """Kills its own process at operation `at` (from 0)."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def step(self, operation: str) -> None:
        if self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        super().step(operation)


class FailDisk(CountDisk):
    """Fails with the errno `error` once, at operation `at`; or at each of `operations` from `at` on."""

    def __init__(self, at: int, error: int, operations: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._at, self._error, self._operations = at, error, operations
        self.failed = False

    def step(self, operation: str) -> None:
        now = operation in self._operations if self._operations else self.count == self._at
        super().step(operation)
        if self.count > self._at and now:
            self.failed = True
            raise OSError(self._error, os.strerror(self._error))


@dataclass(eq=False)
class File:
    """`durable` is what an fsync has saved, None before the first one."""

    data: bytes = b""
    durable: bytes | None = None


@dataclass(eq=False)
class Folder:
    """`durable` holds the entries at the last fsync of this directory."""

    entries: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)


class PowerDisk(CountDisk):
    """Works on the real disk and on a model that knows what a power cut would leave. Paths lie under `base`.

    The model promises what POSIX does and no more: a file's bytes are safe after its fsync, a directory's
    entries after the directory's. `visit` is called with the model before each operation.
    """

    def __init__(self, base: Path, visit: Callable[[Folder], None]) -> None:
        super().__init__()
        self._base, self._visit = base, visit
        self.top = Folder()
        self._open: dict[int, File] = {}

    def step(self, operation: str) -> None:
        self._visit(self.top)
        super().step(operation)

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._open[descriptor] = self._folder(path).entries[path.name] = File()
        return descriptor

    def write(self, descriptor: int, data: bytes) -> None:
        self.step("write")
        Disk.write(self, descriptor, data)
        self._open[descriptor].data += data

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self._open[descriptor].durable = self._open[descriptor].data

    def sync_dir(self, path: Path) -> None:
        super().sync_dir(path)
        folder = self._folder(path / "child")
        folder.durable = dict(folder.entries)

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self._folder(path).entries[path.name] = Folder()

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self._folder(target).entries[target.name] = self._folder(source).entries[source.name]

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._folder(target).entries[target.name] = self._folder(source).entries.pop(source.name)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        del self._folder(path).entries[path.name]

    def rmdir(self, path: Path) -> None:
        super().rmdir(path)
        del self._folder(path).entries[path.name]

    def _folder(self, path: Path) -> Folder:
        folder = self.top
        for name in path.relative_to(self._base).parts[:-1]:
            child = folder.entries[name]
            assert isinstance(child, Folder)
            folder = child
        return folder


def after_outage(folder: Folder, path: Path, dice: random.Random | None) -> None:
    """Lays out in `path` what a power cut leaves: nothing unsynced without dice, else any part of it."""
    for name in sorted(folder.entries | folder.durable):
        versions = [folder.durable.get(name), folder.entries.get(name)]
        node = dice.choice(versions) if dice else versions[0]
        if isinstance(node, Folder):
            (path / name).mkdir()
            after_outage(node, path / name, dice)
        elif node is not None:
            lost = dice.choice([b"", node.data[: len(node.data) // 2], node.data]) if dice else b""
            (path / name).write_bytes(lost if node.durable is None else node.durable)


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process; returns its exit status, or minus the signal that ended it."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fill(root: Path) -> dict[str, object]:
    """Writes what does not fit, then fills the last byte, and goes back to the confirmed generation."""
    with Store.open(root / "store") as store:
        for number in (1, 2):
            store.commit(store.write(contents(number), created=0.0))
            if number == 1:
                store.confirm(number)
        before = sorted(os.listdir(root / "store"))
        refused = full(lambda: store.write({"large": bytes(1 << 20)}, created=0.0))
        clean = sorted(os.listdir(root / "store")) == before
        with (root / "ballast").open("wb", buffering=0) as ballast:
            while _append(ballast.fileno(), 4096) or _append(ballast.fileno(), 1):
                pass
        filled = full(lambda: store.confirm(2))
        back = store.rollback()
        same = store.read(back) == contents(1)
    with Store.open(root / "store") as store:
        served = store.recover()
    return {"refused": refused, "clean": clean, "full": filled, "back": back, "same": same, "served": served}


def full(act: Callable[[], object]) -> bool:
    try:
        act()
    except StoreFull:
        return True
    return False


def _append(descriptor: int, size: int) -> bool:
    try:
        return os.write(descriptor, bytes(size)) > 0
    except OSError:
        return False


if __name__ == "__main__":
    print(json.dumps(fill(Path(sys.argv[1]))))
