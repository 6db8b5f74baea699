"""What a board sends, in which order, and what it waits for: the rules of delivery, apart from any network.

`Delivery` outlives connections. A driver (`device.mqtt.link`) tells it what happens (`accepted`, `puback`, `received`,
`disconnected`, ...) and does what `next` returns, one action at a time, until that is None. It has no thread and no
clock: each `now` is in seconds of a clock that never goes back. Only `wake`, `acknowledge`, `publish_now`,
`request_redelivery` and `stop` may be called from other threads: each appends to a queue or sets one attribute, and
then wakes the driver.

Rules of this file:

1. At most `inflight` messages of QoS 1 are unacknowledged, fewer where the broker's receive maximum is lower.
2. Items are sent in the order of the outbox. A PUBACK takes an item out of it. Acknowledged items are removed in
   batches, at the latest when nothing is in flight or the connection ends. What was in flight when the connection ended
   is sent again by the next one.
3. A PUBACK with a reason code of failure: an item that would always fail (`HOPELESS`, or larger than the broker's
   maximum packet) is dropped. Where the broker forbids the topic, which an operator can mend, the item stays in the
   outbox, and items of its topic are skipped for `hold_s`, over connections too, because some brokers disconnect after
   each. Any other code (quota, unspecified) ends the connection, and the item is tried again by the next. Each failure
   is counted; the first of a connection is reported.
4. Where a broker disconnects and has acknowledged nothing of what was in flight, the next connection sends one message
   at a time. An item on which the broker has thus disconnected `STRIKES` times in a row is held back until the process
   starts again: in MQTT 3.1.1 a broker has no other way to say "too large". The item stays in the outbox until the
   outbox's bounds drop it.
5. Subscriptions come before the birth, so that whoever sees a board online can command it.
6. A command is acknowledged once, on request (`acknowledge`), and only by the connection that brought it.

Items of an older connection are published as new messages, not with DUP and their old packet identifier as MQTT-4.4.0-1
asks: a receiver of QoS 1 keeps no state about identifiers, so nobody can tell; `(boot, seq)` removes the duplicates.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from device.mqtt import topics

if TYPE_CHECKING:
    from device.mqtt.items import Item

FETCH: Final = 64
"""Items read from the outbox at once."""
BATCH: Final = 256
"""Acknowledged items removed from the outbox at once."""
STRIKES: Final = 5
MAX_UNSENT: Final = 256
"""Messages of `publish_now` that may wait for the network."""
MAX_PACKET: Final = 268_435_455
"""Bytes; MQTT's own bound."""
HOPELESS: Final = {0x90, 0x99}
"""Topic name invalid, payload format invalid."""
NOT_AUTHORISED: Final = 0x87
QUOTA: Final = 0x97
CLASS_ROWS: Final = {row.cls: row for row in topics.TOPICS if row.cls is not None}

State = Literal["online", "offline"]


@dataclass(frozen=True)
class Publish:
    """Publish a message, then call `sent`, or `unfit` where MQTT cannot hold it. `item`: its id in the outbox, None for
    what is not from there. `expiry_s` counts from publication: the wait in the outbox has a bound of its own."""

    topic: str
    payload: bytes
    qos: Literal[0, 1]
    retain: bool
    content_type: str
    expiry_s: int | None = None
    correlation: bytes | None = None
    item: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the packet in MQTT 5, at most 3 too many."""
        properties = 3 + len(self.content_type.encode()) + 5 * (self.expiry_s is not None)
        properties += 0 if self.correlation is None else 3 + len(self.correlation)
        lengths = 1 + (properties > 127) + (properties > 16_383)
        # 9: type, remaining length, length of the topic, packet identifier
        return 9 + len(self.topic.encode()) + lengths + properties + len(self.payload)


@dataclass(frozen=True)
class Subscribe:
    """Subscribe to commands and frames."""


@dataclass(frozen=True)
class Acknowledge:
    """Send the PUBACK of the message `mid` that the broker sent."""

    mid: int


@dataclass(frozen=True)
class Fetch:
    """Read up to `FETCH` items above the id `after` from the outbox, and pass them to `fetched`."""

    after: int


@dataclass(frozen=True)
class Remove:
    """Remove acknowledged and dropped items from the outbox."""

    items: list[int]


@dataclass(frozen=True)
class Tell:
    """Report `text` to the operator."""

    text: str


@dataclass(frozen=True)
class Disconnect:
    """Send DISCONNECT: everything that should be said was said."""


@dataclass(frozen=True)
class End:
    """Close the connection without DISCONNECT, so that the broker publishes the will."""

    why: str


Action = Publish | Subscribe | Acknowledge | Fetch | Remove | Tell | Disconnect | End


class Token(NamedTuple):
    """Acknowledges a command: packet identifier `mid` of the connection that brought it."""

    connection: int
    mid: int


@dataclass
class LinkCounters:
    """Since the start: `connects` accepted by a broker, items `sent` (acknowledged), items `dropped` because a broker
    would never take them, refusals after which an item was `held` back in the outbox, messages that were `ignored`
    because they were no command."""

    connects: int = 0
    sent: int = 0
    dropped: int = 0
    held: int = 0
    ignored: int = 0
    last_refusal: str = ""


class Delivery:
    """See the module's rules. `status(state)` gives the payload of the birth ("online") and of the farewell
    ("offline"), published to `status_topic`. `rate`: items per second taken from the outbox, 0 for no limit.
    `wake_driver` is called by the methods that other threads may call."""

    def __init__(
        self,
        inflight: int,
        rate: float,
        hold_s: float,
        status_topic: str,
        status: Callable[[State], bytes],
        wake_driver: Callable[[], None] = lambda: None,
    ) -> None:
        self._inflight, self._rate_limit, self._hold_s = inflight, rate, hold_s
        self._status_topic, self._status, self._wake_driver = status_topic, status, wake_driver
        self._counters = LinkCounters()
        self._acks: deque[Token] = deque()
        self._unsent: deque[Publish] = deque()
        self._fresh = True  # the outbox may hold items that were not fetched
        self._redeliver = False
        self._stop: tuple[float, float] | None = None
        self._held: set[int] = set()  # items of rule 4
        self._forbidden: dict[str, float] = {}  # topics of rule 3, and when to try each again
        self._cautious, self._suspect, self._strikes = False, 0, 0  # rule 4
        self._connection = 0
        self._reset(0.0, inflight, MAX_PACKET)

    def _reset(self, now: float, usual: int, largest: int) -> None:
        """The state of one connection."""
        self.connected = False
        self._usual, self._largest = usual, largest
        self._window = 1 if self._cautious else usual
        self._rate = Rate(self._rate_limit, now)
        self._unsent.clear()
        self._actions: deque[Action] = deque()
        self._in_flight: dict[int, Publish] = {}  # by packet identifier, in the order of sending
        self._last_mid = 0
        self._inbound: set[int] = set()  # packet identifiers of commands not yet acknowledged
        self._done: list[int] = []
        self._fetched: deque[Item] = deque()
        self._after = 0
        self._skipped: set[int] = set()  # sent already, though the outbox is read from its start again
        self._farewell: Publish | None = None
        self._told = self._progress = False
        self._refused_item: int | None = None

    # May be called from other threads

    def wake(self) -> None:
        """Something was put into the outbox."""
        self._fresh = True
        self._wake_driver()

    def acknowledge(self, token: Token | None) -> None:
        """A command is dealt with: the broker may forget it. Does nothing if an older connection brought it, whose
        commands the broker sends again, if repeated, or for None."""
        if token is not None:
            self._acks.append(token)
            self._wake_driver()

    def publish_now(self, topic: str, payload: bytes, correlation: bytes | None = None) -> bool:
        """Send once with QoS 0, past the outbox. False, and lost, if not connected or the network does not keep up."""
        if not self.connected or len(self._unsent) >= MAX_UNSENT:
            return False
        row = topics.PREDICTION
        self._unsent.append(Publish(topic, payload, 0, False, row.content_type, row.expiry_s, correlation))
        self._wake_driver()
        return True

    def request_redelivery(self) -> None:
        """End the connection: after the next connect the broker sends again what was not acknowledged."""
        self._redeliver = True
        self._wake_driver()

    def stop(self, drain_until: float, leave_until: float) -> None:
        """Send what the outbox holds until `drain_until`, then the farewell; disconnect by `leave_until`."""
        self._stop = drain_until, leave_until
        self._wake_driver()

    # What happens

    def accepted(self, now: float, receive_maximum: int = 65_535, maximum_packet: int = MAX_PACKET) -> None:
        """The broker accepted a new connection with these limits of its own."""
        self._reset(now, min(self._inflight, receive_maximum), maximum_packet)
        self.connected, self._fresh, self._redeliver = True, True, False
        self._connection += 1
        self._counters.connects += 1
        self._actions += Subscribe(), self._say("online")

    def fetched(self, items: Sequence[Item]) -> None:
        """The answer to `Fetch`."""
        self._fetched.extend(items)
        if items:
            self._fresh, self._after = True, items[-1].id

    def sent(self, publish: Publish, mid: int) -> None:
        """`publish` went out with packet identifier `mid`."""
        self._last_mid = mid
        if publish.qos:
            self._in_flight[mid] = publish

    def unfit(self, publish: Publish, why: str) -> None:
        """MQTT cannot hold `publish`, and never will: a wildcard in the topic, a property too long."""
        if publish.item is not None:
            self._drop(publish.item, f"MQTT cannot hold it: {why}")

    def puback(self, mid: int, code: int, reason: str, now: float) -> None:
        """The broker answered `mid` with a reason `code` (below 0x80: success); `reason` is its text. Rule 3."""
        publish = self._in_flight.pop(mid, None)
        if publish is None:
            return  # of QoS 0, or repeated
        if publish is self._farewell:
            self._actions.append(Disconnect())
        if publish.item is None:
            if code >= 0x80:
                self._tell(f"the broker refuses our status: {reason}; check its access list")
        elif code < 0x80:
            self._done.append(publish.item)
            self._progress, self._window = True, self._usual
            self._counters.sent += 1
        elif code in HOPELESS:
            self._drop(publish.item, f"the broker refuses it: {reason}")
        elif code == NOT_AUTHORISED:
            self._counters.held += 1
            self._forbidden[publish.topic] = now + self._hold_s
            self._tell(f"the broker forbids {publish.topic}: {reason}; it waits, check the broker's access list")
        else:
            self._counters.held += 1
            self._refused_item = None if code == QUOTA else publish.item
            self._actions.append(End(f"the broker refuses item {publish.item}: {reason}"))

    def subscription_refused(self, reason: str) -> None:
        """The broker does not let the board subscribe."""
        self._tell(f"the broker refuses the subscription to commands: {reason}; check its access list")

    def received(self, mid: int) -> Token:
        """A message of QoS 1 came; `acknowledge` the token when it is dealt with."""
        self._inbound.add(mid)
        return Token(self._connection, mid)

    def ignored(self) -> None:
        """A message came that was neither a command nor a frame for this board."""
        self._counters.ignored += 1

    def disconnected(self, why: str, blame: bool) -> list[Remove | Tell]:
        """The connection ended because of `why`; what is left to do about it. `blame`: the broker may have disconnected
        because of what it was sent. Rule 4."""
        endings = [action for action in self._actions if isinstance(action, End)]
        items = [publish.item for publish in self._in_flight.values() if publish.item is not None]
        blamed = items if blame and not endings else []
        crowded = bool(blamed) and len(self._in_flight) > 1
        culprit = blamed[0] if blamed and not crowded else self._refused_item
        last: list[Remove | Tell] = [Remove(self._done)] if self._done else []
        last.append(Tell(endings[0].why if endings else why))
        if self._progress:
            self._cautious, self._strikes = False, 0
        elif culprit is not None:
            self._strikes = self._strikes + 1 if culprit == self._suspect else 1
            self._cautious, self._suspect = True, culprit
        elif crowded:
            self._cautious = True
        if self._strikes >= STRIKES:
            self._strikes = 0
            self._held.add(self._suspect)
            self._counters.held += 1
            self._counters.last_refusal = (
                f"item {self._suspect}: {STRIKES} connections in a row ended on it, it is held back"
            )
            last.append(Tell(self._counters.last_refusal))
        self._reset(0.0, self._inflight, MAX_PACKET)
        return last

    # What to do

    def next(self, now: float, writable: bool) -> Action | None:
        """What to do now. None: nothing until something happens, or `until`. `writable`: the network takes more."""
        if not self.connected:
            return None if self._stop is None else End("stopped before the broker answered")
        if self._actions:
            return self._actions.popleft()
        while self._acks:
            token = self._acks.popleft()
            if token.connection == self._connection and token.mid in self._inbound:
                self._inbound.remove(token.mid)
                return Acknowledge(token.mid)
        self._retry_forbidden(now)
        publish = (self._next_unsent() or self._next_item(now)) if writable else None
        return publish or self._leave(now) or self._remove()

    def until(self, now: float, writable: bool) -> float:
        """When `next` may have something to do even if nothing happens; infinity for never."""
        if not self.connected:
            return math.inf
        times = [math.inf, *self._forbidden.values()]
        if self._fetched and writable and len(self._in_flight) < self._window:
            times.append(now + self._rate.wait(now))
        if self._stop is not None:
            times.append(self._stop[0 if self._farewell is None else 1])
        return min(times)

    def counters(self) -> LinkCounters:
        """What was counted since the start."""
        return replace(self._counters)

    def _next_unsent(self) -> Publish | None:
        while self._unsent:
            publish = self._unsent.popleft()
            # paho spends packet identifiers on QoS 0, too: they must not come round to one that is in flight
            oldest = next(iter(self._in_flight), self._last_mid)
            if publish.size <= self._largest and (self._last_mid - oldest) % 65_535 <= 60_000:
                return publish
        return None

    def _next_item(self, now: float) -> Publish | Fetch | None:
        while self._farewell is None and len(self._in_flight) < self._window:
            if not self._fetched:
                if not self._fresh:
                    return None
                self._fresh = False  # before the look: what is put during it sets it again
                return Fetch(self._after)
            item = self._fetched[0]
            if item.id in self._held or item.topic in self._forbidden or item.id in self._skipped:
                self._fetched.popleft()
            elif not self._rate.take(now):
                return None
            elif (publish := self._publish(self._fetched.popleft())) is not None:
                return publish
        return None

    def _publish(self, item: Item) -> Publish | None:
        """None where the item had to be dropped. Its properties may name another `expiry_s` than the table of topics,
        the `correlation` data in hexadecimal, and `retain`."""
        row, extra = CLASS_ROWS[item.cls], item.properties
        correlation: Any = extra.get("correlation")
        try:
            given = None if correlation is None else bytes.fromhex(correlation)
            expiry = extra.get("expiry_s", row.expiry_s)
            retain = bool(extra.get("retain"))
            publish = Publish(item.topic, item.payload, 1, retain, row.content_type, expiry, given, item.id)
            if publish.size <= self._largest:
                return publish
            why = f"{len(item.payload)} bytes are too large for the broker, it takes {self._largest}"
        except (ValueError, TypeError) as error:
            why = f"MQTT cannot hold it: {error}"
        self._drop(item.id, why)
        return None

    def _retry_forbidden(self, now: float) -> None:
        """After `hold_s` the outbox is read from its start again, for the items that were skipped."""
        over = [topic for topic, until in self._forbidden.items() if now >= until]
        if over:
            for topic in over:
                del self._forbidden[topic]
            in_flight = {publish.item for publish in self._in_flight.values() if publish.item is not None}
            self._skipped = in_flight | set(self._done)
            self._fetched.clear()
            self._after, self._fresh = 0, True

    def _leave(self, now: float) -> Action | None:
        if self._redeliver:
            self._redeliver = False
            return End("commands found no room: the broker sends them again")
        if self._stop is None:
            return None
        idle = not self._in_flight and not self._fetched and not self._fresh
        if self._farewell is None and (idle or now >= self._stop[0]):
            self._farewell = self._say("offline")
            return self._farewell
        if now >= self._stop[1]:
            return End("stopped, before the broker confirmed our farewell")
        return None

    def _remove(self) -> Remove | None:
        if len(self._done) < (BATCH if self._in_flight else 1):
            return None
        done, self._done = self._done, []
        return Remove(done)

    def _say(self, state: State) -> Publish:
        row = topics.STATUS
        return Publish(self._status_topic, self._status(state), 1, row.retain, row.content_type, row.expiry_s)

    def _drop(self, item: int, why: str) -> None:
        self._done.append(item)
        self._counters.dropped += 1
        self._tell(f"item {item} was dropped: {why}")

    def _tell(self, text: str) -> None:
        """Reported once in a connection; `last_refusal` has the latest."""
        self._counters.last_refusal = text
        if not self._told:
            self._actions.append(Tell(text))
        self._told = True


class Rate:
    """A token bucket: `rate` items per second, at most a tenth of a second's worth at once; 0 for no limit."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate, self._most = rate, max(1.0, rate / 10)
        self._tokens, self._at = 1.0, now

    def take(self, now: float) -> bool:
        """Whether one more item may go now; takes its token."""
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
