"""The ledger: which commands were begun and what was answered, so that each is applied once.

Rules of this file:

1. A command is recorded as begun before it changes anything. If the process dies before `finish`, `recall` returns an
   entry without an answer: the command may have been applied.
2. An entry holds a digest of what the command asks for, so that an id used again for something else is noticed. Entries
   of older files have none.
3. `finish` records the response that is put into the outbox, in the same transaction (the caller's).
4. The ledger is bounded by count, bytes and age; the oldest entries go first. A command older than that is
   unknown again, so commands must expire earlier.

The functions work inside a transaction. Triggers keep the totals, so that no bound scans a table.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from typing import Any

from edgeear.errors import UsageError

CLOCK_SET = 1_577_836_800.0
"""2020-01-01. A board without a battery-backed clock starts before this: the age of what it makes then is unknown."""
ENTRY_BYTES = 160
"""Added to the size of each entry for the row, its indexes and their share of unused pages."""
COUNT, BYTES = "ledger count", "ledger bytes"
SCHEMA = """
CREATE TABLE tally (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID

CREATE TABLE ledger (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    command TEXT NOT NULL UNIQUE,
    begun REAL NOT NULL,
    size INTEGER NOT NULL,
    topic TEXT,
    properties TEXT,
    payload BLOB,
    digest BLOB
) STRICT

CREATE INDEX ledger_begun ON ledger (begun)

INSERT INTO tally VALUES ('ledger count', 0), ('ledger bytes', 0)

CREATE TRIGGER ledger_added AFTER INSERT ON ledger BEGIN
    UPDATE tally SET value = value + 1 WHERE name = 'ledger count';
    UPDATE tally SET value = value + new.size WHERE name = 'ledger bytes'; END

CREATE TRIGGER ledger_changed AFTER UPDATE ON ledger BEGIN
    UPDATE tally SET value = value + new.size - old.size WHERE name = 'ledger bytes'; END

CREATE TRIGGER ledger_removed AFTER DELETE ON ledger BEGIN
    UPDATE tally SET value = value - 1 WHERE name = 'ledger count';
    UPDATE tally SET value = value - old.size WHERE name = 'ledger bytes'; END""".strip()


class ItemTooLarge(UsageError):
    """One item is larger than the limit for all items together; nothing was stored."""


@dataclass(frozen=True)
class LedgerPolicy:
    """Bounds of the ledger: entries, bytes in all, seconds."""

    max_count: int = 10_000
    max_bytes: int = 8 << 20
    max_age_s: float = 7 * 86400.0

    def __post_init__(self) -> None:
        if min(self.max_count, self.max_bytes, self.max_age_s) <= 0:
            raise UsageError(f"{self}: each bound must be above 0")


@dataclass(frozen=True)
class Recorded:
    """A command that was begun at `begun`. `payload`: the response, None if it did not finish. `digest`: of what it
    asks for, None where an older version recorded it."""

    command_id: str
    begun: float
    topic: str | None = None
    payload: bytes | None = None
    properties: dict[str, Any] = field(default_factory=dict)
    digest: bytes | None = None

    @property
    def finished(self) -> bool:
        return self.payload is not None


def upgrade(db: sqlite3.Connection) -> None:
    """Adds the column that files of older versions lack; they can still open the file."""
    if "digest" not in {row[1] for row in db.execute("PRAGMA table_info(ledger)").fetchall()}:
        db.execute("ALTER TABLE ledger ADD COLUMN digest BLOB").close()


def recall(db: sqlite3.Connection, policy: LedgerPolicy, command_id: str, now: float) -> Recorded | None:
    """The entry of a command; None if it has none, or the entry is older than the policy's age."""
    query = "SELECT begun, topic, payload, properties, digest FROM ledger WHERE command = ?"
    for begun, topic, payload, properties, digest in db.execute(query, (command_id,)).fetchall():
        if not CLOCK_SET <= begun < now - policy.max_age_s:
            try:
                return Recorded(command_id, begun, topic, payload, json.loads(properties or "{}"), digest)
            except ValueError:  # the disk changed the entry: its answer is unknown
                return Recorded(command_id, begun, digest=digest)
    return None


def begin(
    db: sqlite3.Connection, policy: LedgerPolicy, command_id: str, now: float, digest: bytes | None = None
) -> None:
    """Records that the command starts. A command that did not finish may begin again."""
    known = recall(db, policy, command_id, now)
    if known is not None and known.finished:
        raise UsageError(f"command {command_id!r} is finished already: call recall before begin")
    if known is None:
        size = ENTRY_BYTES + len(command_id.encode()) + len(digest or b"")
        _record(db, policy, (command_id, now, size, None, None, None, digest))


def finish(
    db: sqlite3.Connection, policy: LedgerPolicy, command_id: str, now: float, topic: str, text: str, payload: bytes
) -> None:
    """Records the answer; `text` is the JSON of its properties. A command without effect need not have been begun."""
    known = recall(db, policy, command_id, now)
    if known is not None and known.finished:
        raise UsageError(f"command {command_id!r} is finished already: a command is answered once")
    begun, digest = (now, None) if known is None else (known.begun, known.digest)
    size = ENTRY_BYTES + len(payload) + len(digest or b"")
    size += sum(len(part.encode()) for part in (command_id, topic, text))
    if size > policy.max_bytes:
        raise ItemTooLarge(f"answer to {command_id!r} of {size} bytes, the limit is {policy.max_bytes}; shorten it")
    _record(db, policy, (command_id, begun, size, topic, text, payload, digest))


def forget(db: sqlite3.Connection, command_id: str) -> None:
    """Removes the entry of a command, so that it may begin again."""
    db.execute("DELETE FROM ledger WHERE command = ?", (command_id,)).close()


def expire(db: sqlite3.Connection, policy: LedgerPolicy, now: float) -> None:
    """Forgets entries older than the policy's age."""
    db.execute("DELETE FROM ledger WHERE begun >= ? AND begun < ?", (CLOCK_SET, now - policy.max_age_s))


def _record(db: sqlite3.Connection, policy: LedgerPolicy, row: tuple[object, ...]) -> None:
    """Writes the entry `(command, begun, size, topic, properties, payload, digest)` and keeps within the bounds."""
    db.execute(
        "INSERT INTO ledger (command, begun, size, topic, properties, payload, digest) VALUES (?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (command) DO UPDATE SET begun = excluded.begun, size = excluded.size, topic = excluded.topic, "
        "properties = excluded.properties, payload = excluded.payload, digest = excluded.digest",
        row,
    )
    oldest = "DELETE FROM ledger WHERE number = (SELECT min(number) FROM ledger WHERE command != ?)"
    removed = 1
    while removed:  # never the new entry
        within = read_tally(db, COUNT) <= policy.max_count and read_tally(db, BYTES) <= policy.max_bytes
        removed = 0 if within else db.execute(oldest, row[:1]).rowcount


def read_tally(db: sqlite3.Connection, name: str) -> int:
    """A count kept on disk, 0 if it was never written."""
    rows = db.execute("SELECT value FROM tally WHERE name = ?", (name,)).fetchall()
    return int(rows[0][0]) if rows else 0


def write_tally(db: sqlite3.Connection, name: str, value: int) -> None:
    """Writes a count to disk."""
    db.execute("INSERT OR REPLACE INTO tally VALUES (?, ?)", (name, value))
