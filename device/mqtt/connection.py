"""One connection to a broker, from CONNECT to its end. Belongs to `device.mqtt.link`, whose thread alone runs it.

Rules of this file:

1. At most `window` messages of QoS 1 are unacknowledged: the lower of the policy's and the broker's receive-maximum.
2. Items are sent in the order of the outbox. A PUBACK takes an item out of it; acknowledged items are removed in
   batches, at the latest when nothing is in flight or the connection ends.
3. A PUBACK with a reason code of failure: what the same bytes would meet again (`HOPELESS`, larger than the broker's
   maximum packet) is dropped. What an operator can mend (not authorised) stays in the outbox, and items of its topic
   are passed over for `hold_s`, over connections too, because some brokers hang up on each. Anything else (quota,
   unspecified) ends the connection, and all is tried again after the back-off. Each is counted; the first of a
   connection is told.
4. Subscriptions come before the birth, so who sees a board online can command it. They ask for no retained message: a
   retained command would come again at each connect.
5. Commands are acknowledged only on request (`Link.acknowledge`); what is no command is acknowledged unread.
6. Nothing is done when there is nothing to do: the thread sleeps in poll(2) until the socket, the bell, the next token
   of the rate or a quarter of the keep-alive.

Items of an older connection are published as new messages, not with DUP and their old packet identifier as MQTT-4.4.0-1
asks: a receiver of QoS 1 keeps no state about identifiers, so nobody can tell; `(boot, seq)` removes the duplicates.
"""

from __future__ import annotations

import math
import select
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from paho.mqtt import MQTTException
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from device.mqtt import paho, topics

if TYPE_CHECKING:
    from device.mqtt.link import Link

FETCH: Final = 64
"""Items read from the outbox at once."""
BATCH: Final = 256
"""Acknowledged items removed from the outbox at once."""
HOPELESS: Final = {0x90, 0x99}
"""Topic name invalid, payload format invalid."""
NOT_AUTHORISED: Final = 0x87
UNSUPPORTED: Final = 0x84
PROTOCOL_ERROR: Final = 0x82
SILENT: Final = 0x8D
QUOTA: Final = 0x97
NOT_OUR_FAULT: Final = {0x00, 0x89, 0x8B, 0x8E, 0x97, 0x98, 0x9C, 0x9D, 0x9F, 0xA0}
"""Why a broker disconnects whatever we sent: shut down, busy, session taken over, quota, administrator, moved, ..."""
REMEDIES: Final = {
    0x84: "; MQTT 3.1.1 is tried next",
    0x85: "; check that the broker takes this client id",
    0x86: "; check mqtt.username and mqtt.password",
    0x87: "; check mqtt.username, mqtt.password and the broker's access list",
}
CLASS_ROWS: Final = {row.cls: row for row in topics.TOPICS if row.cls is not None}


class Token(NamedTuple):
    """What acknowledges a command: only the connection that brought it can."""

    connection: int
    mid: int


@dataclass(frozen=True)
class Inbound:
    """A message from the broker. `name` of topic `.../command/infer` is "infer". `expires`: unix seconds, None for
    never. `dup`: it may have been delivered before. `token`: give the whole back to `Link.acknowledge`."""

    name: str
    kind: Literal["command"]
    payload: bytes
    response_topic: str | None
    correlation: bytes | None
    expires: float | None
    dup: bool
    token: Token | None


@dataclass(frozen=True)
class LinkCounters:
    """Since the start: `connects` accepted by a broker, items `sent` (acknowledged), items `dropped` because a broker
    would never take them, refusals after which an item was `held` back in the outbox, messages that were `ignored`
    as no command."""

    connects: int
    sent: int
    dropped: int
    held: int
    ignored: int
    last_refusal: str


class OutgoingItem(Protocol):
    """What the link needs of an item of the outbox."""

    @property
    def id(self) -> int: ...
    @property
    def cls(self) -> Literal["telemetry", "frame", "response", "event"]: ...
    @property
    def topic(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def properties(self) -> Mapping[str, Any]: ...


class Outgoing(Protocol):
    """What the link needs of the outbox: items in order, and a way to say which are done."""

    def pending(self, after: int, limit: int) -> Sequence[OutgoingItem]: ...
    def acknowledge(self, ids: Sequence[int]) -> None: ...


class Connection:
    """`open`, then `step` until `ended` says why, then `close`. `hung_up_on`: the only message in
    flight when the broker closed the connection; `crowded`: there were more; `progress`: an item was acknowledged."""

    def __init__(self, link: Link, number: int, protocol: Literal["5", "3.1.1"], cautious: bool) -> None:
        self.ended: str | None = None
        self.connected = self.unsupported = self.progress = self.crowded = False
        self.hung_up_on: int | None = None
        self._link, self._policy, self._number, self._five = link, link.policy, number, protocol == "5"
        self._status_topic = topics.topic_of(link.policy.site, link.policy.device, topics.STATUS)
        self._usual = link.policy.inflight
        self._window = 1 if cautious else self._usual
        self._largest = 268_435_455
        self._in_flight: dict[int, OutgoingItem | None] = {}  # by packet identifier; None for birth and farewell
        self._done: list[int] = []
        self._fetched: deque[OutgoingItem] = deque()
        self._after = 0
        self._told = False
        self._seen: set[int] = set()  # sent before the last rewind
        self._rate = Rate(link.policy.rate, time.monotonic())
        self._farewell: int | None = None
        self._last = 0  # packet identifier
        self._give_up = time.monotonic() + paho.CONNECT_S
        self._errors = paho.LastError()
        client_id, user, password = link.policy.client_id, link.policy.username, link.policy.password
        self._client = paho.make_client(client_id, self._five, user, password, self._errors)

    def open(self) -> None:
        """Reach the broker and ask it in; `ended` says where that fails."""
        policy, client = self._policy, self._client
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_subscribe, client.on_publish = self._on_subscribe, self._on_publish
        client.on_message = self._on_message
        will = paho.will_properties(topics.STATUS.content_type) if self._five else None
        client.will_set(self._status_topic, self._link.status("offline"), 1, True, will)
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

    def step(self) -> None:
        """Do what can be done now, then wait until there is more."""
        if self.connected:
            self._send_acknowledgements()
            self._send_unsent()
            self._retry_forbidden()
            self._drain()
            self._leave()
            if self._link.redeliver and self.ended is None:
                self._link.redeliver = False
                self._end("commands found no room: the broker sends them again")
        elif self._link.stop_at is not None:
            self._end("stopped before the broker answered")
        elif time.monotonic() >= self._give_up:
            self._end(f"{self._policy.host} took the connection but did not answer within {paho.CONNECT_S:g} s")
        self._settle(at_least=1 if not self._in_flight else BATCH)
        if self.ended is None:
            self._wait()

    def close(self) -> None:
        """Give up the socket; what was acknowledged leaves the outbox."""
        sock = self._client.socket()
        if sock is not None:
            sock.close()  # without a DISCONNECT: the broker then publishes the will
        self._settle(at_least=1)

    # What is sent

    def _send_acknowledgements(self) -> None:
        acks = self._link.acks
        while acks:
            token = acks.popleft()
            if token.connection == self._number:
                self._client.ack(token.mid, 1)

    def _send_unsent(self) -> None:
        """Messages of QoS 0, while the network keeps up; what waits here is bounded by `publish_now`."""
        unsent = self._link.unsent
        while unsent and not self._client.want_write():
            topic, payload, correlation = unsent.popleft()
            extra = {} if correlation is None else {"correlation": correlation.hex()}
            properties = self._properties(topics.PREDICTION, extra)
            if self._fits(topic, payload, properties) and not self._wraps():
                self._last = self._client.publish(topic, payload, 0, properties=properties).mid

    def _wraps(self) -> bool:
        """Whether packet identifiers, which paho also spends on QoS 0, come round to one that is in flight."""
        oldest = next(iter(self._in_flight), self._last)
        return (self._last - oldest) % 65_535 > 60_000

    def _drain(self) -> None:
        while self._farewell is None and self.ended is None and self._may_send():
            if not self._fetched and not self._fetch():
                return
            if self._passed_over(self._fetched[0]):
                self._fetched.popleft()
            elif self._rate.take(time.monotonic()):
                self._send(self._fetched.popleft())
            else:
                return

    def _passed_over(self, item: OutgoingItem) -> bool:
        return item.id in self._link.held or item.topic in self._link.forbidden or item.id in self._seen

    def _retry_forbidden(self) -> None:
        """After `hold_s` the outbox is read from its start again, for the items of a topic that were passed over."""
        forbidden, now = self._link.forbidden, time.monotonic()
        over = [topic for topic, until in forbidden.items() if now >= until]
        if over:
            for topic in over:
                del forbidden[topic]
            self._seen = {item.id for item in self._in_flight.values() if item is not None} | set(self._done)
            self._fetched.clear()
            self._after, self._link.fresh = 0, True

    def _may_send(self) -> bool:
        return len(self._in_flight) < self._window and not self._client.want_write()

    def _send(self, item: OutgoingItem) -> None:
        try:
            properties = self._properties(CLASS_ROWS[item.cls], item.properties)
            if self._fits(item.topic, item.payload, properties):
                self._publish(item.topic, item.payload, bool(item.properties.get("retain")), properties, item)
                return
            why = f"{len(item.payload)} bytes are too large for the broker, it takes {self._largest}"
        except (ValueError, TypeError, struct.error, MQTTException) as error:
            why = f"MQTT cannot hold it: {error}"  # and never will: a wildcard in the topic, a property too long
        self._drop(item.id, why)

    def _fetch(self) -> bool:
        if self._link.fresh:
            self._link.fresh = False  # before the look: what is put during it brings another
            self._fetched.extend(self._link.outbox.pending(self._after, FETCH))
        if self._fetched:
            self._link.fresh, self._after = True, self._fetched[-1].id
        return bool(self._fetched)

    def _publish(
        self, topic: str, payload: bytes, retain: bool, properties: Properties | None, item: OutgoingItem | None
    ) -> int:
        info = self._client.publish(topic, payload, 1, retain, properties)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS and self.ended is None:
            self._end(f"sending failed: {self._errors.text or info.rc.name}")
        self._in_flight[info.mid] = item
        self._last = info.mid
        return info.mid

    def _leave(self) -> None:
        """When asked to stop: with the outbox empty, or half of the time over, say offline; after its PUBACK leave."""
        link, now = self._link, time.monotonic()
        if link.stop_at is None or self.ended is not None:
            return
        idle = not self._in_flight and not self._fetched and not link.fresh
        if self._farewell is None and (idle or now >= link.stop_at[0]):
            self._farewell = self._say("offline")
        elif now >= link.stop_at[1]:
            self._end("stopped, without the broker's word that it knows")

    def _say(self, state: Literal["online", "offline"]) -> int:
        payload = self._link.status(state)
        return self._publish(self._status_topic, payload, True, self._properties(topics.STATUS, {}), None)

    def _properties(self, row: topics.Topic, extra: Mapping[str, Any]) -> Properties | None:
        """Content type and expiry as in the table of topics; `extra` of an item may name another `expiry_s` and the
        `correlation` data in hexadecimal. The expiry counts from publication: the wait here has the outbox's bound."""
        if not self._five:
            return None
        return paho.publish_properties(row.content_type, extra.get("expiry_s", row.expiry_s), extra.get("correlation"))

    def _fits(self, topic: str, payload: bytes, properties: Properties | None) -> bool:
        size = 9 + len(topic.encode()) + len(payload)  # 9: type, remaining length, length of topic, identifier
        if size + 2 * 65_535 <= self._largest or properties is None:
            return size <= self._largest
        return size + paho.packed(properties) <= self._largest

    # What comes in: called by paho inside `loop_read`

    def _on_connect(
        self, client: Client, userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self.unsupported = reason.value == UNSUPPORTED
            self._end(f"the broker refused the connection: {reason}{REMEDIES.get(reason.value, '')}")
            return
        self.connected = True
        self._usual = min(self._usual, getattr(properties, "ReceiveMaximum", 65_535))
        self._window = min(self._window, self._usual)
        self._largest = getattr(properties, "MaximumPacketSize", self._largest)
        self._link.tally["connects"] += 1
        self._link.fresh = True
        self._subscribe()
        self._say("online")

    def _subscribe(self) -> None:
        rows = topics.subscriptions(self._policy.site, self._policy.device)
        wanted = [(name, qos) for name, qos in rows if self._policy.frames or not name.endswith("/frame")]
        if self._five:
            never = SubscribeOptions.RETAIN_DO_NOT_SEND
            self._client.subscribe([(name, SubscribeOptions(qos=qos, retainHandling=never)) for name, qos in wanted])
        else:
            self._client.subscribe(wanted)

    def _on_subscribe(
        self, client: Client, userdata: Any, mid: int, reasons: Sequence[ReasonCode], properties: Properties | None
    ) -> None:
        version = "5" if self._five else "3.1.1"
        self._link.report(True, f"connected to {self._policy.host}:{self._policy.port}, MQTT {version}")
        for reason in reasons:
            if reason.is_failure:
                self._tell(f"the broker refuses the subscription to commands: {reason}; check its access list")

    def _on_publish(
        self, client: Client, userdata: Any, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if mid not in self._in_flight:
            return  # of QoS 0
        item = self._in_flight.pop(mid)
        if item is not None:
            self._on_puback(item, reason)
        elif reason.is_failure:
            self._tell(f"the broker refuses our status: {reason}; check its access list")
        if mid == self._farewell:
            self._client.disconnect()

    def _on_puback(self, item: OutgoingItem, reason: ReasonCode) -> None:
        """Rule 3."""
        link = self._link
        if not reason.is_failure:
            self._done.append(item.id)
            self.progress, self._window = True, self._usual
            link.tally["sent"] += 1
            return
        if reason.value in HOPELESS:
            self._drop(item.id, f"the broker refuses it: {reason}")
            return
        link.tally["held"] += 1
        if reason.value == NOT_AUTHORISED:
            link.forbidden[item.topic] = time.monotonic() + self._policy.hold_s
            self._tell(f"the broker forbids {item.topic}: {reason}; it waits, check the broker's access list")
        else:
            self.hung_up_on = None if reason.value == QUOTA else item.id
            self._end(f"the broker refuses item {item.id}: {reason}")

    def _drop(self, item: int, why: str) -> None:
        self._done.append(item)
        self._link.tally["dropped"] += 1
        self._tell(f"item {item} was dropped: {why}")

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        address = _address(message)
        ours = (
            address is not None
            and (address.site, address.device) == (self._policy.site, self._policy.device)
            and not message.retain  # only where the broker does not do as rule 4 asks
        )
        if ours and address is not None and address.command is not None:
            self._link.on_command(self._inbound(address.command, message))
            return
        if ours and address is not None and address.topic is topics.FRAME:
            self._link.on_frame(bytes(message.payload))
        else:
            self._link.tally["ignored"] += 1
        if message.qos:
            self._client.ack(message.mid, message.qos)

    def _inbound(self, name: str, message: MQTTMessage) -> Inbound:
        given = message.properties
        expiry = getattr(given, "MessageExpiryInterval", None)
        return Inbound(
            name,
            "command",
            bytes(message.payload),
            getattr(given, "ResponseTopic", None),
            getattr(given, "CorrelationData", None),
            None if expiry is None else self._link.clock() + expiry,
            message.dup,
            Token(self._number, message.mid) if message.qos else None,
        )

    def _on_disconnect(
        self, client: Client, userdata: Any, flags: DisconnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if self.ended is not None:
            return
        if self._farewell is not None and self._farewell not in self._in_flight:
            self._end("stopped")
        elif reason.value == SILENT:
            self._end(f"the broker was silent for longer than the keep-alive of {client.keepalive} s")
        else:
            told = flags.is_disconnect_packet_from_server
            if not (told and reason.value in NOT_OUR_FAULT):
                items = [item for item in self._in_flight.values() if item is not None]
                self.crowded = bool(items) and len(self._in_flight) > 1
                self.hung_up_on = items[0].id if items and not self.crowded else None
            if told:
                self._end(f"the broker ended the connection: {reason}")
            elif reason.value == PROTOCOL_ERROR:
                self._end("the broker sent what MQTT does not allow")
            else:
                self._end(f"connection lost{self._errors}")

    # Waiting

    def _wait(self) -> None:
        client, sock = self._client, self._client.socket()
        if sock is None:
            self._end(f"connection lost{self._errors}")
            return
        poll = select.poll()
        poll.register(self._link.bell, select.POLLIN)
        poll.register(sock, select.POLLIN | (select.POLLOUT if client.want_write() else 0))
        ready = dict(poll.poll(0 if paho.decrypted(sock) else self._patience()))
        if self._link.bell.fileno() in ready:
            self._link.bell.recv(4096)
        events = ready.get(sock.fileno(), 0)
        if events & ~select.POLLOUT or paho.decrypted(sock):
            client.loop_read()
        if events & select.POLLOUT:
            client.loop_write()
        client.loop_misc()

    def _patience(self) -> int:
        """Milliseconds that may pass before this thread has something to do, if nobody calls."""
        now = time.monotonic()
        until = now + self._client.keepalive / 4
        if not self.connected:
            until = min(until, self._give_up)
        elif self._fetched and self._may_send():
            until = min(until, now + self._rate.wait(now))
        if self._link.forbidden:
            until = min(until, *self._link.forbidden.values())
        if self._link.stop_at is not None:
            until = min(until, self._link.stop_at[0 if self._farewell is None else 1])
        return max(1, math.ceil(1e3 * (until - now)))

    # Small things

    def _settle(self, at_least: int) -> None:
        if len(self._done) >= at_least:
            done, self._done = self._done, []
            self._link.outbox.acknowledge(done)

    def _end(self, why: str) -> None:
        self.ended = self.ended or why

    def _tell(self, what: str) -> None:
        """To the operator, once in a connection; `last_refusal` has the latest."""
        self._link.last_refusal = what
        if not self._told:
            self._link.report(True, what)
        self._told = True


class Rate:
    """A token bucket: `rate` items per second, at most a tenth of a second's worth at once; 0 for no limit."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate, self._most = rate, max(1.0, rate / 10)
        self._tokens, self._at = 1.0, now

    def take(self, now: float) -> bool:
        if self._rate == 0:
            return True
        self._tokens = min(self._most, self._tokens + self._rate * (now - self._at))
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def wait(self, now: float) -> float:
        """Seconds until `take` succeeds."""
        return 0.0 if self._rate == 0 else max(0.0, (1 - self._tokens) / self._rate - (now - self._at))


def _address(message: MQTTMessage) -> topics.Address | None:
    try:
        return topics.match(message.topic)
    except UnicodeDecodeError:
        return None
