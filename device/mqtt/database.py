"""One SQLite file of one process: durable transactions, damage set aside, a newer format left alone.

Rules of this file:

1. Write-ahead log with `synchronous=FULL`: what `write` returned from survives kill -9 and power loss.
2. `write` runs its work in one transaction. Where the disk is full it is undone, the log is emptied into the
   file, and the work runs once more; so work must not change anything outside the transaction.
3. A log that cannot be emptied on a full disk would block even deleting. So some room is held in reserve and given
   up for that; while it cannot be had again the file may not grow, and only deleting makes room.
4. One process at a time: an advisory lock on `NAME.lock`, held until `close` or exit. That file also is the
   reserve, and carries a number, the boot, so that boots rise even when the database itself is lost.
5. A damaged file is never read on: it becomes `NAME.damaged` (the one before is given up) and a fresh one takes
   its place. A file of a newer format, or of another program, is refused before anything is written to it.
6. Freed pages are used again; `shrink` gives them back to the disk, which is cheap when little is stored.

Not thread-safe: the caller brings the lock.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from device.files import sync_folder, take_lock
from edgeear.errors import DeviceError, FormatError, UsageError

T = TypeVar("T")
SLACK_PAGES = 256
"""Free pages (of 4 KiB) that `shrink` leaves alone: they will be wanted again soon."""
LOG_PAGES = 256
"""Pages at which the log is emptied. It keeps that room on disk, to be written in when the disk is full."""
RESERVE_BYTES = 2 << 20
"""Room to empty the log into: LOG_PAGES, doubled for what a failing attempt adds."""
_DIGITS = 20
_NO_LIMIT = 4_294_967_294
_READ_ERRORS = {266, 522, 8458}
"""SQLite's IOERR_READ, IOERR_SHORT_READ and IOERR_CORRUPTFS: the disk cannot give the bytes back."""


@dataclass(frozen=True)
class SetAside:
    """A damaged file: where it lies now, and what was wrong with it."""

    path: Path
    reason: str


class OutboxBusy(DeviceError):
    """Another process, or another `Outbox` of this one, holds the file."""


class OutboxFull(DeviceError):
    """No space left on the disk; what was being written was undone, nothing that was stored is lost."""


class OutboxDamaged(DeviceError):
    """The file was found damaged while in use; it was set aside (see `aside`), open again for a fresh one."""

    def __init__(self, path: Path, aside: SetAside) -> None:
        self.aside = aside
        super().__init__(f"{path}: {aside.reason}; it is now {aside.path}; open again for a fresh one")


class NewerOutbox(FormatError):
    """The file was written by a newer version, or by another program; it was not changed."""


class Database:
    """See the module's rules. Where the disk fails, methods raise `OutboxFull` or another `DeviceError`."""

    def __init__(self, path: Path, lock: int) -> None:
        """Use `Database.open`."""
        self._path, self._lock = path, lock
        self._connection: sqlite3.Connection | None = None
        self._aside: SetAside | None = None

    @classmethod
    def open(cls, path: Path, version: int, schema: str) -> tuple[Database, SetAside | None]:
        """Opens or creates `path` with the tables of `schema` (SQL), whose format is `version` (at least 1).

        Also says which damaged file had to make way, if one had to. Raises `OutboxBusy`, `NewerOutbox`,
        `OutboxFull`, `DeviceError`.
        """
        path = path.absolute()
        with ExitStack() as undo, _typed(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            database = cls(path, _take_lock(path.with_name(path.name + ".lock")))
            undo.callback(database.close)
            _probe(path, version)
            aside = None
            try:
                with _typed(path):
                    database._start(version, schema)
            except _Damaged as damage:
                aside = database._set_aside(str(damage))
                database._start(version, schema)
            undo.pop_all()
        return database, aside

    @property
    def connection(self) -> sqlite3.Connection:
        """For reading; finish every cursor, since an open one keeps the log from being emptied."""
        if self._connection is not None:
            return self._connection
        if self._aside is not None and self._lock >= 0:
            raise OutboxDamaged(self._path, self._aside)
        raise UsageError(f"{self._path} is closed: open it again")

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` outside any transaction."""
        with self._guarded():
            return work(self.connection)

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` in one transaction, durable on return; on any exception nothing has changed."""
        with self._guarded():
            try:
                return self._transaction(work)
            except OutboxFull:
                self._relieve()
                return self._transaction(work)

    def shrink(self) -> None:
        """Gives free pages back to the disk where they are many. A full disk puts it off."""
        with self._guarded(), suppress(OutboxFull), _typed(self._path):
            if _number(self.connection, "freelist_count") > SLACK_PAGES:
                # A script, because `execute` would stop after the first page.
                self.connection.executescript("PRAGMA incremental_vacuum").close()
                self._empty_log()
                self._reserve()

    def remembered(self) -> int:
        """The number beside the database, 0 where there is none."""
        with _typed(self._path):
            digits = os.pread(self._lock, _DIGITS, 0)
        return int(digits) if digits.isdigit() else 0

    def remember(self, number: int) -> None:
        """Keeps `number` beside the database, in one write of one sector. A second copy: failing is no failure."""
        with suppress(OSError):
            os.pwrite(self._lock, b"%0*d" % (_DIGITS, number), 0)
            os.fsync(self._lock)

    def close(self) -> None:
        """Closes the file and releases the lock; closing twice is allowed."""
        self._disconnect()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _start(self, version: int, schema: str) -> None:
        """Connects, checks the whole file and lays down the tables where it is new."""
        # The exclusive mode comes before the first read: it needs no shared memory, and keeps readers out behind
        # whose back the log could grow without end. auto_vacuum comes before the first page is written.
        self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=0)
        for setting in (
            "locking_mode=EXCLUSIVE",
            "auto_vacuum=INCREMENTAL",
            "journal_mode=WAL",
            "synchronous=FULL",
            f"wal_autocheckpoint={LOG_PAGES}",
            f"journal_size_limit={LOG_PAGES << 12}",
            "trusted_schema=OFF",
        ):
            self._connection.execute(f"PRAGMA {setting}").fetchall()
        ((found,),) = self._connection.execute("PRAGMA quick_check(1)").fetchall()
        if found != "ok":
            raise _Damaged(found)
        _refuse_foreign(self._connection, self._path, version)
        if _number(self._connection, "user_version") == 0:
            self._transaction(lambda db: _create(db, version, schema))
        self._reserve()
        sync_folder(self._path.parent)

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        db = self.connection
        with _typed(self._path):
            db.execute("BEGIN IMMEDIATE")
            try:
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some errors
                    db.execute("ROLLBACK")
                raise
        return result

    def _relieve(self) -> None:
        """Empties the log on a full disk, into the room held in reserve."""
        os.ftruncate(self._lock, _DIGITS)
        with suppress(OutboxFull), _typed(self._path):
            self._empty_log()
        self._reserve()

    def _empty_log(self) -> None:
        self.connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def _reserve(self) -> None:
        """Holds the reserve; where the disk has no room for it, the file stays at its size for now."""
        limit = _NO_LIMIT
        try:
            os.posix_fallocate(self._lock, 0, RESERVE_BYTES)
        except OSError:
            os.ftruncate(self._lock, _DIGITS)
            limit = _number(self.connection, "page_count")
        self.connection.execute(f"PRAGMA max_page_count={limit}").fetchall()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Types SQLite's errors, and sets a file aside that proves damaged while in use."""
        try:
            with _typed(self._path):
                yield
        except _Damaged as damage:
            self._aside = self._set_aside(str(damage))
            raise OutboxDamaged(self._path, self._aside) from damage

    def _set_aside(self, reason: str) -> SetAside:
        self._disconnect()
        target = self._path.with_name(self._path.name + ".damaged")
        # The log first: the file alone is found damaged again should we be killed between the two.
        for suffix in ("-wal", ""):
            source, goal = (p.with_name(p.name + suffix) for p in (self._path, target))
            goal.unlink(missing_ok=True)
            if source.exists():
                os.replace(source, goal)
        sync_folder(self._path.parent)
        return SetAside(target, reason)

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


class _Damaged(Exception):
    """Turned into `SetAside` or `OutboxDamaged` before it leaves this file."""


def _number(db: sqlite3.Connection, pragma: str) -> int:
    ((value,),) = db.execute(f"PRAGMA {pragma}").fetchall()
    return int(value)


def _create(db: sqlite3.Connection, version: int, schema: str) -> None:
    for statement in schema.split("\n\n"):
        db.execute(statement)
    db.execute(f"PRAGMA user_version={version}")


def _probe(path: Path, version: int) -> None:
    """Read-only, so that the log of a newer version stays as it is too. What cannot be read is judged later."""
    if path.exists():
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db, suppress(sqlite3.DatabaseError):
            _refuse_foreign(db, path, version)


def _refuse_foreign(db: sqlite3.Connection, path: Path, version: int) -> None:
    found = _number(db, "user_version")
    ((tables,),) = db.execute("SELECT count(*) FROM sqlite_master").fetchall()
    if found > version:
        raise NewerOutbox(f"{path}: format {found}, this version reads up to {version}; update the software")
    if tables and not found:
        raise NewerOutbox(f"{path}: a database of another program; choose another path")


def _take_lock(path: Path) -> int:
    descriptor = take_lock(path)
    if descriptor is None:
        raise OutboxBusy(f"{path} is in use: one process at a time may hold it; stop the other one first")
    return descriptor


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    try:
        yield
    except DeviceError:
        raise
    except OSError as error:
        raise DeviceError(f"{path}: {error.strerror}; check the disk and the permissions") from error
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # our own mistake
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or code in _READ_ERRORS:
            raise _Damaged(str(error)) from error
        if code & 0xFF == sqlite3.SQLITE_FULL:
            raise OutboxFull(f"{path}: {error}; free space on the disk") from error
        raise DeviceError(f"{path}: {error}; check the disk and the permissions") from error
