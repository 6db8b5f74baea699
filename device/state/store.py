"""The store: numbered, immutable generations on disk, of which one is live and one is confirmed.

Rules of this file:

1. A generation is a directory of named files; the store does not read them. It is written as `.partial-NUMBER`. Every
   file and the directory are fsynced, then the directory is renamed, then the root is fsynced. Its files are never
   written again. Files equal to the parent's are hard-linked; the bytes are compared first, so damage is not inherited.
2. `CURRENT` names the live and the confirmed number and is only replaced whole: `commit`, `confirm`, `rollback` and
   `recover` are one `os.replace` each. After a kill or power loss it holds either the old or the new numbers.
3. `commit` writes `ROLLBACK` first, a complete `CURRENT` for the way back: a rollback needs no free space.
4. Numbers only rise. The directories are the counter, so the highest number is never removed.
5. `CURRENT` and every manifest contain a seal, the SHA-256 of their own contents, computed the same way in all format
   versions, so that a newer version is never mistaken for damage.
6. Nothing but a regular file is opened, and no more is read than its manifest claims. A sealed file of another kind,
   such as a manifest in the place of `CURRENT`, is damage.
7. A confirmed generation also contains the empty file `.confirmed`, for the case that `CURRENT` or a generation that it
   names is damaged. It is written after `CURRENT`, so it never marks a generation that `CURRENT` did not confirm.

One process writes, from one thread: `Store.open` takes an advisory lock and holds it until `close` or exit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from device.files import sync_folder, take_lock
from edgeear.errors import DeviceError, FormatError, UsageError

FORMAT = 1
CURRENT, ROLLBACK, LOCK, MANIFEST, MARK = "CURRENT", "ROLLBACK", "LOCK", "manifest.json", ".confirmed"
_PARTIAL = re.compile(r"\.partial-([0-9]{8,}|CURRENT|ROLLBACK)")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DIRTY = getattr(errno, "EUCLEAN", errno.EIO)  # Linux only: the file system is damaged
_UNREADABLE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EIO,
    errno.EBADMSG,
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
    errno.ENAMETOOLONG,
    _DIRTY,
}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_MAX_SEALED = 1 << 20  # a manifest of some hundred files
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Damage:
    """What could not be read; `number` is None for `CURRENT` itself."""

    number: int | None
    file: str
    reason: str

    def __str__(self) -> str:
        where = "" if self.number is None else f"generation {self.number}, "
        return f"{where}{self.file}: {self.reason}"


class NewerStore(FormatError):
    """The store was written by a newer version; nothing was changed."""


class CorruptStore(FormatError):
    """A file of the store is missing, truncated or altered; `damage` says which."""

    def __init__(self, number: int | None, file: str, reason: str) -> None:
        self.damage = Damage(number, file, reason)
        super().__init__(f"{self.damage}; go back to another generation or restore the store from a backup")


class StoreFull(DeviceError):
    """No space left; the unfinished write was undone."""


class StoreBusy(DeviceError):
    """Another process, or another `Store` of this one, holds the store."""


class NoGeneration(UsageError):
    """No generation has this number, or none was ever confirmed."""


class NotLive(UsageError):
    """Only the live generation can be confirmed."""


@dataclass(frozen=True)
class Entry:
    """One file of a generation: `size` in bytes, `sha256` in lower-case hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a generation contains. `parent` was live when it was written, at `created`, the caller's time in seconds."""

    number: int
    parent: int | None
    created: float
    note: str
    files: tuple[Entry, ...]


@dataclass(frozen=True)
class _State:
    """The contents of `CURRENT`. `live != confirmed` means that the live generation is on probation."""

    live: int | None = None
    confirmed: int | None = None


class Disk:
    """Every operation with which a store changes the disk, so that tests can stop or fail each of them."""

    def create(self, path: Path) -> int:
        """A descriptor for writing a new file, which is read-only from then on."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)

    def write(self, descriptor: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def sync_dir(self, path: Path) -> None:
        sync_folder(path)

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, path: Path) -> None:
        path.rmdir()


class Store:
    """See the module's rules. Where the disk fails, methods raise `StoreFull` or another `DeviceError`."""

    def __init__(self, root: Path, keep: int, disk: Disk, lock: int) -> None:
        """Use `Store.open`."""
        self._root, self._keep, self._disk = root, keep, disk
        self._lock: int | None = lock
        self._state = _State()
        self.recovered_from: Damage | None = None
        """The damage that made this store fall back to another confirmed generation, None where there was none."""

    @classmethod
    def open(cls, root: Path, *, keep: int = 4, disk: Disk | None = None) -> Store:
        """Opens or creates the store in `root`, clears unfinished work, verifies what is live and confirmed.

        `keep` (at least 1) is how many of the newest generations `collect` leaves. Where `CURRENT` or what it
        names is damaged, the newest intact confirmed generation becomes live and `recovered_from` says why.
        Raises `CorruptStore` where there is none, `NewerStore`, `StoreBusy`, `StoreFull`.
        """
        if keep < 1:
            raise UsageError(f"keep={keep}: at least 1 generation must be kept")
        disk = disk or Disk()
        with _device_errors(root), ExitStack() as undo:
            root = root.absolute()
            _make_root(disk, root)
            busy = StoreBusy(f"{root} is in use: one process at a time may open it; stop the other one first")
            lock = take_lock(root / LOCK, busy)
            undo.callback(os.close, lock)
            store = cls(root, keep, disk, lock)
            store._start()
            undo.pop_all()
        return store

    def recover(self) -> int | None:
        """At a start: returns to the confirmed generation. Returns its number, None where nothing was confirmed."""
        confirmed = self._state.confirmed
        if self._state.live != confirmed:
            with self._changing():
                self._switch(_State(confirmed, confirmed))
        return confirmed

    @property
    def live(self) -> int | None:
        """The number of the serving generation."""
        return self._state.live

    @property
    def confirmed(self) -> int | None:
        """The number that `rollback` and `recover` go back to."""
        return self._state.confirmed

    @property
    def next_number(self) -> int:
        """The number of the next generation that is written."""
        return max(self._numbers(), default=0) + 1

    def write(self, files: Mapping[str, bytes], *, created: float, note: str = "") -> int:
        """Stores `files` as the next generation, not yet live, and returns its number. A failure leaves no files."""
        for name in files:
            _check_name(name)
        if not math.isfinite(created):
            raise UsageError(f"created={created}: give finite seconds")
        entries = tuple(Entry(name, len(data), _digest(data)) for name, data in sorted(files.items()))
        with self._changing(), ExitStack() as undo:
            number = self.next_number
            partial = self._partial(_dirname(number))
            undo.callback(self._discard, number)
            self._fill(partial, Manifest(number, self.live, float(created), note, entries), files)
            self._disk.replace(partial, self._dir(number))
            self._disk.sync_dir(self._root)
            undo.pop_all()
        return number

    def commit(self, number: int) -> None:
        """Verifies generation `number` and makes it live, unconfirmed until `confirm`."""
        confirmed = self._state.confirmed
        if number == confirmed:
            raise UsageError(f"generation {number} is confirmed already: use rollback() to return to it")
        self._require(number)
        self._verify(number)
        with self._changing():
            self._place(ROLLBACK, _State(confirmed, confirmed))
            self._switch(_State(number, confirmed))

    def confirm(self, number: int) -> None:
        """Makes the live generation permanent: from now on `rollback` and `recover` return to it."""
        if number != self.live:
            raise NotLive(f"generation {number} cannot be confirmed: {self.live} is live; commit it first")
        with self._changing():
            self._switch(_State(number, number))
            self._mark(number)

    def rollback(self) -> int:
        """Makes the confirmed generation live again and returns its number; where it is damaged, see `open`."""
        confirmed = self._state.confirmed
        if confirmed is None:
            raise NoGeneration("none to roll back to: no generation was confirmed yet; commit another one")
        with self._changing():
            try:
                self._verify(confirmed)
            except CorruptStore as error:
                return self._fall_back(error)
            self._switch(_State(confirmed, confirmed))
        return confirmed

    def read(self, number: int) -> dict[str, bytes]:
        """All files of a generation, verified. Raises `CorruptStore`, which names the damaged file."""
        self._require(number)
        return dict(self._contents(number))

    def manifest(self, number: int) -> Manifest:
        """The manifest of generation `number`; its files are not read."""
        self._require(number)
        return self._manifest(number)

    def generations(self) -> tuple[Manifest, ...]:
        """All manifests that can be read, in rising order."""
        found = []
        for number in self._numbers():
            with suppress(CorruptStore):
                found.append(self._manifest(number))
        return tuple(found)

    def collect(self, keep: int | None = None) -> tuple[int, ...]:
        """Removes old generations and returns their numbers.

        It keeps the newest `keep` (None: as given to `open`), the live one, the confirmed one, and the newest intact
        one that was confirmed before, to fall back to where the confirmed one is damaged.
        """
        with self._changing():
            numbers = self._numbers()
            spares = (n for n in self._marked() if n != self.confirmed and self._intact(n))
            held = {*numbers[-(keep or self._keep) :], self.live, self.confirmed, next(spares, None)}
            old = tuple(number for number in numbers if number not in held)
            if old:
                self._remove(old)
        return old

    def close(self) -> None:
        """Releases the lock; closing twice is allowed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Opening and falling back

    def _start(self) -> None:
        for path in list(self._root.iterdir()):
            if _PARTIAL.fullmatch(path.name):
                _remove_tree(self._disk, path)
        if not (self._root / CURRENT).exists() and not self._numbers():
            self._switch(_State())
        try:
            self._state = _state(self._root / CURRENT)
            for number in dict.fromkeys((self.live, self.confirmed)):
                if number is not None:
                    self._verify(number)
        except CorruptStore as error:
            self._fall_back(error)
        if self.confirmed is not None:
            self._mark(self.confirmed)

    def _fall_back(self, error: CorruptStore) -> int:
        """Makes the newest intact generation live that is or was confirmed."""
        for number in (self.confirmed, *self._marked()):
            if number is not None and self._intact(number):
                self._switch(_State(number, number))
                self.recovered_from = error.damage
                return number
        raise error

    def _marked(self) -> list[int]:
        return [n for n in reversed(self._numbers()) if (self._dir(n) / MARK).exists()]

    def _mark(self, number: int) -> None:
        """Marks a generation as confirmed. Failing is harmless: the next `open` tries again."""
        if not (self._dir(number) / MARK).exists():
            with suppress(OSError):
                _put(self._disk, self._dir(number) / MARK, b"")
                self._disk.sync_dir(self._dir(number))

    # Reading

    def _numbers(self) -> list[int]:
        with _device_errors(self._root):
            names = os.listdir(self._root)
        digits = (name for name in names if re.fullmatch("[0-9]{8,}", name))
        return sorted(int(name) for name in digits if name == _dirname(int(name)))

    def _dir(self, number: int) -> Path:
        return self._root / _dirname(number)

    def _require(self, number: int) -> None:
        if number not in (numbers := self._numbers()):
            raise NoGeneration(f"there is no generation {number}: the store has {numbers}")

    def _manifest(self, number: int) -> Manifest:
        body = _unsealed(self._dir(number) / MANIFEST, number)
        try:
            manifest = Manifest(**body | {"files": tuple(Entry(**entry) for entry in body["files"])})
            sound = all(_NAME.fullmatch(e.name) and type(e.size) is int and e.size >= 0 for e in manifest.files)
        except (KeyError, TypeError) as error:
            raise CorruptStore(number, MANIFEST, "it is no manifest") from error
        if not sound:
            raise CorruptStore(number, MANIFEST, "it names a file that no store has written")
        if manifest.number != number:
            raise CorruptStore(number, MANIFEST, f"it belongs to generation {manifest.number}")
        return manifest

    def _contents(self, number: int) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of each file, verified, one file in memory at a time."""
        for entry in self._manifest(number).files:
            data = _read(self._dir(number) / entry.name, number, entry.size)
            if len(data) != entry.size:
                raise CorruptStore(number, entry.name, f"{len(data)} bytes, the manifest says {entry.size}")
            if _digest(data) != entry.sha256:
                raise CorruptStore(number, entry.name, "its SHA-256 is not the manifest's")
            yield entry.name, data

    def _verify(self, number: int) -> None:
        for _ in self._contents(number):
            pass

    def _intact(self, number: int) -> bool:
        try:
            self._verify(number)
        except CorruptStore:
            return False
        return True

    # Changing the disk

    @contextmanager
    def _changing(self) -> Iterator[None]:
        if self._lock is None:
            raise UsageError(f"the store {self._root} is closed: open it again")
        with _device_errors(self._root):
            yield

    def _partial(self, name: str) -> Path:
        """The path where `name` is written or removed, without what an earlier failure left there."""
        path = self._root / f".partial-{name}"
        if path.exists():
            _remove_tree(self._disk, path)
        return path

    def _place(self, name: str, state: _State) -> None:
        partial = self._partial(name)
        _put(self._disk, partial, _sealed(asdict(state)))
        self._disk.replace(partial, self._root / name)

    def _prepared(self, state: _State) -> bool:
        try:
            return _read(self._root / ROLLBACK, None, _MAX_SEALED) == _sealed(asdict(state))
        except CorruptStore:
            return False

    def _switch(self, state: _State) -> None:
        """Replaces `CURRENT`. Memory equals what the disk shows, even where the fsync after it fails."""
        if self._prepared(state):
            self._disk.replace(self._root / ROLLBACK, self._root / CURRENT)
        else:
            self._place(CURRENT, state)
        self._state = state
        self._disk.sync_dir(self._root)

    def _fill(self, partial: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        self._disk.mkdir(partial)
        parents = self._parent_files()
        for entry in manifest.files:
            source, target = parents.get(entry.sha256), partial / entry.name
            if source is None or not self._link(source, target, files[entry.name]):
                _put(self._disk, target, files[entry.name])
        _put(self._disk, partial / MANIFEST, _sealed(asdict(manifest)))
        self._disk.sync_dir(partial)

    def _parent_files(self) -> dict[str, Path]:
        """SHA-256 -> file of the live generation."""
        if self.live is None:
            return {}
        with suppress(CorruptStore):
            folder = self._dir(self.live)
            return {entry.sha256: folder / entry.name for entry in self._manifest(self.live).files}
        return {}

    def _link(self, source: Path, target: Path, data: bytes) -> bool:
        """False where the source is damaged or the file system has no hard links."""
        try:
            if _read(source, self.live, len(data)) != data:
                return False
            self._disk.link(source, target)
        except CorruptStore:
            return False
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False
            raise
        return True

    def _discard(self, number: int) -> None:
        """Undoes an unfinished `write`; the next `open` removes what cannot be removed now."""
        with suppress(OSError):
            partial = self._root / f".partial-{_dirname(number)}"
            if self._dir(number).exists():
                self._disk.replace(self._dir(number), partial)
            if partial.exists():
                _remove_tree(self._disk, partial)

    def _remove(self, numbers: tuple[int, ...]) -> None:
        """Renames first, so that no generation is ever visible in part."""
        # If the fsync of the last switch failed, `CURRENT` must be on disk before older generations are removed.
        self._disk.sync_dir(self._root)
        partials = [self._partial(_dirname(number)) for number in numbers]
        for number, partial in zip(numbers, partials, strict=True):
            self._disk.replace(self._dir(number), partial)
        self._disk.sync_dir(self._root)
        for partial in partials:
            _remove_tree(self._disk, partial)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name.lower() == MANIFEST:
        raise UsageError(
            f"file name {name!r}: use 1 to 128 ASCII letters, digits, '.', '_' and '-', "
            f"with no '.' or '-' in front, and not {MANIFEST}"
        )


def _dirname(number: int) -> str:
    return f"{number:08d}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seal(body: dict[str, Any]) -> str:
    return _digest(json.dumps(body, sort_keys=True).encode("ascii"))


def _sealed(fields: dict[str, Any]) -> bytes:
    body = {"format": FORMAT, **fields}
    return json.dumps(body | {"seal": _seal(body)}, indent=1).encode("ascii")


def _unsealed(path: Path, number: int | None) -> dict[str, Any]:
    """The fields of a sealed JSON file, whichever it is."""
    data = _read(path, number, _MAX_SEALED)
    try:
        body: dict[str, Any] = json.loads(data)
        intact = body.pop("seal") == _seal(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CorruptStore(number, path.name, "its seal does not match its contents")
    if (version := body.pop("format")) != FORMAT:
        raise NewerStore(f"{path}: format {version}, this version reads up to {FORMAT}; update the software")
    return body


def _state(path: Path) -> _State:
    named = _unsealed(path, None)
    numbers = all(number is None or (type(number) is int and number > 0) for number in named.values())
    if set(named) != {"live", "confirmed"} or not numbers:
        raise CorruptStore(None, path.name, "it names no generations")
    return _State(**named)


def _read(path: Path, number: int | None, most: int) -> bytes:
    """The bytes of a regular file. Of a longer one than `most`, `most` + 1 bytes."""
    try:
        # A pipe or a device must not be waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CorruptStore(number, path.name, "it is not a regular file")
            return file.read(most + 1)
    except OSError as error:
        # One file of a generation that may not be read is damage of that generation; the whole store is not.
        if error.errno in _UNREADABLE or (number is not None and error.errno in _FORBIDDEN):
            raise CorruptStore(number, path.name, str(error.strerror)) from error
        raise _device_error(path, error) from error


def _put(disk: Disk, path: Path, data: bytes) -> None:
    descriptor = disk.create(path)
    try:
        disk.write(descriptor, data)
        disk.sync(descriptor)
    finally:
        os.close(descriptor)


def _remove_tree(disk: Disk, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for child in list(path.iterdir()):
            _remove_tree(disk, child)
        disk.rmdir(path)
    else:
        disk.unlink(path)


def _make_root(disk: Disk, root: Path) -> None:
    if not root.exists():
        _make_root(disk, root.parent)
        disk.mkdir(root)
        disk.sync_dir(root.parent)


@contextmanager
def _device_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except DeviceError:
        raise
    except OSError as error:
        raise _device_error(root, error) from error


def _device_error(path: Path, error: OSError) -> DeviceError:
    if error.errno in _FULL:
        return StoreFull(f"{path}: {error.strerror}; collect old generations or free space")
    return DeviceError(f"{path}: {error.strerror}; check the disk and the permissions")
