"""The operator of a simulated fleet: one MQTT 5 client that follows a whole site and commands its devices.

Rules of this file:

1. One subscription covers the site, without the operator's own messages. Messages are kept by device (check.py).
2. A command asks for its answer below the topic `response` of the device, or on it if the command names no topic.
3. Code waits for a message, never for a fixed time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.subscribeoptions import SubscribeOptions

from device.mqtt import messages, topics
from device.mqtt.paho import explain, properties_of
from device.simulation.fleet.check import Asked, Heard
from edgeear.errors import DeviceError

CONNECT_S = 10.0
"""Seconds for the connection and the subscription."""
OWN = "/fleet"
"""Below a device's `response`: the topic that the operator asks it to answer on."""
VERSION = "$SYS/broker/version"


class FleetOperator:
    """Follows the devices of `site` and commands them. Use it as a context manager; it raises `DeviceError` if the
    broker cannot be reached. `broker` is its name, if known. `changed` guards all that was heard."""

    def __init__(self, host: str, port: int, site: str, broker: str = "") -> None:
        self.site, self.changed = site, threading.Condition()
        self.heard: dict[str, Heard] = {}
        self.asked: dict[str, list[Asked]] = {}
        self.messages = 0
        self.broker = broker
        self._where, self._waiting, self._subscribed = (host, port), set[tuple[str, str]](), False
        self._client = Client(CallbackAPIVersion.VERSION2, f"{site}-operator", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.max_inflight_messages_set(0)
        self._client.connect_timeout = CONNECT_S
        self._client.on_connect, self._client.on_subscribe = self._on_connect, self._on_subscribe
        self._client.on_message = self._on_message

    def __enter__(self) -> Self:
        try:
            self._client.connect(*self._where, properties=properties_of(PacketTypes.CONNECT, SessionExpiryInterval=300))
        except (OSError, ValueError) as error:
            raise DeviceError(explain(error, *self._where)) from error
        self._client.loop_start()
        if not self.wait(lambda: self._subscribed, CONNECT_S):
            self._client.loop_stop()
            raise DeviceError(
                f"{self._where[0]}:{self._where[1]} lets nobody subscribe: check the broker's access list"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.heard:  # nothing of a made-up fleet stays at the broker
            self._client.publish(topics.topic_of(self.site, name, topics.STATUS), b"", 1, retain=True)
        self._client.publish(f"{messages.PROTOCOL}/{self.site}/end", b"", 1).wait_for_publish(CONNECT_S)
        self._client.disconnect()
        self._client.loop_stop()

    def expect(self, device: str) -> Heard:
        """Begin to hear a device."""
        self.asked[device] = []
        return self.heard.setdefault(device, Heard())

    def ask(
        self,
        device: str,
        name: str,
        body: Mapping[str, object],
        outcome: Literal["ok", "refused"] = "ok",
        facts: Mapping[str, object] | None = None,
        own_topic: bool = True,
    ) -> None:
        """Send a command; `outcome` and `facts` are what its answer must say."""
        asked = Asked(f"{device}.{len(self.asked[device])}.{name}", name, outcome, facts or {})
        how: dict[str, Any] = {"CorrelationData": asked.id.encode(), "ContentType": "application/json"}
        if own_topic:
            how["ResponseTopic"] = topics.topic_of(self.site, device, topics.RESPONSE) + OWN
        with self.changed:
            self.asked[device].append(asked)
            self._waiting.add((device, asked.id))
        topic = topics.topic_of(self.site, device, topics.COMMAND, name)
        payload = json.dumps({"id": asked.id, **body}).encode()
        self._client.publish(topic, payload, 1, properties=properties_of(PacketTypes.PUBLISH, **how))

    def answered(self) -> bool:
        """Whether every command has an answer."""
        return not self._waiting

    def wait(self, predicate: Callable[[], bool], timeout: float) -> bool:
        """Whether `predicate` became true within `timeout` seconds."""
        with self.changed:
            return self.changed.wait_for(predicate, timeout)

    def _on_connect(self, client: Client, *_: object) -> None:
        options = SubscribeOptions(qos=1, noLocal=True)
        client.subscribe([(f"{messages.PROTOCOL}/{self.site}/#", options)])
        if not self.broker:  # iotcore, which only runs embedded, disconnects a client that subscribes to $SYS
            client.subscribe(VERSION)

    def _on_subscribe(self, *given: Any) -> None:
        with self.changed:
            self._subscribed |= not given[3][0].is_failure
            self.changed.notify_all()

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        with self.changed:
            self._hear(message)
            self.changed.notify_all()

    def _hear(self, message: MQTTMessage) -> None:
        if message.topic == VERSION:
            self.broker = message.payload.decode(errors="replace")[:80]
            return
        self.messages += 1
        device, row = self._sender(message.topic)
        if device in self.heard and row is not None and message.payload:
            heard = self.heard[device]
            heard.hear(row, bytes(message.payload), getattr(message.properties, "CorrelationData", None))
            if row is topics.RESPONSE:
                self._waiting -= {(device, identity) for identity in heard.answers}

    def _sender(self, topic: str) -> tuple[str, topics.Topic | None]:
        address = topics.match(topic.removesuffix(OWN))
        if address is None or address.topic.direction != "up":
            return "", None
        return address.device, address.topic
