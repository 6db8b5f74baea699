"""The outbox: what a board has to say, kept on disk until a broker has it, and the ledger of its commands.

Rules of this file:

1. What `put` returned from is stored durably, and stays until it is acknowledged or a bound drops it. Ids rise
   and are never used twice; the order of ids is the order of putting.
2. `(boot, seq)` names a message for good: boots rise with every open, and seq counts 1, 2, ... within one. A put
   that fails takes no seq; what a consumer finds missing was dropped by a bound, and is counted.
3. The outbox is bounded by bytes, count and age; `device.mqtt.items` says what a bound drops.
4. Where the disk is full, room is made in the same order. Where that does not help, the put raises.
5. Answering a command and recording the answer in the ledger are one transaction.
6. An item whose checksum fails is dropped and counted: one bad sector must not stop what comes after it.

All methods may be called from any thread; each waits for the one before. What a full disk, a failing disk or a
damaged file raises is a `DeviceError` of `device.mqtt.database`.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from device.mqtt import items, ledger
from device.mqtt.database import Database, NewerOutbox, OutboxBusy, OutboxDamaged, OutboxFull, SetAside
from device.mqtt.items import CLASSES, Class, Draft, Item, OutboxPolicy, Tally
from device.mqtt.ledger import ItemTooLarge, LedgerPolicy, Recorded, read_tally, write_tally
from edgeear.errors import UsageError

__all__ = [
    "CLASSES",
    "Class",
    "Item",
    "ItemTooLarge",
    "LedgerPolicy",
    "NewerOutbox",
    "Outbox",
    "OutboxBusy",
    "OutboxCounters",
    "OutboxDamaged",
    "OutboxFull",
    "OutboxPolicy",
    "Recorded",
    "SetAside",
]

T = TypeVar("T")
Make = Callable[[int], bytes]
"""Makes a payload from its seq. It runs while the outbox is held, so it must not call the outbox."""
FORMAT = 1
SETTINGS = "CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID"
BATCH_BYTES = 4 << 20
_EXPIRY_BATCH = 5_000
_LEAST_SPARE = 1 << 16
_ANSWER = CLASSES.index("response")
"""On a full disk, what the ledger and the settings write is worth as much as a response."""


@dataclass(frozen=True)
class OutboxCounters:
    """`depth` items wait, of `bytes` in all, the oldest made at `oldest`. `dropped` and `sent` outlive restarts."""

    depth: int
    bytes: int
    oldest: float | None
    dropped: dict[Class, int]
    sent: int


class Outbox:
    """See the module's rules."""

    def __init__(self, database: Database, policy: OutboxPolicy, recovered_from: SetAside | None) -> None:
        """Use `Outbox.open`."""
        self._database, self._policy = database, policy
        self.recovered_from = recovered_from
        """The damaged file in whose place this outbox started empty, if there was one."""
        self._lock = threading.Lock()
        self._seq = 0
        self._tally = database.read(Tally.load)
        self.boot = 1 + max(database.remembered(), database.read(lambda db: read_tally(db, "boot")))
        database.write(lambda db: write_tally(db, "boot", self.boot))
        database.remember(self.boot)

    @classmethod
    def open(cls, path: Path, policy: OutboxPolicy, now: float) -> Outbox:
        """Opens or creates the outbox in the file `path` and drops what is too old at `now`, in seconds.

        A damaged file is set aside and a fresh one started: `recovered_from` says so. Raises `OutboxBusy` where
        another process holds it, `NewerOutbox` where a newer version wrote it, `OutboxFull`, `DeviceError`.
        """
        try:
            return cls._opened(path, policy, now)
        except OutboxDamaged as damage:  # deeper than the check of the whole file looks
            outbox = cls._opened(path, policy, now)
            outbox.recovered_from = damage.aside
            return outbox

    @classmethod
    def _opened(cls, path: Path, policy: OutboxPolicy, now: float) -> Outbox:
        schema = "\n\n".join((ledger.SCHEMA, items.SCHEMA, SETTINGS))
        database, aside = Database.open(path, FORMAT, schema)
        try:
            outbox = cls(database, policy, aside)
            outbox.expire(now)
        except BaseException:
            database.close()
            raise
        return outbox

    def put(
        self, cls: Class, topic: str, make: Make, now: float, *, properties: Mapping[str, Any] | None = None
    ) -> int | None:
        """Stores a message durably and returns its id; None where the bounds dropped it at once.

        `properties` are JSON values. Raises `ItemTooLarge` where it could never fit, `OutboxFull` where the disk
        has no room; either way nothing has changed.
        """
        return self._put(cls, topic, make, now, properties or {}, None)

    def pending(self, after: int, limit: int, *, max_bytes: int = BATCH_BYTES) -> list[Item]:
        """Up to `limit` items with ids above `after`, in order, of `max_bytes` in all but at least one."""
        if limit < 1:
            raise UsageError(f"limit={limit}: ask for at least 1 item")
        with self._lock:
            while True:
                found, bad = self._database.read(lambda db: items.pending(db, after, limit, max_bytes))
                if bad:
                    self._change(partial(items.drop, ids=bad))
                if found or not bad:
                    return found

    def acknowledge(self, ids: Sequence[int]) -> None:
        """Forgets what the broker has, in one transaction. Ids that are gone already are passed over."""
        with self._lock:
            self._change(partial(items.send, ids=ids))
            self._shrink()

    def counters(self) -> OutboxCounters:
        """Costs the same at any depth."""
        query = "SELECT created FROM item ORDER BY id LIMIT 1"
        with self._lock:
            rows = self._database.read(lambda db: db.execute(query).fetchall())
            tally = self._tally
        dropped = dict(zip(CLASSES, tally.dropped, strict=True))
        return OutboxCounters(sum(tally.depth), sum(tally.bytes), rows[0][0] if rows else None, dropped, tally.sent)

    def expire(self, now: float) -> int:
        """Drops what is older than the policy's age, the ledger's entries too. Returns how many items."""
        with self._lock:
            self._database.write(partial(ledger.expire, policy=self._policy.ledger, now=now))
        total, dropped = 0, _EXPIRY_BATCH
        while dropped == _EXPIRY_BATCH:  # in batches, so that other threads are not kept waiting
            with self._lock:
                dropped = self._change(partial(items.expire, policy=self._policy, now=now, limit=_EXPIRY_BATCH))
            total += dropped
        with self._lock:
            self._shrink()
        return total

    def recall(self, command_id: str, now: float) -> Recorded | None:
        """What became of a command: None where it is new (or forgotten), else when it began and its answer."""
        with self._lock:
            return self._database.read(lambda db: ledger.recall(db, self._policy.ledger, command_id, now))

    def begin(self, command_id: str, now: float) -> None:
        """Notes durably that a command starts. `UsageError` where it is finished."""
        with self._lock:
            self._with_room(_ANSWER, 0, lambda db, _: ledger.begin(db, self._policy.ledger, command_id, now))

    def finish(
        self,
        command_id: str,
        cls: Class,
        topic: str,
        make: Make,
        now: float,
        properties: Mapping[str, Any] | None = None,
    ) -> int | None:
        """Puts the answer of a command as `put` does, and records it. `UsageError` where it is finished."""
        return self._put(cls, topic, make, now, properties or {}, command_id)

    def get(self, key: str) -> str | None:
        """A setting, None where it was never set."""
        query = "SELECT value FROM setting WHERE key = ?"
        with self._lock:
            rows = self._database.read(lambda db: db.execute(query, (key,)).fetchall())
        return str(rows[0][0]) if rows else None

    def set(self, key: str, value: str) -> None:
        """Keeps a setting durably."""
        query = "INSERT OR REPLACE INTO setting VALUES (?, ?)"
        with self._lock:
            self._with_room(_ANSWER, len(value), lambda db, _: db.execute(query, (key, value)).close())

    def close(self) -> None:
        """Closes the file and lets another process open it; closing twice is allowed."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What follows is called with the lock held

    def _change(self, work: Callable[[sqlite3.Connection, Tally], T]) -> T:
        """One transaction; the counts in memory follow once it is durable."""

        def run(db: sqlite3.Connection) -> tuple[T, Tally]:
            tally = self._tally.copy()
            result = work(db, tally)
            tally.save(db, self._tally)
            return result, tally

        result, self._tally = self._database.write(run)
        return result

    def _shrink(self) -> None:
        """Only when empty: nothing has to be moved then, which spares the flash."""
        if not any(self._tally.depth):
            self._database.shrink()

    def _put(
        self, cls: Class, topic: str, make: Make, now: float, properties: Mapping[str, Any], command: str | None
    ) -> int | None:
        if cls not in CLASSES or not math.isfinite(now):
            raise UsageError(f"class {cls!r}, now={now}: use one of {CLASSES} and finite seconds")
        with self._lock:
            seq = self._seq + 1
            number = items.item_id(self.boot, seq)
            draft = Draft(number, CLASSES.index(cls), topic, json.dumps(properties), make(seq), now)
            draft.check(self._policy)

            def work(db: sqlite3.Connection, tally: Tally) -> bool:
                if command is not None:
                    ledger.finish(db, self._policy.ledger, command, now, topic, draft.payload, properties)
                return items.insert(db, tally, self._policy, draft)

            kept = self._with_room(draft.rank, draft.size, work)
            self._seq = seq
        return number if kept else None

    def _with_room(self, rank: int, size: int, work: Callable[[sqlite3.Connection, Tally], T]) -> T:
        """Runs `work`; on a full disk again with more and more dropped before it, up to the class of `rank`."""
        spare = 0

        def run(db: sqlite3.Connection, tally: Tally) -> T:
            items.make_room(db, tally, range(rank + 1), 0, spare)
            return work(db, tally)

        while True:
            try:
                return self._change(run)
            except OutboxFull:
                if spare >= self._tally.droppable(rank)[1]:
                    raise
            spare = max(4 * spare, 4 * size, _LEAST_SPARE)
