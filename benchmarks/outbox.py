"""The outbox after a day without a broker: what storing, draining and opening cost on this disk.

    python -m benchmarks.outbox [FOLDER] [EVENTS]

Stores EVENTS (86,400: one a second for a day) of 300 bytes, one durable transaction each, in a fresh outbox in FOLDER
(the present one), opens it again, and drains it in batches, and prints JSON. `fsync_ms` is one synced 4 KiB append to
a plain file there, the least that a durable put can cost.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from device.mqtt.outbox import Outbox, OutboxPolicy

EVENTS, PAYLOAD, BATCH = 86_400, b"e" * 300, 500
START = 1.8e9
Figures = dict[str, float | int]


def measure(folder: Path, events: int = EVENTS) -> Figures:
    """The figures of one run in `folder`; file sizes in bytes, `drained_per_s` is reading and acknowledging."""
    path = folder / "outbox.db"
    with Outbox.open(path, OutboxPolicy(), START) as outbox:
        times = [_timed_put(outbox, START + at) for at in range(events)]
    size = path.stat().st_size
    before = time.perf_counter()
    outbox = Outbox.open(path, OutboxPolicy(), START + events)
    opened = time.perf_counter() - before
    with outbox:
        before = time.perf_counter()
        drained = _drain(outbox)
        took = time.perf_counter() - before
    if drained != events:
        raise AssertionError(f"{drained} of {events} events came out")
    return {
        "events": events,
        "puts_per_s": round(events / sum(times)),
        "put_ms_p50": round(1e3 * statistics.median(times), 3),
        "put_ms_p99": round(1e3 * sorted(times)[events * 99 // 100], 3),
        "fsync_ms": round(1e3 * _fsync(folder), 3),
        "drained_per_s": round(events / took),
        "batch": BATCH,
        "open_s": round(opened, 3),
        "file_bytes": size,
        "file_bytes_drained": path.stat().st_size,
    }


def _timed_put(outbox: Outbox, now: float) -> float:
    before = time.perf_counter()
    outbox.put("event", "edgeear/v1/site/device/event", lambda seq: PAYLOAD, now)
    return time.perf_counter() - before


def _drain(outbox: Outbox) -> int:
    after = drained = 0
    while batch := outbox.pending(after, BATCH):
        after = batch[-1].id
        drained += len(batch)
        outbox.acknowledge([item.id for item in batch])
    return drained


def _fsync(folder: Path, rounds: int = 200) -> float:
    """The median time of a synced append."""
    times = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(rounds):
            before = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - before)
    return statistics.median(times)


if __name__ == "__main__":
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()
    with tempfile.TemporaryDirectory(dir=parent) as name:
        print(json.dumps(measure(Path(name), int(sys.argv[2]) if len(sys.argv) > 2 else EVENTS), indent=1))
