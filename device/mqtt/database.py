"""One SQLite file for one process: durable transactions, recovery from damage, refusal of newer formats.

Rules of this file:

1. Write-ahead log with `synchronous=FULL`: when `write` returns, its changes survive kill -9 and power loss.
2. `write` runs its work in one transaction. If the disk is full, the transaction is rolled back, the log is emptied
   into the file, and the work runs once more. So work must not change anything outside the transaction.
3. On a full disk a log that cannot be emptied would block even deleting. So some room is reserved and released for
   that. Until it can be reserved again the file may not grow, and only deleting makes room.
4. One process at a time: an advisory lock on `NAME.lock`, held until `close` or exit. That file is also the
   reserve, and it stores a number, the boot, so that boots rise even if the database is lost.
5. A damaged file is not read any more: it is renamed to `NAME.damaged` (replacing an earlier one) and a new one takes
   its place. A file of a newer format, or of another program, is refused before anything is written to it.
   Damage that touches only contents, not the structure, is for the caller to find: text that is no UTF-8 is read with
   U+FFFD in place of the wrong bytes, and a value may have another type than its column.
6. Freed pages are reused. `shrink` returns them to the disk, which is cheap when little is stored.

Not thread-safe: the caller must hold a lock.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from device.files import sync_folder, take_lock
from edgeear.errors import DeviceError, FormatError, UsageError

T = TypeVar("T")
SLACK_PAGES = 256
"""Free pages (of 4 KiB) that `shrink` keeps, because they will soon be needed again."""
LOG_PAGES = 256
"""Pages at which the log is emptied. The log file keeps that size, so it can be written to when the disk is full."""
RESERVE_BYTES = 2 << 20
"""Room to empty the log into: LOG_PAGES, doubled because a failing attempt adds pages."""
FAULTS = 100
"""SQLite's check of a file ends after so many."""
_DIGITS = 20
_NO_LIMIT = 4_294_967_294
_READ_ERRORS = {266, 522, 8458}
"""SQLite's IOERR_READ, IOERR_SHORT_READ and IOERR_CORRUPTFS: the disk cannot read the bytes."""


@dataclass(frozen=True)
class SetAside:
    """A damaged file: where it is now, and what was wrong with it."""

    path: Path
    reason: str


class OutboxBusy(DeviceError):
    """Another process, or another `Outbox` of this process, has the file open."""


class OutboxFull(DeviceError):
    """No space left on the disk. The write was rolled back; nothing that was stored is lost."""


class OutboxDamaged(DeviceError):
    """The file proved damaged while in use and was renamed (see `aside`); open the outbox again for a new one."""

    def __init__(self, path: Path, aside: SetAside) -> None:
        self.aside = aside
        super().__init__(f"{path}: {aside.reason}; it was renamed to {aside.path}; open again for a new one")


class NewerOutbox(FormatError):
    """The file was written by a newer version, or by another program; it was not changed."""


class Database:
    """See the module's rules. If the disk fails, methods raise `OutboxFull` or another `DeviceError`."""

    def __init__(self, path: Path, lock: int) -> None:
        """Use `Database.open`."""
        self._path, self._lock = path, lock
        self._connection: sqlite3.Connection | None = None
        self._aside: SetAside | None = None

    @classmethod
    def open(
        cls, path: Path, version: int, schema: str, contents: Sequence[str] = ()
    ) -> tuple[Database, SetAside | None]:
        """Opens or creates `path` with the tables of `schema` (SQL), whose format is `version` (at least 1). A wrong
        type in the columns `contents` (TABLE.COLUMN) does not make the file a damaged one: the caller checks them.

        Also returns the damaged file that was renamed, if any. Raises `OutboxBusy`, `NewerOutbox`,
        `OutboxFull`, `DeviceError`.
        """
        path = path.absolute()
        with ExitStack() as undo, _typed(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            busy = OutboxBusy(f"{path} is in use: one process at a time may open it; stop the other one first")
            database = cls(path, take_lock(path.with_name(path.name + ".lock"), busy))
            undo.callback(database.close)
            _probe(path, version)
            aside = None
            try:
                with _typed(path):
                    database._start(version, schema, contents)
            except _Damaged as damage:
                aside = database._set_aside(str(damage))
                database._start(version, schema, contents)
            undo.pop_all()
        return database, aside

    @property
    def connection(self) -> sqlite3.Connection:
        """For reading. Finish every cursor: while one is open the log cannot be emptied."""
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
        """Runs `work` in one transaction, durable on return. After an exception nothing has changed."""
        with self._guarded():
            try:
                return self._transaction(work)
            except OutboxFull:
                self._relieve()
                return self._transaction(work)

    def shrink(self) -> None:
        """Returns free pages to the disk if there are many. Does nothing on a full disk."""
        with self._guarded(), suppress(OutboxFull), _typed(self._path):
            if _number(self.connection, "freelist_count") > SLACK_PAGES:
                # A script, because `execute` would stop after the first page.
                self.connection.executescript("PRAGMA incremental_vacuum").close()
                self._empty_log()
                self._reserve()

    def remembered(self) -> int:
        """The number in the lock file, 0 if there is none."""
        with _typed(self._path):
            digits = os.pread(self._lock, _DIGITS, 0)
        return int(digits) if digits.isdigit() else 0

    def remember(self, number: int) -> None:
        """Stores `number` in the lock file, in one write of one sector. It is a second copy, so errors are ignored."""
        with suppress(OSError):
            os.pwrite(self._lock, b"%0*d" % (_DIGITS, number), 0)
            os.fsync(self._lock)

    def close(self) -> None:
        """Closes the file and releases the lock. May be called twice."""
        self._disconnect()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _start(self, version: int, schema: str, contents: Sequence[str]) -> None:
        """Connects, checks the whole file and creates the tables if it is new."""
        # The exclusive mode must be set before the first read: it needs no shared memory and keeps out readers, which
        # would let the log grow without end. auto_vacuum must be set before the first page is written.
        self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=0)
        self._connection.text_factory = lambda text: text.decode("utf-8", "replace")
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
        faults = [found for (found,) in self._connection.execute("PRAGMA quick_check").fetchall()]
        structural = [
            text for text in faults if text != "ok" and not text.endswith(tuple(f" value in {c}" for c in contents))
        ]
        if structural or len(faults) == FAULTS:
            raise _Damaged((structural or faults)[0])
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
                with suppress(sqlite3.Error):  # after some errors SQLite has already rolled back
                    db.execute("ROLLBACK")
                raise
        return result

    def _relieve(self) -> None:
        """Empties the log on a full disk, into the reserved room."""
        os.ftruncate(self._lock, _DIGITS)
        with suppress(OutboxFull), _typed(self._path):
            self._empty_log()
        self._reserve()

    def _empty_log(self) -> None:
        self.connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def _reserve(self) -> None:
        """Takes the reserve. If the disk has no room for it, the file may not grow for now."""
        limit = _NO_LIMIT
        try:
            os.posix_fallocate(self._lock, 0, RESERVE_BYTES)
        except OSError:
            os.ftruncate(self._lock, _DIGITS)
            limit = _number(self.connection, "page_count")
        self.connection.execute(f"PRAGMA max_page_count={limit}").fetchall()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns SQLite's errors into ours, and renames a file that proves damaged while in use."""
        try:
            with _typed(self._path):
                yield
        except _Damaged as damage:
            self._aside = self._set_aside(str(damage))
            raise OutboxDamaged(self._path, self._aside) from damage

    def _set_aside(self, reason: str) -> SetAside:
        self._disconnect()
        target = self._path.with_name(self._path.name + ".damaged")
        # The log first: if the process is killed between the two, the file alone is found damaged again.
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
    """Becomes `SetAside` or `OutboxDamaged` before it leaves this file."""


def _number(db: sqlite3.Connection, pragma: str) -> int:
    ((value,),) = db.execute(f"PRAGMA {pragma}").fetchall()
    return int(value)


def _create(db: sqlite3.Connection, version: int, schema: str) -> None:
    for statement in schema.split("\n\n"):
        db.execute(statement)
    db.execute(f"PRAGMA user_version={version}")


def _probe(path: Path, version: int) -> None:
    """Read-only, so that the log of a newer version is not changed either. Unreadable files are handled later."""
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


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    try:
        yield
    except DeviceError:
        raise
    except OSError as error:
        raise DeviceError(f"{path}: {error.strerror}; check the disk and the permissions") from error
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # a bug of ours
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or code in _READ_ERRORS:
            raise _Damaged(str(error)) from error
        if code & 0xFF == sqlite3.SQLITE_FULL:
            raise OutboxFull(f"{path}: {error}; free space on the disk") from error
        raise DeviceError(f"{path}: {error}; check the disk and the permissions") from error
