"""A bounded disk cache of features, so that a frozen encoder sees every file once.

Rules that this file owns:
1. A row is named by the content it was computed from (SHA-256), the encoder, the view and the tap, never by a
   path.
2. A row read is the row written, bit for bit: each carries a CRC-32 of key and content, or counts as missing.
3. Rows take at most `max_bytes`; beyond it the least recently used go, a tenth of the bound at a time.
4. The cache can only cost time. A damaged database is set aside and rebuilt, a full disk or a stubborn lock
   ends the writing; both leave a sentence in `warnings` and never an exception.
5. Any number of processes may use one file. One object belongs to the thread that made it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import stat
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeear.errors import DataError, DeviceError, UsageError

APPLICATION, VERSION = 0x65646765, 1
"""Written into the database; one that says otherwise is set aside."""
CHUNK = 500
"""Rows per SQL statement."""
MAX_FILES = 200_000
"""How many files' digests are remembered."""
ROW_OVERHEAD = 256
"""Bytes that a row is charged beside its payload: keys, header and index."""

_TABLES = """
CREATE TABLE totals (bytes INTEGER NOT NULL, tick INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0);
CREATE TABLE rows (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, bytes INTEGER NOT NULL, used INTEGER NOT NULL);
CREATE TABLE payloads (
    id INTEGER PRIMARY KEY, header BLOB NOT NULL, crc INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE files (
    place INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, stamp BLOB NOT NULL, digest BLOB NOT NULL,
    crc INTEGER NOT NULL);
CREATE TRIGGER added AFTER INSERT ON rows BEGIN UPDATE totals SET bytes = bytes + new.bytes; END;
CREATE TRIGGER dropped AFTER DELETE ON rows BEGIN
    UPDATE totals SET bytes = bytes - old.bytes;
    DELETE FROM payloads WHERE id = old.id;
END;
"""

# A damaged schema comes back as text that is not UTF-8.
_FAILURES = (sqlite3.DatabaseError, UnicodeDecodeError)
_MACHINE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}

Array = NDArray[Any]
Result = TypeVar("Result")


class FeatureKey(NamedTuple):
    """What a row holds: `tap`, or a group of taps, of `view` of the file with SHA-256 `content`."""

    content: bytes
    encoder: str
    view: str
    tap: str

    def digest(self) -> bytes:
        """The row's name in the database: 20 bytes."""
        rest = "\0".join((self.encoder, self.view, self.tap)).encode()
        return hashlib.blake2b(self.content + rest, digest_size=20).digest()


class FeatureCache:
    """The cache in the SQLite file `path` (write-ahead log), made if it is not there."""

    def __init__(self, path: Path, max_bytes: int, *, timeout_s: float = 30.0) -> None:
        """Open or make the cache and evict down to `max_bytes`; wait for other processes up to `timeout_s`.

        Raises `UsageError` for `max_bytes < 1`, `DeviceError` if the file can be neither opened nor made.
        """
        if max_bytes < 1:
            raise UsageError(f"max_bytes={max_bytes}: the feature cache needs at least 1 byte")
        self.path, self.max_bytes, self._timeout_s = Path(path), max_bytes, timeout_s
        self._warnings: list[str] = []
        self._writing = True
        self._used: set[int] = set()
        self._database = self._open()
        self._guarded(self._shrink, None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What went wrong so far, in sentences for the user; empty when all is well."""
        return tuple(self._warnings)

    @property
    def total_bytes(self) -> int:
        """Bytes charged for all rows: payloads and `ROW_OVERHEAD` each."""
        return self._guarded(lambda: self._total("bytes"), 0)

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write down which rows were used and close; the object is of no further use."""
        self._write(self._flush_used)
        self._database.close()

    def get_many(self, keys: Sequence[FeatureKey]) -> list[Array | None]:
        """The rows of `keys` in order, each float16 or float32 and read-only; None where there is none."""
        names = [key.digest() for key in keys]
        nothing: dict[bytes, Array] = {}
        found = self._guarded(lambda: self._read(names), nothing)
        return [found.get(name) for name in names]

    def put_many(self, rows: Sequence[tuple[FeatureKey, Array]]) -> None:
        """Store float16 or float32 arrays in one transaction, replacing what is there, then evict.

        Raises `DataError` for NaN or infinity, `UsageError` for another type; then nothing is stored.
        """
        packed = [_pack(key, array) for key, array in rows]
        self._write(lambda: self._insert(packed))

    def _read(self, names: Sequence[bytes]) -> dict[bytes, Array]:
        found: dict[bytes, Array] = {}
        for start in range(0, len(names), CHUNK):
            with self._transaction("BEGIN"):  # one snapshot: places are given anew after an eviction
                found.update(self._read_chunk(names[start : start + CHUNK]))
        return found

    def _read_chunk(self, names: Sequence[bytes]) -> Iterator[tuple[bytes, Array]]:
        run = self._database.execute
        named = dict(run(f"SELECT id, key FROM rows WHERE key IN ({_marks(names)})", names))
        # By place, which is the order in which they lie on the disk.
        query = f"SELECT id, header, crc, data FROM payloads WHERE id IN ({_marks(named)})"
        for place, header, crc, data in run(query, list(named)):
            array = _unpack(named[place], header, crc, data)
            if array is not None:
                self._used.add(place)
                yield named[place], array

    def _insert(self, packed: Sequence[tuple[bytes, bytes, int, bytes]]) -> None:
        self._flush_used()
        tick = self._tick()
        run = self._database.execute
        for name, header, crc, data in packed:
            run("DELETE FROM rows WHERE key = ?", (name,))
            size = len(data) + ROW_OVERHEAD
            place = run("INSERT INTO rows (key, bytes, used) VALUES (?, ?, ?)", (name, size, tick)).lastrowid
            run("INSERT INTO payloads VALUES (?, ?, ?, ?)", (place, header, crc, data))
        self._evict()

    def _flush_used(self) -> None:
        if self._used:
            tick = self._tick()
            places, self._used = self._used, set()
            change = "UPDATE rows SET used = ? WHERE id = ?"
            self._database.executemany(change, [(tick, place) for place in sorted(places)])

    def _tick(self) -> int:
        self._database.execute("UPDATE totals SET tick = tick + 1")
        return self._total("tick")

    def _evict(self) -> None:
        held = self._total("bytes")
        if held <= self.max_bytes:
            return
        surplus = held - self.max_bytes * 9 // 10
        oldest: list[tuple[int]] = []
        query = "SELECT id, bytes FROM rows ORDER BY used, id"
        for place, size in self._database.execute(query):
            if surplus <= 0:
                break
            oldest.append((place,))
            surplus -= _whole(size)
        self._database.executemany("DELETE FROM rows WHERE id = ?", oldest)

    def digests(self, paths: Sequence[Path]) -> list[bytes | None]:
        """SHA-256 (32 bytes) of every file's content, in order; None for one that cannot be read.

        A file whose path, size and times of change are as they were at the last call is not read again.
        """
        places = [os.fsencode(os.path.abspath(path)) for path in paths]
        stamps = [_stamp(path) for path in paths]
        nothing: dict[bytes, tuple[bytes, bytes]] = {}
        known = self._guarded(lambda: self._known_files(places), nothing)
        digests: list[bytes | None] = []
        fresh: dict[bytes, tuple[bytes, bytes]] = {}
        for path, place, stamp in zip(paths, places, stamps, strict=True):
            old_stamp, old_digest = known.get(place, (b"", b""))
            digest = None if stamp is None else old_digest if stamp == old_stamp else _file_digest(path)
            # A file written while it was read is remembered only once it rests.
            if stamp and digest and stamp != old_stamp and stamp == _stamp(path):
                fresh[place] = (stamp, digest)
            digests.append(digest)
        if fresh:
            self._write(lambda: self._remember_files(fresh))
        return digests

    def _known_files(self, places: Sequence[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
        known: dict[bytes, tuple[bytes, bytes]] = {}
        for start in range(0, len(places), CHUNK):
            some = places[start : start + CHUNK]
            query = f"SELECT path, stamp, digest, crc FROM files WHERE path IN ({_marks(some)})"
            for path, stamp, digest, crc in self._database.execute(query, some):
                parts = (path, stamp, digest)
                if all(isinstance(part, bytes) for part in parts) and _crc(*parts) == crc:
                    known[path] = (stamp, digest)
        return known

    def _remember_files(self, fresh: dict[bytes, tuple[bytes, bytes]]) -> None:
        rows = [(place, *pair, _crc(place, *pair)) for place, pair in fresh.items()]
        put = "INSERT OR REPLACE INTO files (path, stamp, digest, crc) VALUES (?, ?, ?, ?)"
        self._database.executemany(put, rows)
        # A replaced row gets the highest place, so the lowest are the longest unchanged.
        bound = "DELETE FROM files WHERE place <= (SELECT max(place) FROM files) - ?"
        self._database.execute(bound, (MAX_FILES,))

    def _total(self, column: str) -> int:
        row = self._database.execute(f"SELECT {column} FROM totals").fetchone()
        return _whole(row[0] if row else None)

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                return self._connect()
        except (OSError, sqlite3.DatabaseError) as error:
            message = f"feature cache {self.path} cannot be opened ({error}): check its folder and the disk"
            raise DeviceError(message) from error

    def _connect(self) -> sqlite3.Connection:
        """Open the file, setting it aside first if it is no usable cache. Call it under `_alone`."""
        database = _connection(self.path, self._timeout_s)
        try:
            reason = "" if _prepare(database) else "is no cache of this version"
        except _FAILURES as error:
            if not _damaged(error):
                database.close()
                raise
            reason = f"is damaged ({error})"
        if reason:
            database.close()
            self._set_aside(reason)
            database = _connection(self.path, self._timeout_s)
            _prepare(database)
        self._inode = self.path.stat().st_ino
        return database

    def _set_aside(self, reason: str) -> None:
        aside = self.path.with_name(self.path.name + ".damaged")
        os.replace(self.path, aside)
        for tail in ("-wal", "-shm"):
            self.path.with_name(self.path.name + tail).unlink(missing_ok=True)
        self._warnings.append(f"feature cache {self.path} {reason}; moved to {aside.name} and begun anew")

    def _reopen(self, error: Exception) -> None:
        """After damage met in use: the first process sets the file aside, the others open the new one."""
        self._database.close()
        self._used = set()
        try:
            with self._alone():
                if self.path.exists() and self.path.stat().st_ino == self._inode:
                    self._set_aside(f"is damaged ({error})")
                self._database = self._connect()
        except (OSError, sqlite3.DatabaseError) as failure:
            self._database = sqlite3.connect(":memory:", isolation_level=None)
            _prepare(self._database)
            self._give_up(f"is damaged ({error}) and cannot be replaced ({failure})")

    def _give_up(self, reason: str) -> None:
        self._writing = False
        warning = f"feature cache {self.path} {reason}; no more is written to it"
        if warning not in self._warnings:
            self._warnings.append(warning)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from opening or replacing the file meanwhile."""
        with open(self.path.with_name(self.path.name + ".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self._database.execute(begin)
        try:
            yield
            self._database.execute("COMMIT")
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def _write(self, work: Callable[[], None]) -> None:
        def transaction() -> None:
            with self._transaction("BEGIN IMMEDIATE"):
                work()

        if self._writing:
            self._guarded(transaction, None)

    def _shrink(self) -> None:
        """Evict, and give the freed pages back to the disk: the bound may be lower than at the last run."""
        if self._total("bytes") > self.max_bytes:
            self._write(self._evict)
            # As a script: it makes one empty row a page, and `execute` stops at the first.
            self._database.executescript("PRAGMA incremental_vacuum;")
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _guarded(self, work: Callable[[], Result], fallback: Result) -> Result:
        """`work()`, or `fallback` with a warning when the database or the disk gives out."""
        try:
            return work()
        except sqlite3.ProgrammingError:  # a bug, such as use after close
            raise
        except _FAILURES as error:
            if _damaged(error):
                self._reopen(error)
            else:
                self._give_up(f"failed ({error})")
            return fallback


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise sqlite3.DatabaseError(f"{value!r} stands where a number should")
    return value


def _crc(*parts: bytes) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _marks(values: Collection[object]) -> str:
    return ",".join("?" * len(values))


def _pack(key: FeatureKey, array: Array) -> tuple[bytes, bytes, int, bytes]:
    """`(name, header, CRC-32 of all, data)`; the header is JSON: little-endian type and shape."""
    if array.dtype not in (np.float16, np.float32):
        raise UsageError(f"features of {key.tap} are {array.dtype}: the cache holds float16 and float32")
    if not np.isfinite(array).all():
        content = key.content.hex()[:12]
        raise DataError(f"features of {key.tap} (file {content}...) hold NaN or infinity: check the encoder")
    header = json.dumps([f"<f{array.dtype.itemsize}", *array.shape]).encode()
    data = array.astype(f"<f{array.dtype.itemsize}", copy=False).tobytes()
    name = key.digest()
    return name, header, _crc(name, header, data), data


def _unpack(name: bytes, header: object, crc: object, data: object) -> Array | None:
    """The array, or None if it is not what was written under `name`."""
    if not (isinstance(header, bytes) and isinstance(data, bytes)):
        return None
    if _crc(name, header, data) != crc:
        return None
    dtype, *shape = json.loads(header)
    return np.frombuffer(data, dtype).reshape(shape)


def _stamp(path: Path) -> bytes | None:
    """Size and times of change of a regular file; the inode's own time, because tools set the other one back."""
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        return None
    return b"%d %d %d" % (found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _file_digest(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


def _connection(path: Path, timeout_s: float) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=timeout_s, isolation_level=None)


def _prepare(database: sqlite3.Connection) -> bool:
    """Make the tables in an empty database. False if it holds something else."""
    run = database.execute
    if run("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
        run("PRAGMA auto_vacuum = INCREMENTAL")
        run("PRAGMA journal_mode = WAL")
        marks = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION};"
        database.executescript(f"BEGIN IMMEDIATE; {_TABLES} {marks} COMMIT;")
    run("PRAGMA synchronous = NORMAL")  # a power cut may cost the last rows, never the database
    run(f"PRAGMA journal_size_limit = {16 << 20}")
    identity = run("PRAGMA application_id").fetchone() + run("PRAGMA user_version").fetchone()
    return identity == (APPLICATION, VERSION) and run("SELECT bytes FROM totals").fetchone() is not None


def _damaged(error: Exception) -> bool:
    """Whether the file is at fault: all that the machine is not, since the statements are always the same."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF not in _MACHINE
