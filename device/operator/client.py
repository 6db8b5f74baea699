"""The other end of the line: how an operator's program hears boards and commands them.

Rules of this file:

1. MQTT 5, one connection, which comes back by itself and subscribes again.
2. A response is matched by correlation data, never by its order.
3. What does not come within the time given is a `DeviceError` that says where it was asked. So is at once what the
   broker will not pass on: no such board, or not ours to command.
4. With a `session` the broker keeps what comes while nobody listens; otherwise nothing is left behind.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
"""MQTT 5's reason code of a publish that no subscription matches."""


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
        self,
        address: BrokerAddress,
        filters: tuple[str, ...],
        on_message: Callable[[str, bytes], None],
        session: str | None = None,
    ) -> None:
        self._address, self._filters, self._on_message, self._session = address, filters, on_message, session
        self._ready, self._refused = threading.Event(), ""
        self._news = threading.Condition()
        self._waiting: dict[bytes, list[bytes]] = {}
        self._turned_away: dict[int, str] = {}
        name = f"edgeear-operator-{session or secrets.token_hex(6)}"
        client = self._client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
        client.on_connect, client.on_disconnect = self._came_up, self._went_down
        client.on_message, client.on_subscribe, client.on_publish = self._came_in, self._subscribed, self._published
        if address.username is not None:
            client.username_pw_set(address.username, address.password)
        if address.tls is not None:
            client.tls_set_context(_context(address.tls))

    @property
    def connected(self) -> bool:
        """Whether the broker hears us now."""
        return self._ready.is_set() and not self._refused

    def ask(self, site: str, device: str, command: messages.Command, wait_s: float = WAIT_S) -> messages.Response:
        """Send `command` to a board and return its response. Raises `DeviceError` where none comes in time."""
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
            with self._news:
                self._news.wait_for(lambda: bool(answers) or number in self._turned_away, wait_s)
                reason = self._turned_away.pop(number, "")
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
        """Connect and subscribe. Raises `DeviceError` where the broker is not there, refuses us, or says nothing."""
        host, port = self._address.host, self._address.port
        properties = properties_of(PacketTypes.CONNECT, SessionExpiryInterval=topics.DAY if self._session else 0)
        try:
            self._client.connect(host, port, clean_start=self._session is None, properties=properties)
        except (OSError, ValueError) as error:
            raise DeviceError(explain(error, host, port)) from error
        self._client.loop_start()
        if not self._ready.wait(wait_s) or self._refused:
            self.close()
            raise DeviceError(f"{host}:{port}: {self._refused or f'no word from it in {wait_s:g} s: is it a broker?'}")

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    # Called in the network's thread

    def _came_up(self, client: Client, data: Any, flags: ConnectFlags, reason: ReasonCode, extra: Any) -> None:
        self._refused = ""
        if reason.is_failure:
            self._refused = f"the broker refuses us: {reason}; check user, password or certificate"
        if self._filters and not self._refused:
            client.subscribe([(one, 1) for one in self._filters])
        else:
            self._ready.set()

    def _subscribed(self, client: Client, data: Any, mid: int, reasons: list[ReasonCode], extra: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            names = ", ".join(self._filters)
            self._refused = f"the broker does not let us hear {names}: check user or certificate, and the access list"
        self._ready.set()

    def _went_down(self, client: Client, data: Any, flags: DisconnectFlags, reason: ReasonCode, extra: Any) -> None:
        if not self._refused:
            self._ready.clear()

    def _published(self, client: Client, data: Any, mid: int, reason: ReasonCode, extra: Any) -> None:
        if reason.value == NOBODY:
            told = "was never there, or too long ago: no board of this name listens, check site and device"
        elif reason.is_failure:
            told = f"is not ours to command: the broker says {reason}; check the access list"
        else:
            return
        with self._news:
            self._turned_away[mid] = told
            self._news.notify_all()

    def _came_in(self, client: Client, data: Any, message: MQTTMessage) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        answers = None if correlation is None else self._waiting.get(bytes(correlation))
        if answers is not None:
            with self._news:
                answers.append(bytes(message.payload))
                self._news.notify_all()
        self._on_message(message.topic, bytes(message.payload))


def _context(files: TlsFiles) -> Any:
    try:
        return files.context()
    except OSError as error:
        named = ", ".join(str(file) for file in (files.ca, files.cert, files.key) if file is not None)
        raise UsageError(f"{named}: {error.strerror or error}; name PEM files that you may read") from error


@contextmanager
def operator(
    address: BrokerAddress,
    filters: tuple[str, ...],
    on_message: Callable[[str, bytes], None] = lambda *_: None,
    session: str | None = None,
) -> Iterator[Operator]:
    """A connected operator, who hears what matches `filters`."""
    made = Operator(address, filters, on_message, session)
    made.open(WAIT_S)
    try:
        yield made
    finally:
        made.close()
