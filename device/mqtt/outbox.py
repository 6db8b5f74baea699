"""The outbox: a board's messages, on disk until the broker has them, and the ledger of its commands.

Rules of this file:

1. When `put` returns, the message is stored durably. It stays until it is acknowledged or a bound drops it. Ids rise
   and are never used twice; their order is the order of the puts.
2. `(boot, seq)` identifies a message forever: boot rises with every open, and seq counts 1, 2, ... within a boot. A put
   that fails uses no seq. So a seq that a receiver misses was dropped by a bound, and counted.
3. The outbox is bounded by bytes, count and age; `device.mqtt.items` decides what is dropped.
4. When the disk is full, items are dropped in the same order. If that does not help, the put raises.
5. The answer to a command goes into the outbox and into the ledger in one transaction.
6. An item that the disk changed is dropped and counted (`OutboxCounters.damaged`): one flipped bit must not block later
   items.

Any thread may call any method; a lock makes them wait for each other. A full disk, a failing disk and a damaged file
raise a `DeviceError` of `device.mqtt.database`.
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
from typing import Any, TypeVar

from device.mqtt import items, ledger
from device.mqtt.database import Database, OutboxDamaged, OutboxFull, SetAside
from device.mqtt.items import CLASSES, Draft, Item, OutboxPolicy, Tally
from device.mqtt.ledger import Recorded, read_tally, write_tally
from device.mqtt.messages import OutboxClass
from edgeear.errors import UsageError

__all__ = ["Outbox", "OutboxCounters", "OutboxDamaged", "OutboxFull", "OutboxPolicy"]

T = TypeVar("T")
Make = Callable[[int], bytes]
"""Makes a payload from its seq. It runs while the lock is held, so it must not call the outbox."""
FORMAT = 1
SETTINGS = "CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID"
BATCH_BYTES = 4 << 20
_EXPIRY_BATCH = 5_000
_LEAST_SPARE = 1 << 16
_ANSWER = CLASSES.index("response")
"""On a full disk the ledger and the settings may push out what a response may."""


@dataclass(frozen=True)
class OutboxCounters:
    """`depth` items wait, of `bytes` in all, the oldest made at `oldest` (unix seconds). `dropped` and `sent` survive
    restarts. `damaged` of those dropped had been changed by the disk, since the outbox was opened."""

    depth: int
    bytes: int
    oldest: float | None
    dropped: dict[OutboxClass, int]
    sent: int
    damaged: int


class Outbox:
    """See the module's rules."""

    def __init__(self, database: Database, policy: OutboxPolicy, recovered_from: SetAside | None) -> None:
        """Use `Outbox.open`."""
        self._database, self._policy = database, policy
        self.recovered_from = recovered_from
        """The damaged file that this outbox replaces, if there was one."""
        self._lock = threading.Lock()
        self._seq = 0
        self._tally = database.read(Tally.load)
        self._change(items.sweep)
        database.write(ledger.upgrade)
        self.boot = 1 + max(database.remembered(), database.read(lambda db: read_tally(db, "boot")))
        database.write(lambda db: write_tally(db, "boot", self.boot))
        database.remember(self.boot)

    @classmethod
    def open(cls, path: Path, policy: OutboxPolicy, now: float) -> Outbox:
        """Opens or creates the outbox in the file `path` and drops what is too old at `now` (unix seconds).

        A damaged file is renamed and a new one started: see `recovered_from`. Raises `OutboxBusy` if another process
        has it open, `NewerOutbox` if a newer version wrote it, `OutboxFull`, `DeviceError`.
        """
        try:
            return cls._opened(path, policy, now)
        except OutboxDamaged as damage:  # the check of the whole file does not find everything
            outbox = cls._opened(path, policy, now)
            outbox.recovered_from = damage.aside
            return outbox

    @classmethod
    def _opened(cls, path: Path, policy: OutboxPolicy, now: float) -> Outbox:
        schema = "\n\n".join((ledger.SCHEMA, items.SCHEMA, SETTINGS))
        database, aside = Database.open(path, FORMAT, schema, items.CONTENTS)
        try:
            outbox = cls(database, policy, aside)
            outbox.expire(now)
        except BaseException:
            database.close()
            raise
        return outbox

    def put(
        self,
        cls: OutboxClass,
        topic: str,
        make: Make,
        now: float,
        *,
        properties: Mapping[str, Any] | None = None,
        answers: str | None = None,
    ) -> int | None:
        """Stores a message durably and returns its id; None if the bounds dropped it at once.

        `properties` are JSON values. If the message `answers` a command, the ledger records that, too. Raises
        `ItemTooLarge` if it can never fit, `OutboxFull` if the disk has no room, `UsageError` for a command that was
        answered before; then nothing has changed.
        """
        if cls not in CLASSES or not math.isfinite(now):
            raise UsageError(f"class {cls!r}, now={now}: use one of {CLASSES} and finite seconds")
        with self._lock:
            seq, text = self._seq + 1, json.dumps(properties or {})
            number = items.item_id(self.boot, seq)
            draft = Draft(number, CLASSES.index(cls), topic, text, make(seq), now)
            draft.check(self._policy)

            def work(db: sqlite3.Connection, tally: Tally) -> bool:
                if answers is not None:
                    ledger.finish(db, self._policy.ledger, answers, now, topic, text, draft.payload)
                return items.insert(db, tally, self._policy, draft)

            kept = self._with_room(draft.rank, draft.size, work)
            self._seq = seq
        return number if kept else None

    def pending(self, after: int, limit: int, *, max_bytes: int = BATCH_BYTES) -> list[Item]:
        """Up to `limit` items with ids above `after`, in order: at most `max_bytes` together, but at least one."""
        if limit < 1:
            raise UsageError(f"limit={limit}: ask for at least 1 item")
        with self._lock:
            while True:
                found, bad = self._database.read(lambda db: items.pending(db, after, limit, max_bytes))
                if bad:
                    self._change(partial(items.sweep, bad=bad))
                if found or not bad:
                    return found

    def acknowledge(self, ids: Sequence[int]) -> None:
        """Removes items that the broker has, in one transaction. Unknown ids are ignored."""
        with self._lock:
            self._change(partial(items.send, ids=ids))
            self._shrink()

    def counters(self) -> OutboxCounters:
        """The counts; takes the same time at any depth."""
        query = "SELECT created FROM item ORDER BY id LIMIT 1"
        with self._lock:
            rows = self._database.read(lambda db: db.execute(query).fetchall())
            tally = self._tally
        dropped = dict(zip(CLASSES, tally.dropped, strict=True))
        created = rows[0][0] if rows else None
        oldest = created if isinstance(created, float) and math.isfinite(created) else None  # else it is damaged
        return OutboxCounters(sum(tally.depth), sum(tally.bytes), oldest, dropped, tally.sent, tally.damaged)

    @property
    def damaged(self) -> int:
        """`OutboxCounters.damaged`, without a look at the disk."""
        with self._lock:
            return self._tally.damaged

    def expire(self, now: float) -> int:
        """Drops items and ledger entries older than the policy's age. Returns how many items."""
        with self._lock:
            self._database.write(partial(ledger.expire, policy=self._policy.ledger, now=now))
        total, dropped = 0, _EXPIRY_BATCH
        while dropped == _EXPIRY_BATCH:  # in batches, so that other threads need not wait long
            with self._lock:
                dropped = self._change(partial(items.expire, policy=self._policy, now=now, limit=_EXPIRY_BATCH))
            total += dropped
        with self._lock:
            self._shrink()
        return total

    def recall(self, command_id: str, now: float) -> Recorded | None:
        """When a command began and its answer; None if it is new, or forgotten."""
        with self._lock:
            return self._database.read(lambda db: ledger.recall(db, self._policy.ledger, command_id, now))

    def begin(self, command_id: str, now: float, digest: bytes | None = None) -> None:
        """Records durably that a command starts, which asks for what `digest` stands for. Raises `UsageError` if it has
        finished."""
        with self._lock:
            self._with_room(_ANSWER, 0, lambda db, _: ledger.begin(db, self._policy.ledger, command_id, now, digest))

    def forget(self, command_id: str) -> None:
        """Removes what is recorded of a command, so that it may begin again."""
        with self._lock:
            self._database.write(partial(ledger.forget, command_id=command_id))

    def get(self, key: str) -> str | None:
        """A setting, None if it was never set."""
        query = "SELECT value FROM setting WHERE key = ?"
        with self._lock:
            rows = self._database.read(lambda db: db.execute(query, (key,)).fetchall())
        return str(rows[0][0]) if rows else None

    def set(self, key: str, value: str) -> None:
        """Stores a setting durably."""
        query = "INSERT OR REPLACE INTO setting VALUES (?, ?)"
        with self._lock:
            self._with_room(_ANSWER, len(value), lambda db, _: db.execute(query, (key, value)).close())

    def close(self) -> None:
        """Closes the file, so that another process can open it. May be called twice."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The caller holds the lock

    def _change(self, work: Callable[[sqlite3.Connection, Tally], T]) -> T:
        """One transaction; the counts in memory change only after it is durable."""

        def run(db: sqlite3.Connection) -> tuple[T, Tally]:
            tally = self._tally.copy()
            result = work(db, tally)
            tally.save(db, self._tally)
            return result, tally

        result, self._tally = self._database.write(run)
        return result

    def _shrink(self) -> None:
        """Only when empty: then nothing has to be moved, which saves writes to flash."""
        if not any(self._tally.depth):
            self._database.shrink()

    def _with_room(self, rank: int, size: int, work: Callable[[sqlite3.Connection, Tally], T]) -> T:
        """Runs `work`; on a full disk again, each time with more items dropped first, up to the class of `rank`."""
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
