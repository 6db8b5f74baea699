"""The items of the outbox: their table, their order of dropping, their counts.

Rules of this file:

1. Every change of the table changes the `Tally` beside it, so that no bound and no counter scans the table.
2. When room is needed, items are dropped in the order of `CLASSES`, the oldest of a class first. A new item never
   pushes out an item of a later class; it is dropped itself. Drops are counted by class.
3. An id is made of (boot, seq), see `item_id`. So ids rise and are never used twice, without a counter on disk.
4. Rows lie in the file by class, then id: dropping the oldest of a class frees whole pages, which a full disk needs.
   With the classes mixed, dropping would leave gaps too small for later rows.
5. A row has a CRC-32 of its contents: SQLite checks the structure of its pages, not their contents. A row that the
   disk changed is dropped and counted when it is read; `sweep` finds those that would break the counts.

The functions work inside the caller's transaction. If it is rolled back, the caller discards the `Tally`.
"""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, get_args

from device.mqtt.ledger import CLOCK_SET, ItemTooLarge, LedgerPolicy, read_tally, write_tally
from device.mqtt.messages import OutboxClass
from edgeear.errors import UsageError

CLASSES: tuple[OutboxClass, ...] = get_args(OutboxClass)
"""In the order in which they are dropped."""
_FRAME = CLASSES.index("frame")
ITEM_BYTES = 96
"""Added to the size of each item for the row, its indexes and their share of unused pages."""
_SEQ_BITS, _ID_BITS = 30, 61
SCHEMA = """
CREATE TABLE item (
    key INTEGER PRIMARY KEY,
    id INTEGER NOT NULL UNIQUE,
    created REAL NOT NULL,
    size INTEGER NOT NULL,
    seal INTEGER NOT NULL,
    topic TEXT NOT NULL,
    properties TEXT NOT NULL,
    payload BLOB NOT NULL
) STRICT

CREATE INDEX item_created ON item (created)""".strip()
"""`key` is class and id in one number (`_key`); `seal` is a CRC-32."""
_TYPES = {
    "created": "real",
    "size": "integer",
    "seal": "integer",
    "topic": "text",
    "properties": "text",
    "payload": "blob",
}
CONTENTS = tuple(f"item.{column}" for column in _TYPES)
"""Columns whose damage costs one item: they hold no place in the file's structure."""
_BYTES = " + ".join(f"length(CAST({column} AS BLOB))" for column in ("topic", "properties", "payload"))
_MISSHAPEN = " OR ".join(
    [f"size != {ITEM_BYTES} + {_BYTES}", *(f"typeof({column}) != '{kind}'" for column, kind in _TYPES.items())]
)


@dataclass(frozen=True)
class OutboxPolicy:
    """Bounds. `max_bytes` covers topics, properties, payloads and `ITEM_BYTES` for each item.

    Frames have a bound of their own, `frame_bytes`: otherwise a few hundred would push out all telemetry. The age of
    items made before the clock was set (`ledger.CLOCK_SET`) is unknown, so only the other bounds drop them.
    """

    max_bytes: int = 64 << 20
    max_count: int = 200_000
    max_age_s: float = 7 * 86400.0
    frame_bytes: int = 32 << 20
    ledger: LedgerPolicy = field(default_factory=LedgerPolicy)

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_count, self.max_age_s, self.frame_bytes) <= 0:
            raise UsageError(f"{self}: each bound must be above 0")


@dataclass(frozen=True)
class Item:
    """One message. `properties`: JSON values, as passed to `put`. `created`: unix seconds."""

    id: int
    cls: OutboxClass
    topic: str
    payload: bytes
    properties: dict[str, Any]
    created: float


@dataclass(frozen=True)
class Draft:
    """A row to insert. `rank` is the place of its class in `CLASSES`, `properties` is JSON."""

    id: int
    rank: int
    topic: str
    properties: str
    payload: bytes
    created: float

    @property
    def size(self) -> int:
        return ITEM_BYTES + len(self.payload) + len(self.topic.encode()) + len(self.properties)

    @property
    def seal(self) -> int:
        """CRC-32 of everything except the time."""
        head = json.dumps([self.id, self.rank, self.topic, self.properties]).encode()
        return zlib.crc32(self.payload, zlib.crc32(head))

    def sealed(self, size: object, seal: object) -> Item | None:
        """The item of a row that was read; None where the disk changed it. SQLite checks types only when it writes."""
        types = (self.topic, str), (self.properties, str), (self.payload, bytes), (self.created, float)
        if not all(isinstance(value, kind) for value, kind in types) or not math.isfinite(self.created):
            return None
        if (self.size, self.seal) != (size, seal):
            return None
        cls, properties = CLASSES[self.rank], json.loads(self.properties)
        return Item(self.id, cls, self.topic, self.payload, properties, self.created)

    def check(self, policy: OutboxPolicy) -> None:
        """Raises `ItemTooLarge` if this can never be stored."""
        limit = min(policy.max_bytes, policy.frame_bytes) if self.rank == _FRAME else policy.max_bytes
        if self.size > limit:
            raise ItemTooLarge(f"{CLASSES[self.rank]} of {self.size} bytes, the limit is {limit}; send less at once")


@dataclass
class Tally:
    """Counts by rank. `depth` and `bytes` are counted when the outbox opens; `dropped` and `sent` are on disk.
    `damaged` of those dropped were damaged, since the outbox opened."""

    depth: list[int]
    bytes: list[int]
    dropped: list[int]
    sent: int
    damaged: int = 0

    @classmethod
    def load(cls, db: sqlite3.Connection) -> Tally:
        """The counts on disk; `sweep` counts the items."""
        dropped = [read_tally(db, f"dropped {name}") for name in CLASSES]
        return cls([0] * len(CLASSES), [0] * len(CLASSES), dropped, read_tally(db, "sent"))

    def copy(self) -> Tally:
        return Tally(self.depth[:], self.bytes[:], self.dropped[:], self.sent, self.damaged)

    def save(self, db: sqlite3.Connection, before: Tally) -> None:
        """Writes the counts that are kept on disk and differ from `before`."""
        for name, value, old in zip(CLASSES, self.dropped, before.dropped, strict=True):
            if value != old:
                write_tally(db, f"dropped {name}", value)
        if self.sent != before.sent:
            write_tally(db, "sent", self.sent)

    def droppable(self, rank: int) -> tuple[int, int]:
        """How many items, of how many bytes in all, may be dropped for an item of `rank`."""
        return sum(self.depth[: rank + 1]), sum(self.bytes[: rank + 1])


def item_id(boot: int, seq: int) -> int:
    """Rises with (boot, seq). Fits 2^31 boots and 2^30 messages in each, 34 years at one a second."""
    return boot << _SEQ_BITS | seq


def insert(db: sqlite3.Connection, tally: Tally, policy: OutboxPolicy, draft: Draft) -> bool:
    """Drops what the bounds require, then inserts. False: the bounds dropped the new item itself."""
    rank = draft.rank
    items, held = tally.droppable(rank)
    count = sum(tally.depth) + 1 - policy.max_count
    size = sum(tally.bytes) + draft.size - policy.max_bytes
    if count > items or size > held:
        tally.dropped[rank] += 1
        return False
    make_room(db, tally, range(rank + 1), count, size)
    if rank == _FRAME:
        make_room(db, tally, range(rank, rank + 1), 0, tally.bytes[rank] + draft.size - policy.frame_bytes)
    values = (_key(rank, draft.id), draft.id, draft.created, draft.size, draft.seal)
    contents = (draft.topic, draft.properties, draft.payload)
    db.execute("INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, *contents)).close()
    tally.depth[rank] += 1
    tally.bytes[rank] += draft.size
    return True


def make_room(db: sqlite3.Connection, tally: Tally, ranks: range, count: int, size: int) -> None:
    """Drops the oldest of each class in turn until `count` items and `size` bytes are gone, or none is left."""
    oldest: list[int] = []
    for rank in ranks:
        if count <= 0 and size <= 0:
            break
        bounds = _key(rank, 0), _key(rank, -1 + (1 << _ID_BITS))
        with closing(db.execute("SELECT id, size FROM item WHERE key BETWEEN ? AND ? ORDER BY key", bounds)) as rows:
            while (count > 0 or size > 0) and (row := rows.fetchone()):
                oldest.append(row[0])
                count, size = count - 1, size - row[1]
    drop(db, tally, oldest)


def pending(db: sqlite3.Connection, after: int, limit: int, max_bytes: int) -> tuple[list[Item], list[int]]:
    """Items above `after` in order, and the ids of those that are damaged."""
    items: list[Item] = []
    bad: list[int] = []
    columns = "key, id, created, size, seal, topic, properties, payload"
    with closing(db.execute(f"SELECT {columns} FROM item WHERE id > ? ORDER BY id LIMIT ?", (after, limit))) as rows:
        for key, number, created, size, seal, topic, properties, payload in rows:
            item = Draft(number, key >> _ID_BITS, topic, properties, payload, created).sealed(size, seal)
            if item is None:
                bad.append(number)
                continue
            if items and size > max_bytes:
                break
            items.append(item)
            max_bytes -= size
    return items, bad


def send(db: sqlite3.Connection, tally: Tally, ids: Sequence[int]) -> None:
    """Removes items as sent; unknown ids are ignored."""
    tally.sent += len(_remove(db, tally, ids))


def drop(db: sqlite3.Connection, tally: Tally, ids: Sequence[int]) -> None:
    """Removes items and counts each as dropped."""
    for rank in _remove(db, tally, ids):
        tally.dropped[rank] += 1


def sweep(db: sqlite3.Connection, tally: Tally, bad: Sequence[int] = ()) -> None:
    """Drops the items `bad` and all whose size or types the disk changed, then counts what is left.

    Reads the whole table once. Sizes of damaged items may be wrong, so all counts are made anew.
    """
    query = f"DELETE FROM item WHERE {_MISSHAPEN} OR id IN (SELECT value FROM json_each(?)) RETURNING key >> ?"
    gone = db.execute(query, (json.dumps(list(bad)), _ID_BITS)).fetchall()
    for (rank,) in gone:
        tally.dropped[rank] += 1
    tally.damaged += len(gone)
    tally.depth, tally.bytes = [0] * len(CLASSES), [0] * len(CLASSES)
    query = "SELECT key >> ?, count(*), sum(size) FROM item GROUP BY 1"
    for rank, depth, size in db.execute(query, (_ID_BITS,)).fetchall():
        tally.depth[rank], tally.bytes[rank] = depth, size


def expire(db: sqlite3.Connection, tally: Tally, policy: OutboxPolicy, now: float, limit: int) -> int:
    """Drops up to `limit` items that are too old; returns how many."""
    query = "SELECT id FROM item WHERE created >= ? AND created < ? LIMIT ?"
    ids = [row[0] for row in db.execute(query, (CLOCK_SET, now - policy.max_age_s, limit)).fetchall()]
    drop(db, tally, ids)
    return len(ids)


def _remove(db: sqlite3.Connection, tally: Tally, ids: Sequence[int]) -> list[int]:
    """Returns the ranks of the items that were there."""
    if not ids:
        return []
    query = "DELETE FROM item WHERE id IN (SELECT value FROM json_each(?)) RETURNING key >> ?, size"
    gone = db.execute(query, (json.dumps(list(ids)), _ID_BITS)).fetchall()
    for rank, size in gone:
        tally.depth[rank] -= 1
        tally.bytes[rank] -= size
    return [rank for rank, _ in gone]


def _key(rank: int, number: int) -> int:
    return rank << _ID_BITS | number
