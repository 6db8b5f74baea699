"""Test doubles around a link: an operator's client, an outbox in memory, a relay that can be cut, a scripted broker."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from device.mqtt.items import Item
from device.mqtt.link import Inbound, Link, LinkPolicy

PATIENCE = 30.0
PREFIX = "edgeear/v1/lab/cam"


class Signal:
    """A condition that others wait for by a predicate."""

    def __init__(self) -> None:
        self._changed = threading.Condition()

    @contextmanager
    def change(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()

    def wait(self, predicate: Callable[[], bool], what: object = "it") -> None:
        with self._changed:
            assert self._changed.wait_for(predicate, PATIENCE), f"waited {PATIENCE} s for {what}: it did not come"


class MemoryOutbox:
    """What the link needs of the outbox, without a disk. `looks` counts the calls of `pending`."""

    def __init__(self) -> None:
        self.signal, self.items, self.acknowledged, self.last, self.looks = Signal(), dict[int, Item](), [0][:0], 0, 0

    def put(self, payload: bytes, topic: str = f"{PREFIX}/event", **properties: Any) -> int:
        with self.signal.change():
            self.last += 1
            self.items[self.last] = Item(self.last, "event", topic, payload, properties, 0.0)
            return self.last

    def pending(self, after: int, limit: int) -> list[Item]:
        with self.signal.change():
            self.looks += 1
            return [self.items[number] for number in sorted(self.items) if number > after][:limit]

    def acknowledge(self, ids: Sequence[int]) -> None:
        with self.signal.change():
            self.acknowledged.extend(ids)
            for number in ids:
                self.items.pop(number, None)

    def wait_empty(self) -> None:
        self.signal.wait(lambda: not self.items, "an empty outbox")


class Board:
    """A link that records its callbacks."""

    def __init__(self, port: int, outbox: Any = None, patience: float = 5.0, **policy: Any) -> None:
        self._patience = patience
        self.outbox = cast(Any, MemoryOutbox() if outbox is None else outbox)
        self.signal = Signal()
        self.changes: list[tuple[bool, str]] = []
        self.commands: list[Inbound] = []
        self.frames: list[bytes] = []
        settings: dict[str, Any] = dict(host="127.0.0.1", site="lab", device="cam", port=port)
        settings |= dict(reconnect_min_s=0.02, reconnect_max_s=0.2) | policy
        self.link = Link(
            LinkPolicy(**settings),
            self.outbox,
            lambda state: f"{state} session-1".encode(),
            self._note(self.commands),
            self._note(self.frames),
            lambda up, text: self._note(self.changes)((up, text)),
            random.Random(0),
            clock=lambda: 1000.0,
        )

    def __enter__(self) -> Board:
        self.link.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.link.stop(self._patience)

    def _note(self, where: list[Any]) -> Callable[[Any], None]:
        def note(what: Any) -> None:
            with self.signal.change():
                where.append(what)

        return note

    def put(self, payload: bytes, **more: Any) -> None:
        self.outbox.put(payload, **more)
        self.link.delivery.wake()

    def wait_connected(self, times: int = 1) -> None:
        self.signal.wait(lambda: sum(text.startswith("connected") for _, text in self.changes) >= times, "connection")

    def wait_told(self, text: str) -> None:
        self.signal.wait(lambda: any(text in told for _, told in self.changes), (text, self.changes))

    def wait_commands(self, count: int) -> list[Inbound]:
        self.signal.wait(lambda: len(self.commands) >= count, f"{count} commands")
        return self.commands


class Operator:
    """An MQTT 5 client with a persistent session that records what it receives and can send commands."""

    def __init__(self, port: int, *topics: str, name: str = "operator", session: bool = True) -> None:
        self.signal, self.messages, self._topics = Signal(), [MQTTMessage()][:0], topics
        self.subscribed = self._sent = 0
        self._client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_connect, self._client.on_subscribe = self._on_connect, self._on_subscribe
        self._client.on_message, self._client.on_publish = self._on_message, self._on_publish
        self._client.reconnect_delay_set(1, 1)
        self._client.max_inflight_messages_set(0)
        properties = properties_of(PacketTypes.CONNECT, SessionExpiryInterval=3600 if session else 0)
        self._client.connect_async("127.0.0.1", port, clean_start=not session, properties=properties)

    def __enter__(self) -> Operator:
        self._client.loop_start()
        self.signal.wait(lambda: self.subscribed > 0, "subscription")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def send(self, device: str, name: str, payload: bytes, retain: bool = False, **properties: Any) -> None:
        """A command, or a frame with name "frame"; returns when the broker has it."""
        prefix = f"edgeear/v1/lab/{device}"
        topic, qos = (f"{prefix}/frame", 0) if name == "frame" else (f"{prefix}/command/{name}", 1)
        with self.signal.change():
            target = self._sent + 1
        self._client.publish(topic, payload, qos, retain, properties_of(PacketTypes.PUBLISH, **properties))
        self.signal.wait(lambda: self._sent >= target, "PUBACK")

    def payloads(self, end: str = "/event") -> list[bytes]:
        return [bytes(message.payload) for message in self.messages if message.topic.endswith(end)]

    def wait(self, predicate: Callable[[], bool], what: str = "message") -> None:
        self.signal.wait(predicate, what)

    def _on_connect(self, client: Client, *_: Any) -> None:
        options = SubscribeOptions(qos=1, retainAsPublished=True)
        client.subscribe([(topic, options) for topic in self._topics or ("nothing",)])

    def _on_subscribe(self, *_: Any) -> None:
        with self.signal.change():
            self.subscribed += 1

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        with self.signal.change():
            self.messages.append(message)

    def _on_publish(self, *_: Any) -> None:
        with self.signal.change():
            self._sent += 1


def properties_of(packet: int, **values: Any) -> Properties:
    make: Any = Properties
    properties: Properties = make(packet)
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


class Wire:
    """A TCP relay to a broker; `cut` ends its connections as a network failure does."""

    def __init__(self, port: int) -> None:
        self._to, self._server = port, socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE)
        self.cut()

    def cut(self) -> None:
        ends, self._open = self._open, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(65536):
                sink.sendall(block)
            sink.shutdown(socket.SHUT_WR)
        if source.fileno() >= 0:
            source.close()


class ScriptedBroker:
    """Takes one client at a time; `seen` holds what it published. It refuses MQTT 5 as brokers of 3.1.1 do, unless it
    has a `receive_maximum` to announce; `hangs_up` times it closes the connection on MQTT 5 instead. It acknowledges
    each PUBLISH unless it `holds`, and closes the connection on one that contains `poison`."""

    def __init__(
        self,
        receive_maximum: int | None = None,
        poison: bytes | None = None,
        holds: bool = False,
        reason: int = 0,
        hangs_up: int = 0,
    ) -> None:
        self._hangs_up = hangs_up
        self.signal, self.levels, self.seen = Signal(), [0][:0], [b""][:0]
        self._maximum, self._poison, self._holds, self._reason = receive_maximum, poison, holds, reason
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> ScriptedBroker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE)

    def wait_seen(self, count: int) -> None:
        self.signal.wait(lambda: len(self.seen) >= count, f"{count} messages")

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            with sock, sock.makefile("rb") as stream, suppress(ConnectionError):
                self._talk(sock, stream)

    def _talk(self, sock: socket.socket, stream: Any) -> None:
        five = self._maximum is not None
        while head := stream.read(1):
            length, shift = 0, 0
            while (byte := stream.read(1)[0]) & 128:
                length, shift = length | (byte & 127) << shift, shift + 7
            body = stream.read(length | byte << shift)
            match head[0] >> 4:
                case 1:
                    self.levels.append(body[6])
                    if body[6] == 5 and self._hangs_up:
                        self._hangs_up -= 1
                        return
                    sock.sendall(self._connack(body[6]))
                case 3:
                    topic, qos = int.from_bytes(body[:2], "big"), head[0] >> 1 & 3
                    with self.signal.change():
                        self.seen.append(
                            body[topic + 2 + 2 * (qos > 0) + five + five * body[topic + 2 + 2 * (qos > 0)] :]
                        )
                    if self._poison is not None and self._poison in body:
                        return
                    refused = self._reason if b"/status" not in body else 0
                    if qos and not self._holds:
                        code = bytes([refused]) if five else b""
                        sock.sendall(bytes([0x40, 2 + len(code)]) + body[topic + 2 : topic + 4] + code)
                case 8:
                    sock.sendall(bytes([0x90, 3 + five]) + body[:2] + b"\0" * five + b"\1")

    def _connack(self, level: int) -> bytes:
        if self._maximum is not None:
            return b"\x20\x06\x00\x00\x03\x21" + self._maximum.to_bytes(2, "big")
        return b"\x20\x02\x00" + (b"\x00" if level == 4 else b"\x01")
