"""What the tests of the outbox run in a child process, to be killed or to fill up a small file system.

python -m tests.support.outbox_child work FOLDER SEED     puts, answers and acknowledges until it is killed
python -m tests.support.outbox_child fill FOLDER          fills the file system that FOLDER is on
"""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from device.mqtt.outbox import Outbox, OutboxPolicy

NOW = 1.9e9


def work(folder: Path, seed: int) -> None:
    """Says what it is about to acknowledge, and what was put, finished or acknowledged, each in one write."""
    rng = random.Random(seed)
    outbox = Outbox.open(folder / "outbox.db", OutboxPolicy(), NOW)
    say("open", outbox.boot)
    mine: list[int] = []
    for step in range(1_000_000):
        choice = rng.random()
        if choice < 0.7:
            stamp: list[int] = []
            number = outbox.put("event", "event", partial(stamped, outbox.boot, stamp), NOW)
            assert number is not None
            mine.append(number)
            say("put", number, *stamp)
        elif choice < 0.8:
            command = f"{outbox.boot}-{step}"
            outbox.begin(command, NOW)
            say("begun", command)
            outbox.put("response", "response", partial(answer, command), NOW, answers=command)
            say("finished", command)
        elif mine:
            ids = rng.sample(mine, min(len(mine), 2))
            say("acknowledging", *ids)
            outbox.acknowledge(ids)
            say("acknowledged", *ids)
            mine = [number for number in mine if number not in ids]


def stamped(boot: int, stamp: list[int], seq: int) -> bytes:
    stamp[:] = [boot, seq]
    return json.dumps(stamp).encode()


def answer(command: str, seq: int) -> bytes:
    return command.encode()


def say(*words: object) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def fill(folder: Path) -> None:
    """Fills the disk with telemetry and events, then from outside: events displace telemetry and all come out."""
    path = folder / "outbox.db"
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        events = []
        while outbox.counters().dropped["telemetry"] < 50:
            outbox.put("telemetry", "t", lambda seq: bytes(700), NOW)
            events.append(outbox.put("event", "e", lambda seq: bytes(300), NOW))
        with (folder / "other").open("wb", buffering=0) as other, suppress(OSError):
            while True:  # takes whatever is left
                other.write(bytes(512))
        events += [outbox.put("event", "e", lambda seq: bytes(300), NOW) for _ in range(500)]
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        depth, found = outbox.counters().depth, []
        while items := outbox.pending(0, 100):
            found += [(item.id, item.cls) for item in items]
            outbox.acknowledge([item.id for item in items])
        counters = outbox.counters()
        result = {
            "events": [number for number, cls in found if cls == "event"] == events,
            "whole": depth == len(found) and outbox.recovered_from is None and counters.depth == 0,
            "dropped": sorted(cls for cls, count in counters.dropped.items() if count),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        fill(Path(sys.argv[2]))
