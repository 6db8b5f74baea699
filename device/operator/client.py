"""An operator's MQTT client: it subscribes to boards, sends commands and waits for responses.

Rules of this file:

1. MQTT 5, one connection. It reconnects by itself and subscribes again.
2. A response is matched by its correlation data, never by its order.
3. `ask` raises `DeviceError`, which names the board, if no response comes in time; at once if the broker rejects the
   publish, because there is no such board or no right to command it.
4. With a `session` the broker keeps messages while the client is away. Without one it keeps nothing.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from device.mqtt import messages, topics
from device.mqtt.paho import TlsFiles, explain, properties_of
from edgeear.errors import DeviceError, UsageError

WAIT_S = 10.0
NOBODY = 0x10
"""MQTT 5's reason code for a publish that matches no subscription."""


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker is, and how to log in."""

    host: str
    port: int = 1883
    username: str | None = None
    password: str | None = None
    tls: TlsFiles | None = None


class Operator:
    """A client that is connected within its context and receives what matches `filters`. `on_message(topic, payload)`
    is called in the network's thread."""

    def __init__(
        self,
        address: BrokerAddress,
        filters: tuple[str, ...],
        on_message: Callable[[str, bytes], None] = lambda *_: None,
        session: str | None = None,
    ) -> None:
        self._address, self._filters, self._on_message, self._session = address, filters, on_message, session
        self._ready, self._refused = threading.Event(), ""
        self._changed = threading.Condition()
        self._waiting: dict[bytes, list[bytes]] = {}
        self._rejected: dict[int, str] = {}
        name = f"edgeear-operator-{session or secrets.token_hex(6)}"
        client = self._client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_message, client.on_subscribe, client.on_publish = self._on_receive, self._subscribed, self._published
        if address.username is not None:
            client.username_pw_set(address.username, address.password)
        if address.tls is not None:
            client.tls_set_context(_context(address.tls))

    @property
    def connected(self) -> bool:
        """Whether the broker accepts messages now."""
        return self._ready.is_set() and not self._refused

    def ask(self, site: str, device: str, command: messages.Command, wait_s: float = WAIT_S) -> messages.Response:
        """Send `command` to a board and return its response. Raises `DeviceError` if none comes within `wait_s`."""
        if not 0 < wait_s <= topics.DAY:
            raise UsageError(f"wait of {wait_s} s for an answer: give more than 0 and at most {topics.DAY}")
        correlation, answers = secrets.token_bytes(8), list[bytes]()
        properties = properties_of(
            PacketTypes.PUBLISH,
            ResponseTopic=topics.topic_of(site, device, topics.RESPONSE),
            CorrelationData=correlation,
            MessageExpiryInterval=max(1, int(wait_s)),
        )
        topic = topics.topic_of(site, device, topics.COMMAND, command.name)
        self._waiting[correlation] = answers
        try:
            number = self._client.publish(topic, command.payload(), qos=1, properties=properties).mid
            with self._changed:
                self._changed.wait_for(lambda: bool(answers) or number in self._rejected, wait_s)
                reason = self._rejected.pop(number, "")
        finally:
            del self._waiting[correlation]
        if not answers:
            late = f"did not answer {command.name} within {wait_s:g} s: is it online?"
            raise DeviceError(f"{site}/{device} {reason or late}")
        response = messages.parse(messages.Response, answers[0])
        if isinstance(response, messages.Refusal):
            raise DeviceError(f"{site}/{device} answered in another version: {response.reason}")
        return response

    def open(self, wait_s: float) -> None:
        """Connect and subscribe. Raises `DeviceError` if the broker is not reachable, refuses, or does not answer."""
        host, port = self._address.host, self._address.port
        properties = properties_of(PacketTypes.CONNECT, SessionExpiryInterval=topics.DAY if self._session else 0)
        try:
            self._client.connect(host, port, clean_start=self._session is None, properties=properties)
        except (OSError, ValueError) as error:
            raise DeviceError(explain(error, host, port)) from error
        self._client.loop_start()
        if not self._ready.wait(wait_s) or self._refused:
            self.close()
            raise DeviceError(f"{host}:{port}: {self._refused or f'no answer within {wait_s:g} s: is it a broker?'}")

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def __enter__(self) -> Operator:
        self.open(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Called in the network's thread

    def _on_connect(self, client: Client, data: Any, flags: ConnectFlags, reason: ReasonCode, extra: Any) -> None:
        self._refused = ""
        if reason.is_failure:
            self._refused = f"the broker refuses the connection: {reason}; check user, password or certificate"
        if self._filters and not self._refused:
            client.subscribe([(one, 1) for one in self._filters])
        else:
            self._ready.set()

    def _subscribed(self, client: Client, data: Any, mid: int, reasons: list[ReasonCode], extra: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            names = ", ".join(self._filters)
            self._refused = f"the broker does not send us {names}: check user or certificate, and the access list"
        self._ready.set()

    def _on_disconnect(self, client: Client, data: Any, flags: DisconnectFlags, reason: ReasonCode, extra: Any) -> None:
        if not self._refused:
            self._ready.clear()

    def _published(self, client: Client, data: Any, mid: int, reason: ReasonCode, extra: Any) -> None:
        if reason.value == NOBODY:
            told = "is unknown to the broker, or was away too long: check site and device"
        elif reason.is_failure:
            told = f"did not get the command: the broker refuses it ({reason}); check the access list"
        else:
            return
        with self._changed:
            self._rejected[mid] = told
            self._changed.notify_all()

    def _on_receive(self, client: Client, data: Any, message: MQTTMessage) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        answers = None if correlation is None else self._waiting.get(bytes(correlation))
        if answers is not None:
            with self._changed:
                answers.append(bytes(message.payload))
                self._changed.notify_all()
        self._on_message(message.topic, bytes(message.payload))


def _context(files: TlsFiles) -> Any:
    try:
        return files.context()
    except OSError as error:
        named = ", ".join(str(file) for file in (files.ca, files.cert, files.key) if file is not None)
        raise UsageError(f"{named}: {error.strerror or error}; name PEM files that you may read") from error
