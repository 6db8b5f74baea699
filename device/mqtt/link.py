"""The link of a board to its broker: connects, announces the board, empties the outbox, receives commands.

Rules of this file:

1. One thread does all that touches the network. The `Delivery` decides what is sent, and when; this file does it
   through paho-mqtt's client and passes on what comes back. Other threads only leave something with the `Delivery` and
   wake the link's thread.
2. Each connection is a fresh `Connection` with a fresh MQTT client: it repeats nothing of the last one. Only the
   outbox retransmits, and an item leaves it only after the broker's PUBACK.
3. Any failure ends the connection with a text that tells the operator what to check. `on_change(False, text)` reports
   it once, and the next try follows after an exponential back-off with full jitter: a delay drawn uniformly from
   [0, min(most, least * 2^tries)] (Brooker, "Exponential Backoff And Jitter", 2015). Only a connection that lasted
   `reconnect_max_s` resets the back-off, so that two boards with the same name do not disconnect each other at full
   speed.
4. A broker that does not know MQTT 5 gets 3.1.1 at once, one that ends `HANG_UPS` connections in a row without an
   answer to MQTT 5 gets 3.1.1 next. The next reconnect asks for MQTT 5 again; a broker that was found to hang up is
   asked once. Where `SHORT_LIVED` accepted connections in a row last less than `reconnect_max_s`, that is reported with
   its usual cause: two clients with one client id disconnect each other.
5. Subscriptions ask for no retained message: a retained command would come again at each connect.
6. An idle connection does nothing: the thread sleeps in poll(2) until the socket, the waker, `Delivery.until` or a
   quarter of the keep-alive.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, assert_never

from paho.mqtt import MQTTException
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from device.mqtt import delivery as rules
from device.mqtt import paho, topics
from device.mqtt.delivery import MAX_PACKET, Delivery, LinkCounters, State, Token
from device.mqtt.paho import TlsFiles
from edgeear.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from device.mqtt.outbox import Outbox

__all__ = ["Inbound", "Link", "LinkCounters", "LinkPolicy", "TlsFiles"]

UNSUPPORTED: Final = 0x84
PROTOCOL_ERROR: Final = 0x82
SILENT: Final = 0x8D
NOT_OUR_FAULT: Final = {0x00, 0x89, 0x8B, 0x8E, 0x97, 0x98, 0x9C, 0x9D, 0x9F, 0xA0}
"""Reasons that do not depend on what we sent: shut down, busy, session taken over, quota, administrator, moved, ..."""
HANG_UPS: Final = 3
SHORT_LIVED: Final = 4
TRY_OLD: Final = 'MQTT 3.1.1 is tried next. If that works, set mqtt.protocol = "3.1.1"'
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
        """Another one for each board: names hold no slash."""
        return f"edgeear-{self.site}/{self.device}"

    @property
    def same_id(self) -> str:
        """The remedy where another client disconnects this one."""
        return (
            f"another client may use the client id {self.client_id}, as a copy of this board's disk does; "
            "give each board a device.name of its own, or check the network"
        )

    def backoff(self, tries: int, rng: random.Random) -> float:
        """Seconds to wait after `tries` failures in a row; rule 3."""
        return rng.uniform(0, min(self.reconnect_max_s, self.reconnect_min_s * 2 ** min(tries, 30)))


@dataclass(frozen=True)
class Inbound:
    """A command from the broker. `name` of topic `.../command/infer` is "infer". `expires`: unix seconds, None for
    never. `dup`: it may have been delivered before. `token`: for `Delivery.acknowledge`."""

    name: str
    payload: bytes
    response_topic: str | None
    correlation: bytes | None
    expires: float | None
    dup: bool
    token: Token | None


class Link:
    """Keeps a board connected. `start` once, `stop` once; any thread may use its `delivery`. The link's thread calls
    `on_command`, `on_frame`, `on_change` and `status`, which must return at once.

    `status(state)` gives the payload of the birth ("online") and of the will and farewell ("offline"). `on_frame`
    matters only where the policy asks for frames. `rng` draws the back-off. `clock` gives unix seconds.
    """

    def __init__(
        self,
        policy: LinkPolicy,
        outbox: Outbox,
        status: Callable[[State], bytes],
        on_command: Callable[[Inbound], None],
        on_frame: Callable[[bytes], None],
        on_change: Callable[[bool, str], None],
        rng: random.Random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.policy, self.outbox, self.status = policy, outbox, status
        self._on_command, self._on_frame, self._on_change = on_command, on_frame, on_change
        self._rng, self._clock = rng, clock
        status_topic = topics.topic_of(policy.site, policy.device, topics.STATUS)
        self.delivery = Delivery(policy.inflight, policy.rate, policy.hold_s, status_topic, status, self._wake_up)
        self._reported: tuple[bool, str] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgeear-link", daemon=True)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)

    @property
    def connected(self) -> bool:
        """Whether the connection to the broker is up."""
        return self._reported is not None and self._reported[0]

    def start(self) -> None:
        """Connect, in a thread of its own."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Send what the outbox holds within half of `timeout` seconds, then the offline status, then disconnect."""
        now = time.monotonic()
        self._stopping.set()
        self.delivery.stop(now + timeout / 2, now + timeout)
        if self._thread.ident is None:
            self._close()
        else:
            self._thread.join(timeout + 1.0)

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread wakes anyway; closed: it has ended
            self._wake_writer.send(b"\0")

    def _close(self) -> None:
        self._wake_reader.close()
        self._wake_writer.close()

    # In the link's thread

    def _run(self) -> None:
        tries, five = 0, self.policy.protocol == "5"
        hang_ups, most, short = 0, HANG_UPS, 0
        while not self._stopping.is_set():
            began, connects = time.monotonic(), self.delivery.counters().connects
            connection = self._live(five)
            if connection.unsupported and five:
                five = False
                continue
            accepted = self.delivery.counters().connects > connects
            if connection.unanswered and five:
                hang_ups += 1
                if hang_ups >= most:
                    hang_ups, five = 0, False
                    self.report(False, f"{self.policy.host}:{self.policy.port} does not answer MQTT 5: {TRY_OLD}")
            elif accepted or not five:
                most = 1 if accepted and not five else HANG_UPS
                hang_ups, five = 0, self.policy.protocol == "5"
            if time.monotonic() - began >= self.policy.reconnect_max_s:
                tries = short = 0
            elif accepted and not self._stopping.is_set():
                short += 1
                if short >= SHORT_LIVED:
                    self.report(False, f"{SHORT_LIVED} connections in a row were short: {self.policy.same_id}")
            self._stopping.wait(self.policy.backoff(tries, self._rng))
            tries += 1
        self._close()

    def _live(self, five: bool) -> Connection:
        """One connection from its start to its end, which is reported."""
        delivery, connection = self.delivery, Connection(self, five)
        try:
            why = self._steps(connection)
            for action in delivery.disconnected(why, connection.blame):
                connection.perform(action)
        except DeviceError as error:
            self.report(False, str(error))
        except Exception as error:  # a bug, ours or of a callback: the link must go on
            logging.getLogger(__name__).exception("the link failed and starts again")
            why = f"internal error {type(error).__name__}: {error}"
            delivery.disconnected(why, blame=False)
            with contextlib.suppress(Exception):
                self.report(False, why)
        return connection

    def _steps(self, connection: Connection) -> str:
        try:
            connection.open()
            while connection.ended is None:
                connection.step(self._wake_reader)
        except DeviceError as error:  # the outbox's disk
            return str(error)
        finally:
            connection.close()
        return connection.ended

    def receive(self, message: MQTTMessage) -> None:
        """Pass a command or a frame on; acknowledge at once what is no command."""
        address = _address(message)
        token = self.delivery.received(message.mid) if message.qos else None
        ours = (
            address is not None
            and (address.site, address.device) == (self.policy.site, self.policy.device)
            and not message.retain  # only where the broker does not respect the subscription's options
        )
        if ours and address is not None and address.command is not None:
            self._on_command(self._inbound(address.command, message, token))
            return
        if ours and address is not None and address.topic is topics.FRAME:
            self._on_frame(bytes(message.payload))
        else:
            self.delivery.ignored()
        self.delivery.acknowledge(token)

    def _inbound(self, name: str, message: MQTTMessage, token: Token | None) -> Inbound:
        given, payload = message.properties, bytes(message.payload)
        expiry = getattr(given, "MessageExpiryInterval", None)
        answer_to = getattr(given, "ResponseTopic", None), getattr(given, "CorrelationData", None)
        expires = None if expiry is None else self._clock() + expiry
        return Inbound(name, payload, *answer_to, expires, message.dup, token)

    def report(self, connected: bool, text: str) -> None:
        """Call `on_change` unless it was told the same last."""
        if self._reported != (connected, text):
            self._reported = (connected, text)
            self._on_change(connected, text)


class Connection:
    """`open`, then `step` until `ended` says why, then `close`; the broker publishes the offline status where it ends
    without DISCONNECT. `blame`: the broker may have ended it because of what it was sent; `unsupported`: it does not
    know this version of MQTT; `unanswered`: it took the TCP connection and ended without an answer to CONNECT."""

    def __init__(self, link: Link, five: bool) -> None:
        self.ended: str | None = None
        self.blame = self.unsupported = self.unanswered = self._leaving = False
        self._link, self._five, self._delivery, self._policy = link, five, link.delivery, link.policy
        policy, will = link.policy, link.status("offline")
        self._give_up = time.monotonic() + paho.CONNECT_S
        self._errors = paho.LastError()
        client = Client(
            CallbackAPIVersion.VERSION2,
            policy.client_id,
            clean_session=None if five else False,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.max_inflight_messages_set(0)  # no limit: the delivery keeps the window
        client.connect_timeout = paho.CONNECT_S
        client.enable_logger(self._errors.logger)
        client.username_pw_set(policy.username, policy.password)
        client.on_socket_open = paho.send_at_once
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_subscribe, client.on_publish = self._on_subscribe, self._on_publish
        client.on_message = lambda client, data, message: link.receive(message)
        topic, row = topics.topic_of(policy.site, policy.device, topics.STATUS), topics.STATUS
        about = {"ContentType": row.content_type, "WillDelayInterval": 0}
        last = paho.properties_of(PacketTypes.WILLMESSAGE, **about) if five else None
        client.will_set(topic, will, row.qos, row.retain, last)
        self._client = client

    def open(self) -> None:
        """Reach the broker and send CONNECT; `ended` says where that fails."""
        policy, client = self._policy, self._client
        try:
            if policy.tls is not None:
                client.tls_set_context(policy.tls.context())
            if self._five:
                asked = paho.properties_of(
                    PacketTypes.CONNECT,
                    SessionExpiryInterval=policy.session_expiry_s,
                    ReceiveMaximum=policy.receive_maximum,
                    MaximumPacketSize=policy.maximum_packet,
                )
                client.connect(policy.host, policy.port, policy.keepalive_s, clean_start=False, properties=asked)
            else:
                client.connect(policy.host, policy.port, policy.keepalive_s)
        except (OSError, ValueError) as error:
            self._end(paho.explain(error, policy.host, policy.port))
        self.unanswered = self.ended is None
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

    def perform(self, action: rules.Action) -> None:
        """Do what the delivery asks for."""
        match action:
            case rules.Publish():
                self._publish(action)
            case rules.Subscribe():
                self._subscribe()
            case rules.Acknowledge():
                self._client.ack(action.mid, 1)
            case rules.Fetch():
                self._delivery.fetched(self._link.outbox.pending(action.after, rules.FETCH))
            case rules.Remove():
                self._link.outbox.acknowledge(action.items)
            case rules.Tell():
                self._link.report(self._delivery.connected, action.text)
            case rules.Disconnect():
                self._leaving = True
                self._client.disconnect()
            case rules.End():
                self._end(action.why)
            case _:
                assert_never(action)

    def close(self) -> None:
        """Give up the socket."""
        sock = self._client.socket()
        if sock is not None:
            sock.close()  # without a DISCONNECT: the broker then publishes the will

    def _publish(self, message: rules.Publish) -> None:
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
        self.unanswered = False
        if reason.is_failure:
            self.unsupported = reason.value == UNSUPPORTED
            self._end(f"the broker refused the connection: {reason}{REMEDIES.get(reason.value, '')}")
            return
        most = getattr(extra, "ReceiveMaximum", 65_535), getattr(extra, "MaximumPacketSize", MAX_PACKET)
        self._delivery.accepted(time.monotonic(), *most)

    def _on_subscribe(self, client: Client, data: Any, mid: int, reasons: list[ReasonCode], extra: Any) -> None:
        version = "5" if self._five else "3.1.1"
        self._link.report(True, f"connected to {self._policy.host}:{self._policy.port}, MQTT {version}")
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


def _address(message: MQTTMessage) -> topics.Address | None:
    try:
        return topics.match(message.topic)
    except UnicodeDecodeError:
        return None
