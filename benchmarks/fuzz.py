"""A million messages that nobody should send, to a board that has learned something: it lives, and stays as it was.

    python -m benchmarks.fuzz [--messages 1000000] [--wire 60000] [--seed 0] [--json FILE] [--folder FOLDER]

`inside`: most of them go into the link's inbound callback and through the daemon's loop, in this process; `wire`: the
others go through a real mosquitto to a real `edgeear run`. In both the board has a learned domain and gets messages on
every topic that it subscribes to, and on some that it does not. What would be a valid command that changes something,
or a picture that is one, is counted (`valid_not_sent`) and not sent. Valid ones that change nothing (infer, report, and
what the board must refuse: a rollback without a probation, a forget of an unknown domain, labels of another session)
are sent (`valid_sent`).

`state_changes` counts checks at which a digest of all state differed from the one before: every generation in the
store, the serving system, phase, detector, buffers, settings, labels, the outbox's depth. `rss_growth_mb` is the
largest resident size after the warm-up (`Fuzzer.warming`, and a tenth of all) less that at its end: what is needed once
may be kept, but nothing for each message.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from benchmarks.fuzz_messages import SEEDS, Fuzzer, Message
from device.daemon import machine
from device.daemon.sources import Feed
from device.daemon.sources.mqtt import MessageFrames
from device.daemon.sources.running import Stop
from device.images.decode import UndecodableInput, decode_bytes
from device.mqtt import messages, topics
from device.mqtt.delivery import Token
from device.mqtt.link import Inbound, Link, LinkPolicy
from device.operator.client import BrokerAddress, Operator
from device.state.codec import to_files
from tests.device.daemon.test_loop import OWN, Rig, learned, rigged
from tests.support import boards, fakes
from tests.support.broker import mosquitto

Figures = dict[str, Any]
CHECKS = 100
"""Times that state and memory are looked at."""
READS = frozenset(("infer", "report"))
_PICTURE = Path("message.jpg")


class Broken(AssertionError):
    """What must not happen; the message shows the input that did it."""


@dataclass
class Wire:
    """The daemon's link, which notes how the board answers and forgets it."""

    acknowledged: int = 0
    refused: int = 0

    def acknowledge(self, token: Token | None) -> None:
        self.acknowledged += 1

    def publish_now(self, topic: str, payload: bytes, correlation: bytes | None = None) -> bool:
        self.refused += _answered(topic, payload) == "refused"
        return True

    def request_redelivery(self) -> None:
        raise Broken("a command found no room, though one comes at a time")

    def wake(self) -> None:
        pass


class Once:
    """Lets a source take what one message brought, in this thread."""

    def __init__(self) -> None:
        self._asked = 0

    def is_set(self) -> bool:
        self._asked += 1
        return self._asked > 1


class Inside:
    """A whole daemon in this process, from the link's callback to the outbox, with its state in `folder`."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.daemon, self.wire = rig, rig.daemon, Wire()
        self.daemon.out.link = self.wire
        self._source = MessageFrames(Feed((fakes.SIZE, fakes.SIZE), rig.frames, lambda: rig.now), 4)
        policy, status = LinkPolicy("nowhere", "plant", "cam-1", frames=True), self.daemon.status
        self.link = Link(
            policy, rig.outbox, status, self._command, self._frame, _unchanged, random.Random(0), lambda: rig.now
        )
        self._commands = 0

    def take(self, message: Message, qos: int = 1) -> None:
        """Give the board one message and let it do all that it does about it."""
        came = MQTTMessage(1, message.topic.encode("utf-8", "surrogatepass"))
        came.payload, came.qos, came.dup, came.properties = message.payload, qos, message.dup, _properties(message)
        self.link.receive(came)
        while self.daemon.turn():
            pass

    def _command(self, inbound: Inbound) -> None:
        self._commands += 1
        self.daemon.receive(inbound)

    def _frame(self, payload: bytes) -> None:
        self._source.offer(payload)
        self._source.run(cast(Stop, Once()))

    def settle(self) -> Counter[str]:
        """Take what the board answered to valid commands out of the outbox, as a broker would; outcomes."""
        if self.wire.acknowledged != self._commands:
            raise Broken(f"{self._commands} commands came, {self.wire.acknowledged} were acknowledged")
        found: Counter[str] = Counter()
        while items := self.rig.outbox.pending(0, 1000):
            found.update(_answered(item.topic, item.payload) for item in items)
            self.rig.outbox.acknowledge([item.id for item in items])
        return found

    def digest(self) -> str:
        """Of everything that a message could have changed."""
        board, store, outbox = self.daemon.board, self.rig.store, self.rig.outbox
        summary = hashlib.sha256()
        for system in (board.live.serving, board.live.confirmed):
            for name, data in sorted(to_files(system).items()):
                summary.update(name.encode() + data)
        for manifest in store.generations():
            summary.update(repr(manifest).encode())
        kept = [outbox.get(key) for key in ("settings", "paused")]
        buffers = [s.number for s in board._recent], board._waiting, board._job, board._probation, board._state
        counters = outbox.counters()
        rest = (
            board.phase, board.paused, board.policy, board.at, buffers, self.daemon.commands.settings, kept,
            self.rig.labels._labels, self.rig.labels._name, store.live, store.confirmed, counters.depth,
            counters.dropped, self.daemon.counts.frames, self.rig.frames.counts.received, self.daemon.period_s,
            outbox.boot,
        )  # fmt: skip
        summary.update(repr(rest).encode())
        return summary.hexdigest()


@contextmanager
def inside(folder: Path) -> Iterator[Inside]:
    """A board that learned one domain, in this process."""
    with rigged(folder) as rig:
        made = Inside(learned(rig))
        rig.outbox.acknowledge([item.id for item in rig.outbox.pending(0, 10_000)])
        yield made
        made.link.stop(0)


def fuzz_inside(folder: Path, count: int, seed: int, seeds: int, checks: int = CHECKS) -> Figures:
    """Rule of the benchmark's first part; raises `Broken`, or whatever the daemon raises, where it does not hold."""
    logging.getLogger("edgeear").setLevel(logging.WARNING)
    with inside(folder) as board:
        fuzzer = Fuzzer(OWN, board.rig.session, seed, seeds)
        tally = Tally(board.daemon.board.system.names, board.rig.session, (fakes.SIZE, fakes.SIZE))
        before, outcomes, watch, seconds = board.digest(), Counter[str](), Memory(), 0.0
        step = max(1, count // checks)
        for message in filter(tally.may_send, fuzzer.warming()):
            _taken(board, message, _qos(message))
        while tally.sent < count:
            target = tally.sent + step
            while tally.sent < target:
                message = fuzzer.next()
                if tally.may_send(message):
                    seconds += _taken(board, message, _qos(message))
            for _ in range(max(1, step // 100)):
                seconds += _taken(board, Message(fuzzer.elsewhere(), b'{"id": "x"}'), qos=0)
                tally.sent += 1
                tally.topics["elsewhere"] += 1
            outcomes += board.settle()
            if outcomes.total() > tally.valid_sent.total():
                raise Broken("what is no command was answered through the outbox")
            tally.state_changes += board.digest() != before
            watch.look(machine.rss_mb() or 0.0, tally.sent / count)
        return {
            **tally.figures(),
            "answers": {**outcomes, "refused at once": board.wire.refused},
            "ignored": board.link.delivery.counters().ignored,
            "messages_per_s": round(tally.sent / seconds),
            **watch.figures(),
        }


def _qos(message: Message) -> int:
    """As a board subscribes. In-process this matters, too: acknowledgements are kept until there is a connection."""
    return 0 if message.topic.endswith("/frame") else 1


def _taken(board: Inside, message: Message, qos: int) -> float:
    """Seconds that the board took."""
    began = time.perf_counter()
    try:
        board.take(message, qos)
    except Exception as error:
        raise Broken(f"{error!r} after {message.topic!r} {message.payload[:2000]!r}") from error
    return time.perf_counter() - began


class Tally:
    """Counts what is sent, and decides what may be: nothing that a board would rightly act on."""

    def __init__(self, domains: tuple[str, ...], session: str, size: tuple[int, int]) -> None:
        self._domains, self._session, self._size = domains, session, size
        self.sent = self.state_changes = 0
        self.topics: Counter[str] = Counter()
        self.valid_sent: Counter[str] = Counter()
        self.held: Counter[str] = Counter()

    def may_send(self, message: Message) -> bool:
        """Whether the board should be as it was after this message; counts it one way or the other."""
        address = topics.match(message.topic)
        if address is not None and address.topic is topics.FRAME:
            return self._counted("frame", self._is_picture(message.payload) and "frame")
        name = address.command if address is not None else None
        if name is None:
            return self._counted("elsewhere", False)
        command = messages.parse_command(name, message.payload)
        row = f"command/{name}" if name in messages.COMMANDS else "command/(unknown)"
        if isinstance(command, messages.Refusal):
            return self._counted(row, False)
        if not self._harmless(command):
            return self._counted(row, name)
        self.valid_sent[name] += 1
        return self._counted(row, False)

    def figures(self) -> Figures:
        return {
            "messages": self.sent,
            "valid_not_sent": sum(self.held.values()),
            "valid_not_sent_by_name": dict(sorted(self.held.items())),
            "valid_sent": dict(sorted(self.valid_sent.items())),
            "topics": dict(sorted(self.topics.items())),
            "state_changes": self.state_changes,
        }

    def _counted(self, row: str, held: str | bool) -> bool:
        if held:
            self.held[str(held)] += 1
            return False
        self.sent += 1
        self.topics[row] += 1
        return True

    def _harmless(self, command: messages.Command) -> bool:
        match command:
            case messages.Infer() | messages.Report() | messages.Rollback() | messages.Confirm():
                return True  # of the last two a board without a probation does nothing
            case messages.Label():
                return command.session != self._session
            case messages.Forget():
                return command.domain not in self._domains
            case _:
                return False

    def _is_picture(self, payload: bytes) -> bool:
        try:
            decode_bytes(payload, _PICTURE, self._size)
        except UndecodableInput:
            return False
        return True


@dataclass
class Memory:
    """Resident size, MiB, at each look, against that at the end of the warm-up."""

    looks: list[float] = field(default_factory=list)
    warm: float | None = None

    def look(self, mb: float, share: float) -> None:
        """`share` of the messages were sent."""
        if share >= 0.1:
            self.looks.append(mb)
            self.warm = self.looks[0]

    def figures(self) -> Figures:
        warm = self.warm or 0.0
        return {
            "rss_warm_mb": round(warm, 1),
            "rss_end_mb": round(self.looks[-1], 1),
            "rss_growth_mb": round(max(self.looks) - warm, 1),
        }


def _answered(topic: str, payload: bytes) -> str:
    """The outcome of a response; anything else that a board says about nonsense is wrong."""
    response = messages.parse(messages.Response, payload)
    if isinstance(response, messages.Refusal):
        raise Broken(f"{topic}: {payload[:500]!r} is no response: {response.reason}")
    if not topic.removeprefix(OWN).removeprefix(boards.OWN).startswith("/response") or {"+", "#"} & set(topic):
        raise Broken(f"a response went to {topic}")
    if response.outcome == "failed" or (response.outcome == "ok" and response.command not in READS):
        raise Broken(f"{response.command} was {response.outcome}: {response.reason}")
    return response.outcome


def _unchanged(connected: bool, text: str) -> None:
    """The link is never started, so nothing comes up or goes down."""


def _malformed(text: str) -> bool:
    """Whether a text has what MQTT 5, section 1.5.4, forbids or discourages: control and non-characters, surrogates."""
    points = {ord(character) for character in text}
    return any(p < 0x20 or 0x7F <= p < 0xA0 or 0xD800 <= p < 0xE000 or p & 0xFFFE == 0xFFFE for p in points)


def _properties(message: Message) -> Properties:
    make: Any = Properties
    properties = make(PacketTypes.PUBLISH)
    for name, value in (
        ("ResponseTopic", message.response_topic),
        ("CorrelationData", message.correlation),
        ("MessageExpiryInterval", message.expiry_s),
        ("ContentType", message.content_type),
    ):
        if value is not None:
            setattr(properties, name, value)
    made: Properties = properties
    return made


class Sender:
    """Sends messages through a broker, QoS 1 for commands. For what MQTT itself forbids in a text a broker hangs up on
    the sender: that is passed over and counted."""

    def __init__(self, port: int) -> None:
        self.forbidden = 0
        self._changed, self._acknowledged, self._sent = threading.Condition(), 0, 0
        self._client = Client(CallbackAPIVersion.VERSION2, "fuzzer", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.max_inflight_messages_set(1000)
        self._client.on_publish = self._published
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def send(self, message: Message) -> bool:
        texts = message.topic, message.response_topic or "", message.content_type or ""
        if any(map(_malformed, texts)) or {"+", "#"} & set(message.topic):
            self.forbidden += 1
            return False
        self._client.publish(message.topic, message.payload, _qos(message), properties=_properties(message))
        self._sent += 1
        return True

    def flush(self) -> None:
        """Wait until the broker has them all."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._acknowledged >= self._sent, 120):
                raise Broken(f"the broker took {self._acknowledged} of {self._sent} messages")

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _published(self, *_: Any) -> None:
        with self._changed:
            self._acknowledged += 1
            self._changed.notify_all()


class Heard:
    """What the board says while it is fuzzed: outcomes of its responses, and what it should not have said."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def __call__(self, topic: str, payload: bytes) -> None:
        if topic.startswith(f"{boards.OWN}/response"):
            try:
                self.outcomes[_answered(topic, payload)] += 1
            except Broken as error:
                self.wrong.append(str(error))
        elif topic in (f"{boards.OWN}/event", f"{boards.OWN}/label-request"):
            self.wrong.append(f"{topic}: {payload[:500]!r}")


def fuzz_wire(folder: Path, count: int, seed: int, seeds: int, checks: int = CHECKS) -> Figures:
    """The same through a real broker to a real daemon; a report after each batch shows that it lives and is as it was,
    and marks the end of the batch, because commands come in order."""
    encoder = boards.teach(folder)
    config = boards.config
    with mosquitto(folder / "broker") as broker:
        text = config(folder, broker.port, encoder, source='kind = "mqtt"', telemetry="period_s = 86400")
        with boards.DaemonProcess(folder, text) as daemon:
            daemon.wait_told("READY=1")
            heard = Heard()
            filters = tuple(f"{boards.OWN}/{name}" for name in ("response/#", "event", "label-request"))
            with Operator(BrokerAddress("127.0.0.1", broker.port), filters, heard) as us, Sender(broker.port) as sender:
                figures = _wired(daemon, us, sender, count, checks, Fuzzer(boards.OWN, "0" * 16, seed, seeds))
            if heard.wrong:
                raise Broken(heard.wrong[0])
            return {**figures, "answers": dict(heard.outcomes)}


def _wired(
    daemon: boards.DaemonProcess, us: Operator, sender: Sender, count: int, checks: int, fuzzer: Fuzzer
) -> Figures:
    before = _report(us, "before")
    tally = Tally((boards.TAUGHT,), before["session"], (fakes.SIZE, fakes.SIZE))
    watch, seconds, step = Memory(), 0.0, max(1, count // checks)
    for message in filter(tally.may_send, fuzzer.warming()):
        sender.send(message)
    while tally.sent - sender.forbidden < count:
        batch = [m for m in (fuzzer.next() for _ in range(step)) if tally.may_send(m)]
        began = time.perf_counter()
        for message in batch:
            sender.send(message)
        sender.send(fuzzer.valid(f"large-{tally.sent}"))
        sender.flush()
        after = _report(us, f"at-{tally.sent}")
        seconds += time.perf_counter() - began
        tally.state_changes += _lasting(after) != _lasting(before)
        watch.look(daemon.rss_mb(), tally.sent / count)
    return {
        **tally.figures(),
        "messages": tally.sent - sender.forbidden,
        "forbidden_by_mqtt": sender.forbidden,
        "refused_messages": after["refused_messages"],
        "undecodable_frames": after["frames"]["undecodable"],
        "outbox_depth": after["outbox"]["depth"],
        "messages_per_s": round((tally.sent - sender.forbidden) / seconds),
        **watch.figures(),
    }


def _report(us: Operator, identity: str) -> dict[str, Any]:
    response = us.ask(boards.SITE, boards.DEVICE, messages.Report(id=f"check-{identity}"), 120)
    if response.outcome != "ok":
        raise Broken(f"report was {response.outcome}: {response.reason}")
    return response.result


def _lasting(report: dict[str, Any]) -> dict[str, Any]:
    """Of a report: what nonsense must not change."""
    kept = {
        key: report[key] for key in ("generation", "phase", "domains", "settings", "labels_waiting", "session", "boot")
    }
    return {**kept, "answered": report["frames"]["answered"], "dropped": report["outbox"]["dropped"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where state is kept meanwhile; /dev/shm is quicker")
    parser.add_argument("--messages", type=int, default=1_000_000, help="of both parts")
    parser.add_argument("--wire", type=int, default=60_000, help="of these through a broker")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for part in ("wire", "inside"):
            (Path(name) / part).mkdir()
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            inner = pool.submit(
                fuzz_inside, Path(name) / "inside", options.messages - options.wire, options.seed, SEEDS
            )
            wire = pool.submit(fuzz_wire, Path(name) / "wire", options.wire, options.seed + 1, SEEDS)
            parts = {"inside": inner.result(), "wire": wire.result()}
    result = {"messages": sum(part["messages"] for part in parts.values()), "seed": options.seed, **parts}
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
