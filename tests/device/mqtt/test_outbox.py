"""The outbox is durable, ordered, bounded and counted, and commands are applied once."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from benchmarks.outbox import measure
from device.mqtt import items as items_module
from device.mqtt.database import NewerOutbox, OutboxBusy
from device.mqtt.items import CLASSES, ITEM_BYTES, Tally, item_id
from device.mqtt.ledger import CLOCK_SET, ItemTooLarge, LedgerPolicy, read_tally
from device.mqtt.messages import OutboxClass
from device.mqtt.outbox import Outbox, OutboxDamaged, OutboxFull, OutboxPolicy
from edgeear.errors import DeviceError, UsageError
from tests.support.needs import need

ROOT = Path(__file__).resolve().parents[3]
RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
NOW = 1.9e9
EMPTY = ITEM_BYTES + len("t") + len("{}")
"""The size of an item without payload, with the topic `t`."""


@pytest.fixture
def path() -> Iterator[Path]:
    """In memory if possible: durability is tested by killing processes, not by power loss."""
    with tempfile.TemporaryDirectory(dir=RAM) as folder:
        yield Path(folder) / "new" / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        yield outbox


def put(outbox: Outbox, cls: OutboxClass, payload: bytes = b"", now: float = NOW) -> int | None:
    return outbox.put(cls, "t", lambda seq: payload, now)


def seqs(outbox: Outbox) -> list[int]:
    """The seq of each item of this boot, from its id."""
    return [item.id - item_id(outbox.boot, 0) for item in outbox.pending(0, 10_000)]


def payloads(outbox: Outbox) -> list[bytes]:
    return [item.payload for item in outbox.pending(0, 10_000)]


def drain(outbox: Outbox) -> None:
    while batch := outbox.pending(0, 500):
        outbox.acknowledge([item.id for item in batch])


def written(path: Path, count: int = 300) -> bytes:
    """An outbox with `count` more events, and what its file holds."""
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        sql(outbox).execute("PRAGMA synchronous=OFF").close()
        for at in range(count):
            put(outbox, "event", b"%d" % at + bytes(400))
    return path.read_bytes()


def sql(outbox: Outbox) -> sqlite3.Connection:
    return outbox._database.connection


# What an outbox is for


def test_what_was_put_comes_back_in_order_until_it_is_acknowledged(path: Path) -> None:
    properties = {"correlation": "00ff", "expiry": 60, "user": [["a", "b"]], "text": "d\u00e9j\u00e0 vu"}
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        first = outbox.put("event", "site/e", lambda seq: b"\x00\xff%d" % seq, NOW, properties=properties)
        second = outbox.put("telemetry", "site/t", lambda seq: b"%d" % seq, NOW + 1)
        third = outbox.put("event", "site/e", lambda seq: b"%d" % seq, NOW + 2)
        assert first is not None and second is not None and third is not None
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        items = outbox.pending(0, 10)
        assert [item.id for item in items] == [first, second, third]
        assert [(item.cls, item.topic, item.payload, item.created) for item in items] == [
            ("event", "site/e", b"\x00\xff1", NOW),
            ("telemetry", "site/t", b"2", NOW + 1),
            ("event", "site/e", b"3", NOW + 2),
        ]
        assert [item.properties for item in items] == [properties, {}, {}]
        assert [item.id for item in outbox.pending(first, 1)] == [second]
        outbox.acknowledge([third, first, 999])
        assert [item.id for item in outbox.pending(0, 10)] == [second]
        counters = outbox.counters()
        assert (counters.depth, counters.oldest, counters.sent) == (1, NOW + 1, 2)
        outbox.acknowledge([second])
        assert (outbox.counters().depth, outbox.counters().bytes, outbox.counters().oldest) == (0, 0, None)


def test_ids_and_boots_are_never_used_again(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    for _ in range(3):
        with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
            number = outbox.put("event", "t", lambda seq: b"%d" % seq, NOW)
            assert number is not None
            assert payloads(outbox) == [b"1"]
            seen.append((outbox.boot, number))
            outbox.acknowledge([number])
    assert [boot for boot, _ in seen] == [1, 2, 3]
    assert seen[0][1] < seen[1][1] < seen[2][1]


def test_a_put_that_fails_takes_no_seq_and_leaves_nothing(outbox: Outbox) -> None:
    def fail(seq: int) -> bytes:
        raise ValueError("no payload")

    with pytest.raises(ValueError, match="no payload"):
        outbox.put("event", "t", fail, NOW)
    with pytest.raises(ItemTooLarge, match=f"{EMPTY + (64 << 20)} bytes, the limit is {64 << 20}"):
        put(outbox, "event", bytes(64 << 20))
    with pytest.raises(UsageError, match="now=nan"):
        put(outbox, "event", now=float("nan"))
    with pytest.raises(UsageError, match="class 'birth'"):
        put(outbox, "birth")  # type: ignore[arg-type]
    outbox.put("event", "t", lambda seq: b"%d" % seq, NOW)
    assert payloads(outbox) == [b"1"]


def test_a_batch_is_bounded_in_bytes_but_never_empty(outbox: Outbox) -> None:
    for size in (500, 10, 10, 500, 10):
        put(outbox, "event", bytes(size))
    sizes, after = [], 0
    while batch := outbox.pending(after, 10, max_bytes=2 * EMPTY + 20):
        sizes.append([len(item.payload) for item in batch])
        after = batch[-1].id
    assert sizes == [[500], [10, 10], [500], [10]]
    with pytest.raises(UsageError, match="limit=0"):
        outbox.pending(0, 0)


def test_settings_survive(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert outbox.get("paused") is None
        outbox.set("paused", "yes")
        outbox.set("paused", "no \u2713")
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert outbox.get("paused") == "no \u2713"
        outbox.close()
        with pytest.raises(UsageError, match="closed"):
            outbox.get("paused")


# Bounds


def many(cls: OutboxClass, count: int) -> list[OutboxClass]:
    return [cls] * count


def fills(outbox: Outbox, *classes: OutboxClass) -> list[OutboxClass]:
    """Puts one item of each class in turn; the classes that are left."""
    for cls in classes:
        put(outbox, cls)
    return [item.cls for item in outbox.pending(0, 100)]


@pytest.mark.parametrize("policy", [OutboxPolicy(max_count=4), OutboxPolicy(max_bytes=4 * EMPTY + 5)])
def test_a_bound_drops_telemetry_first_then_frames_then_responses_then_events(path: Path, policy: OutboxPolicy) -> None:
    with Outbox.open(path, policy, NOW) as outbox:
        assert fills(outbox, "event", "response", "frame", "telemetry") == ["event", "response", "frame", "telemetry"]
        assert fills(outbox, "event") == ["event", "response", "frame", "event"]
        assert put(outbox, "telemetry") is None
        assert fills(outbox, "event") == ["event", "response", "event", "event"]
        assert put(outbox, "frame") is None
        assert fills(outbox, "response") == ["event", "event", "event", "response"]
        assert fills(outbox, "event", "event") == ["event"] * 4
        assert seqs(outbox) == [5, 7, 10, 11]
        assert outbox.counters().dropped == {"telemetry": 2, "frame": 2, "response": 2, "event": 1}
    with Outbox.open(path, policy, NOW) as outbox:
        assert outbox.counters().dropped == {"telemetry": 2, "frame": 2, "response": 2, "event": 1}


def test_one_large_item_displaces_as_many_as_it_needs(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(max_bytes=10 * EMPTY), NOW) as outbox:
        fills(outbox, *many("telemetry", 10))
        put(outbox, "event", bytes(2 * EMPTY + 1))
        assert seqs(outbox) == [5, 6, 7, 8, 9, 10, 11]
        assert outbox.counters().bytes == 9 * EMPTY + 1


def test_frames_have_a_bound_of_their_own(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(frame_bytes=2 * EMPTY), NOW) as outbox:
        assert fills(outbox, "telemetry", "frame", "frame", "frame") == ["telemetry", "frame", "frame"]
        assert outbox.counters().dropped["frame"] == 1
        with pytest.raises(ItemTooLarge, match="frame of"):
            put(outbox, "frame", bytes(EMPTY + 1))
        assert len(payloads(outbox)) == 3


def test_what_is_too_old_expires_unless_its_age_is_unknown(path: Path) -> None:
    policy = OutboxPolicy(max_age_s=100)
    with Outbox.open(path, policy, NOW) as outbox:
        for created in (5.0, NOW, NOW + 99, NOW + 500):
            put(outbox, "event", b"%d" % created, created)
        assert outbox.expire(NOW + 100) == 0
        assert outbox.expire(NOW + 101) == 1
        assert payloads(outbox) == [b"5", b"%d" % (NOW + 99), b"%d" % (NOW + 500)]
        assert outbox.counters().dropped["event"] == 1
    with Outbox.open(path, policy, NOW + 601) as outbox:
        assert payloads(outbox) == [b"5"]
        assert outbox.counters().oldest == 5.0 < CLOCK_SET


@pytest.mark.parametrize("bound", ["max_bytes", "max_count", "max_age_s", "frame_bytes"])
def test_bounds_must_be_positive(bound: str) -> None:
    with pytest.raises(UsageError, match="above 0"):
        OutboxPolicy(**cast(Any, {bound: 0}))
    if bound != "frame_bytes":
        with pytest.raises(UsageError, match="above 0"):
            LedgerPolicy(**cast(Any, {bound: 0}))


@pytest.mark.parametrize("size", [0, 300, 3000])
def test_the_file_is_bounded_as_the_items_are_and_shrinks_when_empty(path: Path, size: int) -> None:
    policy = OutboxPolicy(max_bytes=1 << 19)
    with Outbox.open(path, policy, NOW) as outbox:
        sql(outbox).execute("PRAGMA synchronous=OFF").close()
        for at in range(2 * policy.max_bytes // (EMPTY + size)):
            put(outbox, "event", bytes(size), NOW + at)
        assert policy.max_bytes * 0.99 < outbox.counters().bytes <= policy.max_bytes
        assert path.stat().st_size < 1.5 * policy.max_bytes
        assert path.with_name("outbox.db-wal").stat().st_size < 2 << 20
        assert path.with_name("outbox.db.lock").stat().st_size == 2 << 20
        drain(outbox)
        sql(outbox).execute("PRAGMA wal_checkpoint").close()
        assert path.stat().st_size <= 1.1 * (1 << 20)


def test_classes_that_alternate_leave_no_holes_in_the_file(path: Path) -> None:
    policy = OutboxPolicy(max_bytes=1 << 19)
    with Outbox.open(path, policy, NOW) as outbox:
        sql(outbox).execute("PRAGMA synchronous=OFF").close()
        for at in range(3000):
            put(outbox, CLASSES[at * 3 % 4], bytes(at % 900), NOW + at)
    assert path.stat().st_size < 1.5 * policy.max_bytes


def test_a_drained_outbox_gives_its_pages_back(path: Path) -> None:
    size = len(written(path, 6000))
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        drain(outbox)
        assert path.stat().st_size < size / 20
    written(path, 6000)
    with Outbox.open(path, OutboxPolicy(max_age_s=1), NOW + 10) as outbox:
        assert outbox.counters().dropped["event"] == 6000
        assert path.stat().st_size < size / 20


def steps(outbox: Outbox, work: Callable[[], object]) -> int:
    """How many instructions SQLite's machine runs for `work`."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    sql(outbox).set_progress_handler(tick, 1)
    work()
    sql(outbox).set_progress_handler(None, 1)
    return count


def test_no_operation_costs_more_at_depth(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(max_count=2000), NOW) as outbox:
        sql(outbox).execute("PRAGMA synchronous=OFF").close()
        works: list[Callable[[], object]] = [
            outbox.counters,
            lambda: outbox.pending(outbox.pending(0, 1)[0].id + 5, 3),
            lambda: outbox.expire(NOW),
            lambda: outbox.acknowledge([outbox.pending(0, 1)[0].id]),
            lambda: put(outbox, "event"),
        ]
        fills(outbox, *many("telemetry", 20))
        shallow = [steps(outbox, work) for work in works]
        fills(outbox, *many("telemetry", 1950))
        deep = [steps(outbox, work) for work in works]
        at_the_bound = [steps(outbox, lambda: put(outbox, "event")) for _ in range(3)]
    assert all(many <= few + 10 for many, few in zip(deep, shallow, strict=True)), (deep, shallow)
    assert max(at_the_bound) < 500


# Against a model


class Model(RuleBasedStateMachine):
    """The outbox against a list. Payloads are zeros, so that a message is its class, time and size."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=RAM)
        self.policy = OutboxPolicy(max_bytes=12 * EMPTY, max_count=9, max_age_s=50, frame_bytes=4 * EMPTY)
        self.items: list[tuple[int, OutboxClass, float, int]] = []
        self.dropped = dict.fromkeys(CLASSES, 0)
        self.sent = self.boot = self.seq = 0
        self.now, self.last = NOW, 0
        self.outbox: Outbox | None = None

    @initialize()
    def start(self) -> None:
        self.reopen()

    @rule()
    def reopen(self) -> None:
        if self.outbox is not None:
            self.outbox.close()
        self.outbox = Outbox.open(Path(self.folder.name) / "outbox.db", self.policy, self.now)
        self.drop([item for item in self.items if item[2] < self.now - 50])
        self.boot, self.seq = self.boot + 1, 0
        assert self.outbox.boot == self.boot

    @rule(cls=st.sampled_from(CLASSES), size=st.integers(0, 5 * EMPTY) | st.just(0), early=st.sampled_from([0, 0, 30]))
    def put(self, cls: OutboxClass, size: int, early: int) -> None:
        assert self.outbox is not None
        seqs: list[int] = []
        charge, created = EMPTY + size, self.now - early
        make = lambda seq: seqs.append(seq) or bytes(size)  # type: ignore[func-returns-value] # noqa: E731
        if cls == "frame" and charge > 4 * EMPTY:
            with pytest.raises(ItemTooLarge):
                self.outbox.put(cls, "t", make, created)
            return
        number = self.outbox.put(cls, "t", make, created)
        self.seq += 1
        assert seqs == [self.seq]
        victims = self.victims(cls, charge)
        if victims is None:
            assert number is None
            self.dropped[cls] += 1
            return
        assert number is not None and number > self.last
        self.last = number
        self.drop(victims)
        self.items.append((number, cls, created, charge))

    def victims(self, cls: OutboxClass, charge: int) -> list[tuple[int, OutboxClass, float, int]] | None:
        """What is dropped for a new item; None if the new item is."""
        order = sorted(self.items, key=lambda item: (CLASSES.index(item[1]), item[0]))
        gone = []
        for victim in (*order, None):
            left = [item for item in self.items if item not in gone]
            if len(left) + 1 <= 9 and sum(item[3] for item in left) + charge <= 12 * EMPTY:
                break
            if victim is None or CLASSES.index(victim[1]) > CLASSES.index(cls):
                return None
            gone.append(victim)
        frames = [item for item in order if item[1] == "frame" and item not in gone]
        while cls == "frame" and sum(item[3] for item in frames) + charge > 4 * EMPTY:
            gone.append(frames.pop(0))
        return gone

    def drop(self, victims: list[tuple[int, OutboxClass, float, int]]) -> None:
        for victim in victims:
            self.items.remove(victim)
            self.dropped[victim[1]] += 1

    @rule(choice=st.randoms(use_true_random=False), most=st.integers(0, 4))
    def acknowledge(self, choice: random.Random, most: int) -> None:
        assert self.outbox is not None
        chosen = choice.sample(self.items, min(most, len(self.items)))
        self.outbox.acknowledge([item[0] for item in chosen] + [self.last + 5])
        self.items = [item for item in self.items if item not in chosen]
        self.sent += len(chosen)

    @rule(later=st.sampled_from([1, 20, 45]))
    def expire(self, later: int) -> None:
        assert self.outbox is not None
        self.now += later
        old = [item for item in self.items if item[2] < self.now - 50]
        assert self.outbox.expire(self.now) == len(old)
        self.drop(old)

    @rule(boot=st.integers(0, 3), seq=st.integers(0, 20), limit=st.integers(1, 12))
    def pending(self, boot: int, seq: int, limit: int) -> None:
        assert self.outbox is not None
        after = item_id(max(self.boot - boot, 0), seq)
        found = self.outbox.pending(after, limit)
        wanted = [item for item in self.items if item[0] > after][:limit]
        assert [(i.id, i.cls, i.created, EMPTY + len(i.payload)) for i in found] == wanted

    @invariant()
    def counts(self) -> None:
        if self.outbox is not None:
            counters = self.outbox.counters()
            assert (counters.depth, counters.bytes) == (len(self.items), sum(item[3] for item in self.items))
            assert counters.oldest == (self.items[0][2] if self.items else None)
            assert (counters.dropped, counters.sent) == (self.dropped, self.sent)

    def teardown(self) -> None:
        if self.outbox is not None:
            self.outbox.close()
        self.folder.cleanup()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


# Commands are applied once


def finish(outbox: Outbox, command: str, payload: bytes = b"done", now: float = NOW) -> int | None:
    return outbox.put("response", "t", lambda seq: payload, now, properties={"correlation": "ab"}, answers=command)


def test_a_finished_command_is_recalled_with_its_answer(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert outbox.recall("c1", NOW) is None
        outbox.begin("c1", NOW)
        outbox.begin("c2", NOW + 1)
        number = finish(outbox, "c1", now=NOW + 2)
        assert number is not None
        outbox.acknowledge([number])
        finish(outbox, "c3")  # refused without effect: never begun
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        first, second, third = (outbox.recall(f"c{n}", NOW) for n in (1, 2, 3))
        assert first is not None and second is not None and third is not None
        assert (first.begun, first.finished, first.topic, first.payload) == (NOW, True, "t", b"done")
        assert first.properties == {"correlation": "ab"}
        assert (second.begun, second.finished, second.payload) == (NOW + 1, False, None)
        assert third.finished
        with pytest.raises(UsageError, match="'c1' is finished already"):
            outbox.begin("c1", NOW)
        with pytest.raises(UsageError, match="'c1' is finished already"):
            finish(outbox, "c1")
        assert payloads(outbox) == [b"done"]
        outbox.begin("c2", NOW + 9)
        finish(outbox, "c2", b"at last")
        assert payloads(outbox) == [b"done", b"at last"]


def test_answer_and_record_are_one_transaction(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.begin("c1", NOW)

    def fail(*args: object) -> int:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch, pytest.raises(DeviceError, match="check the disk"):
        patch.setattr(items_module, "insert", fail)
        finish(outbox, "c1")
    recorded = outbox.recall("c1", NOW)
    assert recorded is not None and not recorded.finished
    assert payloads(outbox) == []
    finish(outbox, "c1")
    assert payloads(outbox) == [b"done"]


def test_an_answer_that_the_bounds_drop_is_recorded_all_the_same(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(max_count=1), NOW) as outbox:
        put(outbox, "event", b"event")
        assert finish(outbox, "c1") is None
        recorded = outbox.recall("c1", NOW)
        assert recorded is not None and recorded.payload == b"done"
        assert payloads(outbox) == [b"event"]


def test_the_ledger_is_bounded_by_count_bytes_and_age(path: Path) -> None:
    bounds = LedgerPolicy(max_count=3, max_bytes=3000, max_age_s=100)
    with Outbox.open(path, OutboxPolicy(ledger=bounds), NOW) as outbox:

        def known(now: float = NOW) -> list[int]:
            return [n for n in range(12) if outbox.recall(f"c{n}", now)]

        for n in range(5):
            outbox.begin(f"c{n}", NOW + n)
        assert known() == [2, 3, 4]
        finish(outbox, "c4", bytes(2700))
        assert known() == [4]
        with pytest.raises(ItemTooLarge, match=r"answer to 'c5' of .* the limit is 3000"):
            finish(outbox, "c5", bytes(3000))
        assert (known(), len(payloads(outbox))) == ([4], 1)
        finish(outbox, "c6", bytes(1000), now=NOW + 50)
        outbox.begin("c7", 5.0)  # before the clock was set
        assert known() == [6, 7]
        assert known(NOW + 151) == [7]
        outbox.expire(NOW + 151)
        assert known() == [7]
        outbox.begin("c8", NOW)
        finish(outbox, "c8", bytes(100))
        ((count, size),) = sql(outbox).execute("SELECT count(*), sum(size) FROM ledger").fetchall()
        assert (count, size) == (read_tally(sql(outbox), "ledger count"), read_tally(sql(outbox), "ledger bytes"))
        finish(outbox, "c6", b"anew")


# Kill


def promised(lines: list[list[Any]], word: str) -> set[Any]:
    return {value for first, *rest in lines if first == word for value in (rest[:1] if word == "put" else rest)}


def killed(folder: Path, seed: int, after: int) -> list[list[Any]]:
    """The output of a child that is killed after `after` lines."""
    command = [sys.executable, "-m", "tests.support.outbox_child", "work", str(folder), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(after)]
        child.kill()
        lines += child.stdout.readlines()
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def test_a_kill_at_any_moment_loses_nothing_that_was_promised(path: Path) -> None:
    need("many processes")
    rng = random.Random(5)
    expected: set[int] = set()
    stamps: dict[tuple[int, int], int] = {}
    answered: set[str] = set()
    boot = last = 0
    for seed in range(12):
        lines = killed(path.parent, seed, rng.randrange(2, 400))
        assert lines[0][0] == "open" and lines[0][1] > boot
        put_ids = promised(lines, "put")
        assert min(put_ids, default=last + 1) > last, "an id was used twice"
        with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
            assert outbox.recovered_from is None and outbox.boot > lines[0][1]
            boot = outbox.boot
            items = outbox.pending(0, 1_000_000, max_bytes=1 << 30)
            begun = {command: outbox.recall(command, NOW) for command in promised(lines, "begun")}
            assert outbox.counters().depth == len(items)
        ids = [item.id for item in items]
        events = {item.id: tuple(json.loads(item.payload)) for item in items if item.cls == "event"}
        assert ids == sorted(ids)
        assert [stamp for _, stamp in sorted(events.items())] == sorted(events.values()), "order of (boot, seq)"
        undecided = promised(lines, "acknowledging") - promised(lines, "acknowledged")
        expected = (expected | put_ids) - promised(lines, "acknowledged")
        assert expected - undecided <= set(events), "a promised event is gone"
        assert not promised(lines, "acknowledged") & set(events), "an acknowledged event came back"
        assert len(set(events) - expected) <= 1, "more than the one put in flight"
        assert undecided <= set(events) or not undecided & set(events), "half a batch was acknowledged"
        for number, stamp in events.items():
            assert stamps.setdefault(stamp, number) == number, "(boot, seq) was given twice"
        responses = {item.payload.decode() for item in items if item.cls == "response"}
        answered |= {command for command, recorded in begun.items() if recorded and recorded.finished}
        assert None not in begun.values() and promised(lines, "finished") <= answered
        assert responses - answered <= {f"{lines[0][1]}-{step}" for step in range(10_000)}
        assert answered <= responses, "an answer was recorded but not put"
        answered = responses
        expected, last = set(events), max([last, *ids, *put_ids])
    assert len(stamps) > 100


# Threads and processes


def test_threads_put_read_and_acknowledge_at_once(outbox: Outbox) -> None:
    sql(outbox).execute("PRAGMA synchronous=OFF").close()
    writers, each = 3, 150
    received: list[tuple[int, str, int]] = []
    errors: list[BaseException] = []
    running = threading.Event()

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
                running.set()

        return run

    def numbered(at: int, seq: int) -> bytes:
        return json.dumps([seq, at]).encode()

    def write(name: int) -> Callable[[], None]:
        def work() -> None:
            for at in range(each):
                outbox.put("event", f"w{name}", partial(numbered, at), NOW)

        return work

    def read() -> None:
        after = 0
        while len(received) < writers * each and not running.is_set():
            batch = outbox.pending(after, 7)
            received.extend((item.id, item.topic, *json.loads(item.payload)) for item in batch)
            outbox.acknowledge([item.id for item in batch])
            after = batch[-1].id if batch else after
            assert outbox.counters().depth <= writers * each

    threads = [threading.Thread(target=guarded(work)) for work in (read, *map(write, range(writers)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert [seq for _, _, seq, _ in received] == list(range(1, writers * each + 1))  # type: ignore[misc]
    for name in range(writers):
        assert [entry[3] for entry in received if entry[1] == f"w{name}"] == list(range(each))  # type: ignore[misc]
    assert (outbox.counters().depth, outbox.counters().sent) == (0, writers * each)


def test_one_process_at_a_time(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        with pytest.raises(OutboxBusy, match="stop the other one"):
            Outbox.open(path, OutboxPolicy(), NOW)
        program = f"from tests.device.mqtt.test_outbox import *; Outbox.open(Path({str(path)!r}), OutboxPolicy(), NOW)"
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
        assert b"OutboxBusy" in done.stderr
        put(outbox, "event")
    Outbox.open(path, OutboxPolicy(), NOW).close()


def test_no_reader_from_outside_can_keep_the_log_from_being_emptied(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        put(outbox, "event")
        with (
            closing(sqlite3.connect(path, timeout=0)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("SELECT * FROM item")


def test_the_log_gives_back_what_a_large_item_took(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        put(outbox, "frame", bytes(5 << 20))
        log = path.with_name("outbox.db-wal")
        assert log.stat().st_size > 5 << 20
        for _ in range(2):
            put(outbox, "event")
        assert log.stat().st_size <= 1 << 20


# A full disk


@contextmanager
def full_disk() -> Iterator[None]:
    """A disk without room for the reserve: a file that is opened in here may not grow."""

    def fail(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        yield


def test_on_a_full_disk_less_important_classes_are_dropped_first(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        for at in range(600):
            put(outbox, "telemetry" if at % 2 else "event", b"%04d" % at + bytes(800))
    size = path.stat().st_size
    with full_disk(), Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        for at in range(600, 800):
            assert put(outbox, "event", b"%04d" % at + bytes(800)) is not None
        outbox.set("key", "value" * 5000)
        outbox.begin("c1", NOW)
        finish(outbox, "c1", bytes(20_000))
        counters = outbox.counters()
        assert counters.dropped["telemetry"] > 100 and not counters.dropped["event"]
        items = outbox.pending(0, 9999)
        assert [int(item.payload[:4]) for item in items if item.cls == "event"] == [*range(0, 600, 2), *range(600, 800)]
        assert (counters.depth, sum(item.cls == "telemetry" for item in items)) == (
            len(items),
            300 - counters.dropped["telemetry"],
        )
    assert path.stat().st_size <= size


def test_on_a_full_disk_nothing_is_lost_where_dropping_does_not_help(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        ids = [number for at in range(20) if (number := put(outbox, "event", b"%d" % at))]
        ids.append(put(outbox, "telemetry", bytes(5000)) or 0)
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        with full_disk():
            outbox._database._reserve()
            for _ in range(2):
                with pytest.raises(OutboxFull, match="free space on the disk"):
                    put(outbox, "response", bytes(100_000))
            assert [item.id for item in outbox.pending(0, 50)] == ids
            assert outbox.counters().dropped == dict.fromkeys(CLASSES, 0)
            outbox.acknowledge(ids[:2])
        assert outbox.put("response", "t", lambda seq: b"%d" % seq + bytes(100_000), NOW) is not None
        assert outbox.pending(ids[-1], 1)[0].payload[:2] == b"1\0"
        assert outbox.counters().dropped == dict.fromkeys(CLASSES, 0)


def test_a_real_full_disk(tmp_path: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = 'mount -t tmpfs -o size=6m tmpfs "$0"'
    try:
        allowed = subprocess.run([*namespace, "sh", "-c", mount, str(tmp_path)], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this machine lets nobody mount a small file system of their own")
    command = [*namespace, "sh", "-c", mount + ' && exec "$@"', str(tmp_path)]
    program = [sys.executable, "-m", "tests.support.outbox_child", "fill", str(tmp_path)]
    done = subprocess.run([*command, *program], capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == {"events": True, "whole": True, "dropped": ["telemetry"]}


# Damage


def zeroed(data: bytes, page: int) -> bytes:
    return data[: page * 4096] + bytes(4096) + data[page * 4096 + 4096 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"not a database" * 1000,
        lambda data: b"\xff" * 100,
        lambda data: data[: len(data) // 2],
        lambda data: zeroed(data, 0),
        lambda data: zeroed(data, 2),
        lambda data: zeroed(data, len(data) // 8192),
        lambda data: data[:50_000] + b"\xa5" * 3000 + data[53_000:],
    ],
)
def test_a_damaged_file_is_set_aside_and_the_boot_still_rises(path: Path, change: Callable[[bytes], bytes]) -> None:
    damaged = change(written(path))
    path.write_bytes(damaged)
    path.with_name("outbox.db-wal").write_bytes(b"a log")
    path.with_name("outbox.db.damaged").write_bytes(b"an older one")
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert outbox.recovered_from is not None
        assert outbox.recovered_from.path == path.with_name("outbox.db.damaged")
        assert outbox.recovered_from.reason
        assert outbox.recovered_from.path.read_bytes()[100:] == damaged[100:]
        assert (outbox.boot, outbox.counters().depth) == (2, 0)
        put(outbox, "event", b"goes on")
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert (outbox.boot, outbox.recovered_from, payloads(outbox)) == (3, None, [b"goes on"])


def test_a_broken_chain_of_pages_is_found_at_opening(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        put(outbox, "event", b"x" * 30_000)
    data = path.read_bytes()
    page = next(at for at in range(0, len(data), 4096) if data[at + 4 : at + 4096] == b"x" * 4092)
    path.write_bytes(data[:page] + bytes(4) + data[page + 4 :])
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert outbox.recovered_from is not None


@pytest.mark.parametrize("lost", ["outbox.db", "outbox.db.lock"])
def test_the_boot_rises_even_where_one_file_is_lost(path: Path, lost: str) -> None:
    for boot in (1, 2):
        with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
            assert outbox.boot == boot
    path.with_name(lost).unlink()
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert outbox.boot == 3


def test_damage_found_while_in_use_is_set_aside_too(path: Path) -> None:
    data = written(path)
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        sql(outbox).execute("PRAGMA cache_size=0").close()
        path.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))
        with pytest.raises(OutboxDamaged, match="open again"):
            outbox.pending(0, 1000)
        with pytest.raises(OutboxDamaged, match="open again"):
            put(outbox, "event")
        assert path.with_name("outbox.db.damaged").exists() and not path.exists()
        with pytest.raises(OutboxBusy):
            Outbox.open(path, OutboxPolicy(), NOW)
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert (outbox.boot, payloads(outbox)) == (3, [])


def test_damage_that_only_the_counting_finds_is_set_aside_as_well(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, load = written(path), Tally.load

    def fail_once(db: sqlite3.Connection) -> Tally:
        monkeypatch.setattr(Tally, "load", load)
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    monkeypatch.setattr(Tally, "load", fail_once)
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert outbox.recovered_from is not None
        assert "malformed" in outbox.recovered_from.reason
        assert len(outbox.recovered_from.path.read_bytes()) == len(data)
        assert (outbox.boot, outbox.counters().depth) == (2, 0)


@pytest.mark.parametrize("change", ["payload = x'78'", "topic = 'x'", "properties = '{'", "size = 9", "key = id"])
def test_an_altered_item_is_dropped_and_the_rest_goes_on(path: Path, change: str) -> None:
    written(path, 5)
    first, second, third = (item_id(1, seq) for seq in (1, 2, 3))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE item SET {change} WHERE id IN (?, ?)", (first, third))
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        assert [item.id for item in outbox.pending(0, 1)] == [second]
        assert [item.id for item in outbox.pending(0, 9)] == [second, item_id(1, 4), item_id(1, 5)]
        counters = outbox.counters()
        assert (counters.depth, counters.bytes, sum(counters.dropped.values())) == (3, 3 * (EMPTY + 401), 2)


def test_whatever_bit_of_an_item_flips_the_others_are_sent_or_the_file_is_replaced(path: Path) -> None:
    put_as: dict[int | None, int] = {}
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        for at in range(3):
            put_as[outbox.put("event", "topic/a", lambda seq: b"payload", NOW, properties={"n": at})] = at
    data, replaced, dropped = path.read_bytes(), 0, 0
    start = data.index(b'topic/a{"n": 1}payload') - 40  # the header of the row and its integers
    for bit in random.Random(0).sample(range(8 * 62), 200):
        flipped = bytearray(data)
        flipped[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
            try:
                left = outbox.pending(0, 10)
            except OutboxDamaged:  # the row and its index do not agree
                replaced += 1
                continue
            counters = outbox.counters()
            assert (counters.depth, counters.bytes) == (len(left), len(left) * (EMPTY + 6 + 6 + 7))
            assert all(i.properties == {"n": put_as[i.id]} and i.payload == b"payload" for i in left)
            assert counters.damaged == outbox.damaged
            if outbox.recovered_from is None:
                assert len(left) >= 2 and sum(counters.dropped.values()) == 3 - len(left)
                dropped += counters.damaged
            else:
                replaced += 1
            assert put(outbox, "event") is not None
    assert dropped > 80 and replaced < 80


@pytest.mark.parametrize("column", ["topic", "properties"])
def test_text_that_is_no_utf8_costs_one_item_while_in_use(outbox: Outbox, column: str) -> None:
    ids = [outbox.put("event", "t", lambda seq: b"x", NOW) for _ in range(3)]
    sql(outbox).execute(f"UPDATE item SET {column} = CAST(x'f4' AS TEXT) WHERE id = ?", (ids[1],)).close()
    assert [item.id for item in outbox.pending(0, 1)] == [ids[0]]
    assert [item.id for item in outbox.pending(0, 9)] == [ids[0], ids[2]]
    counters = outbox.counters()
    assert (counters.depth, counters.bytes, counters.damaged, counters.dropped["event"]) == (2, 2 * (EMPTY + 1), 1, 1)


def test_a_size_that_the_disk_changed_does_not_spoil_the_counts(outbox: Outbox) -> None:
    first, second = put(outbox, "event", b"x"), put(outbox, "event", b"x")
    sql(outbox).execute("UPDATE item SET size = 1 << 40 WHERE id = ?", (first,)).close()
    assert [item.id for item in outbox.pending(0, 9)] == [second]
    assert (outbox.counters().depth, outbox.counters().bytes) == (1, EMPTY + 1)


def test_a_ledger_of_an_older_version_opens_and_learns_digests(path: Path) -> None:
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        finish(outbox, "old")
        sql(outbox).execute("ALTER TABLE ledger DROP COLUMN digest").close()
    for _ in range(2):
        with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
            old = outbox.recall("old", NOW)
            assert old is not None and (old.payload, old.digest) == (b"done", None)
            if outbox.recall("new", NOW) is None:
                outbox.begin("new", NOW, b"what it asks for")
                finish(outbox, "new")
    with Outbox.open(path, OutboxPolicy(), NOW) as outbox:
        new = outbox.recall("new", NOW)
        assert new is not None and (new.payload, new.digest) == (b"done", b"what it asks for")
        outbox.forget("new")
        assert outbox.recall("new", NOW) is None
        outbox.begin("new", NOW, b"something else")
        assert read_tally(sql(outbox), "ledger count") == 2


@pytest.mark.parametrize("change", ["properties = '{'", "properties = CAST(x'f4' AS TEXT)"])
def test_a_damaged_answer_of_a_command_is_an_unknown_answer(outbox: Outbox, change: str) -> None:
    outbox.begin("c1", NOW)
    finish(outbox, "c1", b"a1")
    sql(outbox).execute(f"UPDATE ledger SET {change}").close()
    recorded = outbox.recall("c1", NOW)
    assert recorded is not None and not recorded.finished
    finish(outbox, "c1", b"a2")
    recorded = outbox.recall("c1", NOW)
    assert recorded is not None and recorded.payload == b"a2"


def test_a_damaged_setting_is_read(outbox: Outbox) -> None:
    outbox.set("settings", '{"labels": 60}')
    sql(outbox).execute("UPDATE setting SET value = CAST(x'7bf4' AS TEXT)").close()
    assert outbox.get("settings") == "{\ufffd"


def untouched(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith((".lock", "-shm"))}


def test_a_newer_format_is_refused_and_not_changed_nor_is_its_log(path: Path) -> None:
    written(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=2")
        db.execute("CREATE TABLE future (x)")
        folder = path.parent.parent / "copy"  # as after a kill: with a log that was not emptied
        shutil.copytree(path.parent, folder)
    before = untouched(folder)
    assert before["outbox.db-wal"]
    with pytest.raises(NewerOutbox, match="format 2, this version reads up to 1"):
        Outbox.open(folder / path.name, OutboxPolicy(), NOW)
    assert untouched(folder) == before


def test_a_database_of_another_program_is_refused_and_not_changed(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as db, db:
        db.execute("CREATE TABLE bookmarks (url)")
    before = untouched(tmp_path)
    with pytest.raises(NewerOutbox, match="another program"):
        Outbox.open(tmp_path / "other.db", OutboxPolicy(), NOW)
    assert untouched(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeviceError, match="check the disk and the permissions"):
        Outbox.open(tmp_path / "file" / "outbox.db", OutboxPolicy(), NOW)


def test_the_benchmark_gets_out_what_it_put_in(path: Path) -> None:
    path.parent.mkdir()
    figures = measure(path.parent, 600)
    assert figures["events"] == 600
    assert figures["file_bytes"] > 600 * 300
