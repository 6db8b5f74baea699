"""One connection to a broker, from CONNECT to its end: joins a `Delivery` and paho-mqtt's client. For one thread.

Rules of this file:

1. The `Delivery` decides what is sent, and when. This file sends it, and passes on what comes back.
2. Any failure ends the connection with a text that tells the operator what to check.
3. Subscriptions ask for no retained message: a retained command would come again at each connect.
4. An idle connection does nothing: the thread sleeps in poll(2) until the socket, the waker, `Delivery.until` or a
   quarter of the keep-alive.
"""

from __future__ import annotations

import math
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, assert_never

from paho.mqtt import MQTTException
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from device.mqtt import paho, topics
from device.mqtt.delivery import (
    FETCH,
    MAX_PACKET,
    Acknowledge,
    Action,
    Delivery,
    Disconnect,
    End,
    Fetch,
    Publish,
    Remove,
    Subscribe,
    Tell,
)
from edgeear.errors import UsageError

if TYPE_CHECKING:
    from device.mqtt.items import Item

UNSUPPORTED: Final = 0x84
PROTOCOL_ERROR: Final = 0x82
SILENT: Final = 0x8D
NOT_OUR_FAULT: Final = {0x00, 0x89, 0x8B, 0x8E, 0x97, 0x98, 0x9C, 0x9D, 0x9F, 0xA0}
"""Reasons that do not depend on what we sent: shut down, busy, session taken over, quota, administrator, moved, ..."""
REMEDIES: Final = {
    0x84: "; MQTT 3.1.1 is tried next",
    0x85: "; check that the broker accepts this client id",
    0x86: "; check mqtt.username and mqtt.password",
    0x87: "; check mqtt.username, mqtt.password and the broker's access list",
}


@dataclass(frozen=True)
class LinkPolicy:
    """How to reach the broker and how hard to load it. Raises UsageError for a value out of range.

    `receive_maximum`: QoS 1 commands that the broker may send before the first is acknowledged. `inflight`: items
    sent before the first PUBACK; the broker's own receive maximum wins where it is lower. `rate`: items per second
    taken from the outbox, 0 for no limit. `hold_s`: how long items of a topic wait that the broker forbids.
    `maximum_packet`: bytes of the largest message that is accepted.
    """

    host: str
    site: str
    device: str
    port: int = 1883
    protocol: Literal["5", "3.1.1"] = "5"
    keepalive_s: int = 60
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: paho.TlsFiles | None = None
    session_expiry_s: int = 7 * topics.DAY
    receive_maximum: int = 32
    inflight: int = 128
    reconnect_min_s: float = 0.5
    reconnect_max_s: float = 60.0
    rate: float = 0.0
    hold_s: float = 3600.0
    frames: bool = False
    maximum_packet: int = 9 << 20

    def __post_init__(self) -> None:
        topics.prefix(self.site, self.device)
        if not self.host or any(character.isspace() for character in self.host):
            raise UsageError(f"host is {self.host!r}: it must be a name or an address")
        for name, low, high in (
            ("port", 1, 65_535),
            ("keepalive_s", 1, 65_535),
            ("session_expiry_s", 0, 0xFFFF_FFFF),
            ("receive_maximum", 1, 65_535),
            ("inflight", 1, 65_535),
            ("maximum_packet", 1 << 10, MAX_PACKET),
        ):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be from {low} to {high}")
        if not 0 < self.reconnect_min_s <= self.reconnect_max_s or not self.rate >= 0:
            raise UsageError(
                f"reconnect_min_s {self.reconnect_min_s} must be above 0 and at most reconnect_max_s "
                f"{self.reconnect_max_s}, rate {self.rate} not below 0"
            )

    @property
    def client_id(self) -> str:
        return f"edgeear-{self.site}-{self.device}"

    def backoff(self, tries: int, rng: random.Random) -> float:
        """Seconds to wait after `tries` failures in a row; rule 3 of `device.mqtt.link`."""
        return rng.uniform(0, min(self.reconnect_max_s, self.reconnect_min_s * 2 ** min(tries, 30)))


class Backlog(Protocol):
    """What the link needs of the outbox: items in order, and a way to remove them."""

    def pending(self, after: int, limit: int) -> Sequence[Item]: ...
    def acknowledge(self, ids: Sequence[int]) -> None: ...


class Connection:
    """`open`, then `step` until `ended` says why, then `close`. `will`: what the broker publishes where the connection
    ends without DISCONNECT. `receive` gets each message, `report` each text for the operator. `blame`: the broker may
    have ended it because of what it was sent; `unsupported`: it does not know this version of MQTT."""

    def __init__(
        self,
        policy: LinkPolicy,
        five: bool,
        delivery: Delivery,
        outbox: Backlog,
        will: bytes,
        receive: Callable[[MQTTMessage], None],
        report: Callable[[bool, str], None],
    ) -> None:
        self.ended: str | None = None
        self.blame = self.unsupported = self._leaving = False
        self._policy, self._five, self._delivery, self._outbox = policy, five, delivery, outbox
        self._report = report
        self._give_up = time.monotonic() + paho.CONNECT_S
        self._errors = paho.LastError()
        client = paho.make_client(policy.client_id, five, policy.username, policy.password, self._errors)
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_subscribe, client.on_publish = self._on_subscribe, self._on_publish
        client.on_message = lambda client, data, message: receive(message)
        topic, row = topics.topic_of(policy.site, policy.device, topics.STATUS), topics.STATUS
        client.will_set(topic, will, row.qos, row.retain, paho.will_properties(row.content_type) if five else None)
        self._client = client

    def open(self) -> None:
        """Reach the broker and send CONNECT; `ended` says where that fails."""
        policy, client = self._policy, self._client
        try:
            if policy.tls is not None:
                client.tls_set_context(policy.tls.context())
            if self._five:
                asked = paho.connect_properties(policy.session_expiry_s, policy.receive_maximum, policy.maximum_packet)
                client.connect(policy.host, policy.port, policy.keepalive_s, clean_start=False, properties=asked)
            else:
                client.connect(policy.host, policy.port, policy.keepalive_s)
        except (OSError, ValueError) as error:
            self._end(paho.explain(error, policy.host, policy.port))
        self._give_up = time.monotonic() + paho.CONNECT_S

    def step(self, waker: socket.socket) -> None:
        """Do what can be done now, then wait until there is more, or until `waker` can be read."""
        while self.ended is None:
            action = self._delivery.next(time.monotonic(), not self._client.want_write())
            if action is None:
                break
            self.perform(action)
        if not self._delivery.connected and time.monotonic() >= self._give_up:
            self._end(f"{self._policy.host} took the connection but did not answer within {paho.CONNECT_S:g} s")
        if self.ended is None:
            self._wait(waker)

    def perform(self, action: Action) -> None:
        """Do what the delivery asks for."""
        match action:
            case Publish():
                self._publish(action)
            case Subscribe():
                self._subscribe()
            case Acknowledge():
                self._client.ack(action.mid, 1)
            case Fetch():
                self._delivery.fetched(self._outbox.pending(action.after, FETCH))
            case Remove():
                self._outbox.acknowledge(action.items)
            case Tell():
                self._report(self._delivery.connected, action.text)
            case Disconnect():
                self._leaving = True
                self._client.disconnect()
            case End():
                self._end(action.why)
            case _:
                assert_never(action)

    def close(self) -> None:
        """Give up the socket."""
        sock = self._client.socket()
        if sock is not None:
            sock.close()  # without a DISCONNECT: the broker then publishes the will

    def _publish(self, message: Publish) -> None:
        properties = None
        try:
            if self._five:
                properties = paho.publish_properties(message.content_type, message.expiry_s, message.correlation)
            info = self._client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        except (ValueError, TypeError, struct.error, MQTTException) as error:
            self._delivery.unfit(message, str(error))
            return
        if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._delivery.sent(message, info.mid)
        else:
            self._end(f"sending failed: {self._errors.text or info.rc.name}")

    def _subscribe(self) -> None:
        rows = topics.subscriptions(self._policy.site, self._policy.device)
        wanted = [(name, qos) for name, qos in rows if self._policy.frames or not name.endswith("/frame")]
        if self._five:
            never = SubscribeOptions.RETAIN_DO_NOT_SEND
            self._client.subscribe([(name, SubscribeOptions(qos=qos, retainHandling=never)) for name, qos in wanted])
        else:
            self._client.subscribe(wanted)

    def _end(self, why: str, blame: bool = False) -> None:
        if self.ended is None:
            self.ended, self.blame = why, blame

    def _wait(self, waker: socket.socket) -> None:
        client, sock = self._client, self._client.socket()
        if sock is None:
            self._end(f"connection lost{self._errors}")
            return
        poll = select.poll()
        poll.register(waker, select.POLLIN)
        poll.register(sock, select.POLLIN | (select.POLLOUT if client.want_write() else 0))
        ready = dict(poll.poll(0 if paho.decrypted(sock) else self._milliseconds()))
        if waker.fileno() in ready:
            waker.recv(4096)
        events = ready.get(sock.fileno(), 0)
        if events & ~select.POLLOUT or paho.decrypted(sock):
            client.loop_read()
        if events & select.POLLOUT:
            client.loop_write()
        client.loop_misc()

    def _milliseconds(self) -> int:
        """How long to sleep where nothing happens."""
        now, delivery = time.monotonic(), self._delivery
        until = delivery.until(now, not self._client.want_write()) if delivery.connected else self._give_up
        return max(1, math.ceil(1e3 * (min(until, now + self._client.keepalive / 4) - now)))

    # Called by paho inside `loop_read`, `loop_write` and `loop_misc`

    def _on_connect(self, client: Client, data: Any, flags: ConnectFlags, reason: ReasonCode, extra: Any) -> None:
        if reason.is_failure:
            self.unsupported = reason.value == UNSUPPORTED
            self._end(f"the broker refused the connection: {reason}{REMEDIES.get(reason.value, '')}")
            return
        most = getattr(extra, "ReceiveMaximum", 65_535), getattr(extra, "MaximumPacketSize", MAX_PACKET)
        self._delivery.accepted(time.monotonic(), *most)

    def _on_subscribe(self, client: Client, data: Any, mid: int, reasons: list[ReasonCode], extra: Any) -> None:
        version = "5" if self._five else "3.1.1"
        self._report(True, f"connected to {self._policy.host}:{self._policy.port}, MQTT {version}")
        for reason in reasons:
            if reason.is_failure:
                self._delivery.subscription_refused(str(reason))

    def _on_publish(self, client: Client, data: Any, mid: int, reason: ReasonCode, extra: Any) -> None:
        self._delivery.puback(mid, reason.value, str(reason), time.monotonic())

    def _on_disconnect(self, client: Client, data: Any, flags: DisconnectFlags, reason: ReasonCode, extra: Any) -> None:
        if self._leaving:
            self._end("stopped")
        elif reason.value == SILENT:
            self._end(f"the broker was silent for longer than the keep-alive of {client.keepalive} s")
        elif flags.is_disconnect_packet_from_server:
            self._end(f"the broker ended the connection: {reason}", blame=reason.value not in NOT_OUR_FAULT)
        elif reason.value == PROTOCOL_ERROR:
            self._end("the broker sent what MQTT does not allow", blame=True)
        else:
            self._end(f"connection lost{self._errors}", blame=True)
