"""The other end of the line: how an operator's program hears boards and commands them.

Rules of this file:

1. MQTT 5, one connection, which comes back by itself and subscribes again.
2. A response is matched by correlation data, never by its order.
3. What does not come within the time given is a `DeviceError` that says where it was asked.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from device.mqtt import messages, topics
from device.mqtt.link import TlsFiles
from device.mqtt.paho import explain
from edgeear.errors import DeviceError

WAIT_S = 10.0


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker is and who asks."""

    host: str
    port: int = 1883
    username: str | None = None
    password: str | None = None
    tls: TlsFiles | None = None


class Operator:
    """A connected operator. `on_message(topic, payload)` is called in the network's thread."""

    def __init__(
        self, address: BrokerAddress, filters: tuple[str, ...], on_message: Callable[[str, bytes], None]
    ) -> None:
        self._address, self._filters, self._on_message = address, filters, on_message
        self._connected, self._refused = threading.Event(), ""
        self._waiting: dict[bytes, tuple[threading.Event, list[bytes]]] = {}
        client = Client(
            CallbackAPIVersion.VERSION2, f"edgeear-operator-{secrets.token_hex(6)}", protocol=MQTTProtocolVersion.MQTTv5
        )
        client.on_connect, client.on_message = self._came_up, self._came_in
        if address.username is not None:
            client.username_pw_set(address.username, address.password)
        if address.tls is not None:
            client.tls_set_context(address.tls.context())
        self._client = client

    def ask(self, site: str, device: str, command: messages.Command, wait_s: float = WAIT_S) -> messages.Response:
        """Send `command` to a board and return its response. Raises `DeviceError` where none comes in time."""
        correlation, came, answer = secrets.token_bytes(8), threading.Event(), list[bytes]()
        self._waiting[correlation] = came, answer
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = topics.topic_of(site, device, topics.RESPONSE)
        properties.CorrelationData = correlation
        properties.MessageExpiryInterval = max(1, int(wait_s))
        topic = topics.topic_of(site, device, topics.COMMAND, command.name)
        try:
            self._client.publish(topic, command.payload(), qos=1, properties=properties)
            if not came.wait(wait_s):
                raise DeviceError(f"{site}/{device} did not answer {command.name} within {wait_s:g} s: is it online?")
        finally:
            del self._waiting[correlation]
        response = messages.parse(messages.Response, answer[0])
        if isinstance(response, messages.Refusal):
            raise DeviceError(f"{site}/{device} answered in another version: {response.reason}")
        return response

    def open(self, wait_s: float) -> None:
        """Connect. Raises `DeviceError` where the broker is not there, refuses us, or says nothing."""
        host, port = self._address.host, self._address.port
        try:
            self._client.connect(host, port, clean_start=True)
        except (OSError, ValueError) as error:
            raise DeviceError(explain(error, host, port)) from error
        self._client.loop_start()
        if not self._connected.wait(wait_s) or self._refused:
            self.close()
            raise DeviceError(f"{host}:{port}: {self._refused or f'no word from it in {wait_s:g} s: is it a broker?'}")

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _came_up(self, client: Client, data: Any, flags: ConnectFlags, reason: ReasonCode, extra: Any) -> None:
        if reason.is_failure:
            self._refused = f"the broker refuses us: {reason}; check user, password or certificate"
        else:
            for one in self._filters:
                client.subscribe(one, qos=1)
        self._connected.set()

    def _came_in(self, client: Client, data: Any, message: MQTTMessage) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        if correlation is not None and (asked := self._waiting.get(bytes(correlation))) is not None:
            asked[1].append(bytes(message.payload))
            asked[0].set()
        self._on_message(message.topic, bytes(message.payload))


@contextmanager
def operator(
    address: BrokerAddress, filters: tuple[str, ...], on_message: Callable[[str, bytes], None] = lambda *_: None
) -> Iterator[Operator]:
    """A connected operator, who hears what matches `filters`."""
    made = Operator(address, filters, on_message)
    made.open(WAIT_S)
    try:
        yield made
    finally:
        made.close()
