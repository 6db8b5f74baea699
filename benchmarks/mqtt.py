"""The link and the outbox against a real mosquitto: a day without a broker, and 50 restarts of the broker under load.

    python -m benchmarks.mqtt [--json FILE] [--folder FOLDER] [--events 86400] [--restarts 50]

`outage`: EVENTS (one a second for a day) are stored, each a durable transaction, while no broker listens; then it
starts. `drained_per_s` counts from the birth to the last PUBACK taken into SQLite; `order_kept` and `lost` are what a
subscriber in another process, with a persistent session and removing duplicates by (boot, seq), saw.
`restarts`: mosquitto (with persistence) is stopped and started RESTARTS times while events go up and commands come
down, both QoS 1; the board applies commands through the ledger, as the daemon does. `applied_twice` and
`commands_lost` must be 0.
`idle`: the process with a connected link and nothing to do: its CPU time as a share of one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import random
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from device.mqtt.link import Inbound, Link, LinkPolicy
from device.mqtt.messages import Event, Stamper
from device.mqtt.outbox import Outbox, OutboxPolicy
from tests.support.broker import PERSISTENT, Mosquitto

START, SITE, DEVICE = 1.8e9, "bench", "board"
PREFIX = f"edgeear/v1/{SITE}/{DEVICE}"
PATIENCE = 600.0
Figures = dict[str, Any]


class Subscriber:
    """A process that receives all events with a persistent session."""

    def __init__(self, port: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_receive, args=(port, theirs), daemon=True)
        self._process.start()
        self._ask(PATIENCE)  # subscribed

    def seen(self, count: int) -> Any:
        """Waits for `count` distinct events, but at most for 60 s after what came last."""
        self._pipe.send(count)
        return self._ask(PATIENCE)

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(20)

    def _ask(self, timeout: float) -> Any:
        if not self._pipe.poll(timeout):
            raise AssertionError(f"the subscriber said nothing for {timeout} s")
        return self._pipe.recv()


def _receive(port: int, pipe: Pipe) -> None:
    changed, known = threading.Condition(), set[tuple[int, int]]()
    first_seen: list[tuple[int, int]] = []
    tally: Counter[str] = Counter()

    def on_message(client: Client, userdata: Any, message: MQTTMessage) -> None:
        event = json.loads(message.payload)
        key = event["boot"], event["seq"]
        with changed:
            tally["received"] += 1
            if key not in known:
                known.add(key)
                first_seen.append(key)
            changed.notify_all()

    client = _client("bench-subscriber", port)
    client.on_connect = lambda client, *_: client.subscribe(f"{PREFIX}/event", 1)
    client.on_subscribe = lambda *_: _once(tally, pipe)
    client.on_message = on_message
    client.loop_start()
    while (count := pipe.recv()) is not None:
        with changed:
            while len(known) < count and changed.wait(60):
                pass
            pipe.send(
                {
                    "distinct": len(known),
                    "duplicates": tally["received"] - len(known),
                    "order_kept": first_seen == sorted(first_seen),
                }
            )
    client.disconnect()


def _once(tally: Counter[str], pipe: Pipe) -> None:
    if not tally["subscribed"]:
        pipe.send("subscribed")
    tally["subscribed"] += 1


def _client(name: str, port: int) -> Client:
    client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
    make: Any = Properties
    properties = make(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 3600
    client.reconnect_delay_set(1, 1)
    client.max_inflight_messages_set(0)
    client.connect_async("127.0.0.1", port, clean_start=False, properties=properties)
    return client


class Board:
    """An outbox and a link, and the part of the daemon that applies commands once."""

    def __init__(self, folder: Path, port: int) -> None:
        self.outbox = Outbox.open(folder / "outbox.db", OutboxPolicy(), START)
        self.stamp = Stamper("0" * 16, self.outbox.boot)
        self.commands: queue.Queue[Inbound | None] = queue.Queue()
        self.applied: Counter[str] = Counter()
        self.online = threading.Semaphore(0)
        self.put = self.repeated = 0
        policy = LinkPolicy("127.0.0.1", SITE, DEVICE, port, reconnect_min_s=0.05, reconnect_max_s=0.5)
        self.link = Link(
            policy,
            self.outbox,
            lambda state: json.dumps({"state": state}).encode(),
            self.commands.put,
            lambda frame: None,
            lambda up, text: self.online.release() if up else None,
            random.Random(0),
        )

    def put_event(self, now: float) -> None:
        self.outbox.put("event", f"{PREFIX}/event", lambda seq: self._event(seq, now), now)
        self.put += 1
        self.link.delivery.wake()

    def apply_commands(self) -> None:
        """Until None is queued: each command once, however often it comes; then, and only then, acknowledge it."""
        while (inbound := self.commands.get()) is not None:
            command = inbound.payload.decode()
            if self.outbox.recall(command, START) is None:
                self.outbox.begin(command, START)
                self.applied[command] += 1
                self.outbox.put("response", f"{PREFIX}/response", lambda seq: b"{}", START, answers=command)
                self.link.delivery.wake()
            else:
                self.repeated += 1
            self.link.delivery.acknowledge(inbound.token)

    def wait_drained(self, depth: int = 0) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.outbox.counters().depth > depth:
            if time.monotonic() > deadline:
                raise AssertionError(f"not drained within {PATIENCE} s: {self.outbox.counters()}")
            time.sleep(0.005)

    def close(self) -> None:
        self.link.stop(10)
        self.outbox.close()

    def _event(self, seq: int, now: float) -> bytes:
        text = "the input has changed: 12 of the last 16 frames are unlike the domain 'photo'"
        event = Event(**self.stamp(seq, now), kind="shift", text=text, at=seq, generation=1, data={"domain": "photo"})
        return event.model_dump_json().encode()


def outage(folder: Path, events: int) -> Figures:
    broker = Mosquitto(folder / "broker", PERSISTENT)
    broker.start()
    subscriber = Subscriber(broker.port)
    broker.stop()
    board = Board(folder, broker.port)
    board.link.start()
    began = time.perf_counter()
    for at in range(events):
        board.put_event(START + at)
    stored = time.perf_counter() - began
    depth, size = board.outbox.counters().depth, board.outbox.counters().bytes
    broker.start()
    assert board.online.acquire(timeout=PATIENCE)
    began, cpu = time.perf_counter(), time.process_time()
    board.wait_drained()
    drained, cpu = time.perf_counter() - began, time.process_time() - cpu
    seen = subscriber.seen(events)
    board.close()
    subscriber.close()
    broker.stop()
    return {
        "events": events,
        "stored_per_s": round(events / stored),
        "depth": depth,
        "bytes": size,
        "drained_per_s": round(events / drained),
        "drain_cpu_share": round(cpu / drained, 2),
        "lost": events - seen["distinct"],
        "duplicates": seen["duplicates"],
        "order_kept": seen["order_kept"],
    }


def idle(folder: Path, seconds: float = 20.0) -> Figures:
    broker = Mosquitto(folder / "broker", PERSISTENT)
    broker.start()
    board = Board(folder, broker.port)
    board.link.start()
    assert board.online.acquire(timeout=PATIENCE)
    began = time.process_time()
    time.sleep(seconds)
    used = time.process_time() - began
    board.close()
    broker.stop()
    return {"seconds": seconds, "cpu_share": round(used / seconds, 5)}


def restarts(folder: Path, count: int, per_life: int = 200) -> Figures:
    """Between two restarts at least `per_life` events go in; load goes on while the broker is down."""
    broker = Mosquitto(folder / "broker", PERSISTENT)
    broker.start()
    subscriber, board, operator = Subscriber(broker.port), Board(folder, broker.port), _client("bench-op", broker.port)
    operator.loop_start()
    board.link.start()
    applying = threading.Thread(target=board.apply_commands)
    applying.start()
    over, sent = threading.Event(), list[str]()

    def load() -> None:
        while not over.wait(0.001):
            board.put_event(START + board.put)
            if board.put % 10 == 0:
                sent.append(f"command-{len(sent)}")
                operator.publish(f"{PREFIX}/command/report", sent[-1], 1)

    loading = threading.Thread(target=load)
    loading.start()
    began = time.perf_counter()
    for _ in range(count):
        target = board.put + per_life
        assert board.online.acquire(timeout=PATIENCE)
        while board.put < target:
            time.sleep(0.01)
        broker.stop()
        broker.start()
    over.set()
    loading.join()
    took = time.perf_counter() - began
    deadline = time.monotonic() + PATIENCE
    while len(board.applied) < len(sent) and time.monotonic() < deadline:
        time.sleep(0.05)
    board.wait_drained()
    seen = subscriber.seen(board.put)
    board.commands.put(None)
    applying.join()
    connects = board.link.delivery.counters().connects
    board.close()
    operator.disconnect()
    operator.loop_stop()
    subscriber.close()
    broker.stop()
    return {
        "restarts": count,
        "seconds": round(took, 1),
        "connects": connects,
        "events": board.put,
        "events_lost": board.put - seen["distinct"],
        "event_duplicates_removed": seen["duplicates"],
        "order_kept": seen["order_kept"],
        "commands": len(sent),
        "commands_delivered_again": board.repeated,
        "commands_lost": len(set(sent) - set(board.applied)),
        "applied_twice": sum(times > 1 for times in board.applied.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--events", type=int, default=86_400)
    parser.add_argument("--restarts", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for part in ("idle", "outage", "restarts"):
            (Path(name) / part).mkdir()
        result = {
            "idle": idle(Path(name) / "idle"),
            "outage": outage(Path(name) / "outage", options.events),
            "restarts": restarts(Path(name) / "restarts", options.restarts),
        }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
