"""The link of a board to its broker: connects, says who it is, empties the outbox, takes in commands; for years.

Rules of this file:

1. One thread does all that touches the network. Other threads only append to queues and wake it (`wake`,
   `acknowledge`, `publish_now`), so an acknowledgement of a connection that has gone is simply not sent.
2. Each connection is a fresh `Connection` with a fresh MQTT client: nothing of the last one is sent again by it. The
   outbox is the only retransmitter, and an item leaves it only after the broker's PUBACK.
3. Whatever goes wrong ends the connection with a text, is reported once by `on_change(False, text)`, and is followed
   by another try after an exponential back-off with full jitter: a delay drawn uniformly from [0, min(most, least *
   2^tries)] (Brooker, "Exponential Backoff And Jitter", 2015). Only a connection that lasted `reconnect_max_s` takes
   the back-off down again; thus two boards with one name do not take turns at full speed.
4. A broker that does not know MQTT 5 gets 3.1.1 at once; the next reconnect asks for MQTT 5 again.
5. Where a broker hangs up and has acknowledged nothing of what was in flight, the next connection sends one message at
   a time. An item on which the broker has thus hung up `STRIKES` times in a row is passed over until the next start of
   the process: in MQTT 3.1.1 a broker has no other word for "too large". It stays in the outbox, whose bounds end it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from device.mqtt import topics
from device.mqtt.connection import Connection, Inbound, LinkCounters, Outgoing, Token
from edgeear.errors import DeviceError, UsageError

__all__ = ["Inbound", "Link", "LinkCounters", "LinkPolicy", "TlsFiles"]

STRIKES: Final = 5
MOST_UNSENT: Final = 256
"""Messages of `publish_now` that may wait for the network."""


class _TlsSocket(ssl.SSLSocket):
    """Closed when its handshake fails: paho forgets to."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. `ca` None: the authorities of the system. `cert` and `key`: the board's own, None where the broker
    wants none. They are read at each connect, so that renewed files are used without a restart."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Checks the broker's certificate and name; TLS 1.2 or later. Raises OSError for an unreadable file."""
        for path in filter(None, (self.ca, self.cert, self.key)):
            path.open("rb").close()  # ssl's own error does not name the file
        context = ssl.create_default_context(cafile=self.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = _TlsSocket
        if self.cert is not None:
            context.load_cert_chain(self.cert, self.key)
        return context


@dataclass(frozen=True)
class LinkPolicy:
    """How to reach the broker and how hard to lean on it. Raises UsageError for a value out of range.

    `receive_maximum`: QoS 1 commands that the broker may send before the first is acknowledged. `inflight`: items
    sent before the first PUBACK; the broker's own receive-maximum wins where it is lower. `rate`: items per second
    taken from the outbox, 0 for no limit. `hold_s`: how long items of a topic wait that the broker forbids.
    `maximum_packet`: bytes of the largest message that is taken in.
    """

    host: str
    site: str
    device: str
    port: int = 1883
    protocol: Literal["5", "3.1.1"] = "5"
    keepalive_s: int = 60
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: TlsFiles | None = None
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
            ("maximum_packet", 1 << 10, 268_435_455),
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
        """Seconds to wait after `tries` failures in a row; rule 3."""
        return rng.uniform(0, min(self.reconnect_max_s, self.reconnect_min_s * 2 ** min(tries, 30)))


class Link:
    """Keeps a board connected. `start` once, `stop` once; all but `on_command`, `on_frame`, `on_change` and `status`
    is called by others, these four are called in the link's thread and must only enqueue or note.

    `status(state)` gives the payload of the birth ("online") and of the will and farewell ("offline"). `on_frame`
    matters only where the policy asks for frames. `rng` draws the back-off.
    """

    def __init__(
        self,
        policy: LinkPolicy,
        outbox: Outgoing,
        status: Callable[[Literal["online", "offline"]], bytes],
        on_command: Callable[[Inbound], None],
        on_frame: Callable[[bytes], None],
        on_change: Callable[[bool, str], None],
        rng: random.Random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.policy, self.outbox, self.status = policy, outbox, status
        self.on_command, self.on_frame, self.clock = on_command, on_frame, clock
        self.acks: deque[Token] = deque()
        self.unsent: deque[tuple[str, bytes, bytes | None]] = deque()
        self.tally: Counter[str] = Counter()
        self.last_refusal = ""
        self.redeliver = False
        self.fresh = True  # the outbox may hold what the connection has not seen
        self.held: set[int] = set()  # items of rule 5
        self.forbidden: dict[str, float] = {}  # topics, and when to try each again
        self.stop_at: tuple[float, float] | None = None  # when to stop draining, and when to leave without a word
        self._on_change, self._rng = on_change, rng
        self._reported: tuple[bool, str] | None = None
        self._stopping = threading.Event()
        self._cautious, self._suspect, self._strikes = False, 0, 0  # rule 5
        self._thread = threading.Thread(target=self._run, name="edgeear-link", daemon=True)
        self.bell, self._rope = socket.socketpair()
        self.bell.setblocking(False)
        self._rope.setblocking(False)

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and has not gone since."""
        return self._reported is not None and self._reported[0]

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something was put into the outbox."""
        self.fresh = True
        self._ring()

    def acknowledge(self, inbound: Inbound) -> None:
        """`inbound` is dealt with for good: the broker may forget it. Harmless when it came by an older connection;
        the broker then sends it again, with `dup`."""
        if inbound.token is not None:
            self.acks.append(inbound.token)
            self._ring()

    def again(self) -> None:
        """Let the broker send what was not acknowledged once more, which it does after a reconnect."""
        self.redeliver = True
        self._ring()

    def publish_now(self, topic: str, payload: bytes, correlation: bytes | None = None) -> bool:
        """Send once, QoS 0, past the outbox. False: not connected, or the network does not keep up; it is lost."""
        if not self.connected or len(self.unsent) >= MOST_UNSENT:
            return False
        self.unsent.append((topic, payload, correlation))
        self._ring()
        return True

    def counters(self) -> LinkCounters:
        tally = self.tally
        return LinkCounters(
            tally["connects"], tally["sent"], tally["dropped"], tally["held"], tally["ignored"], self.last_refusal
        )

    def stop(self, timeout: float) -> None:
        """Send what the outbox holds within half of `timeout` seconds, then the offline status, then disconnect."""
        now = time.monotonic()
        self.stop_at = now + timeout / 2, now + timeout
        self._stopping.set()
        self._ring()
        if self._thread.ident is None:
            self.bell.close()
            self._rope.close()
        else:
            self._thread.join(timeout + 1.0)

    def report(self, connected: bool, text: str) -> None:
        """Tell `on_change` unless it was the last thing told."""
        if self._reported != (connected, text):
            self._reported = (connected, text)
            self._on_change(connected, text)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it is ringing already; closed: the link has ended
            self._rope.send(b"\0")

    def _run(self) -> None:
        tries, number, protocol = 0, 0, self.policy.protocol
        while not self._stopping.is_set():
            number, began = number + 1, time.monotonic()
            connection = Connection(self, number, protocol, self._cautious)
            self._live(connection)
            if connection.unsupported and protocol == "5":
                protocol = "3.1.1"
                continue
            if connection.connected:
                protocol = self.policy.protocol
            if time.monotonic() - began >= self.policy.reconnect_max_s:
                tries = 0
            self._stopping.wait(self.policy.backoff(tries, self._rng))
            tries += 1
        self.bell.close()
        self._rope.close()

    def _live(self, connection: Connection) -> None:
        """One connection from its start to its end, which is told."""
        try:
            reason = self._steps(connection)
            self.unsent.clear()
            self.report(False, reason)
            self._judge(connection)
        except Exception as error:  # of a callback or a bug: it must not leave a board without its link for years
            logging.getLogger(__name__).exception("the link failed and starts again")
            with contextlib.suppress(Exception):
                self.report(False, f"internal error {type(error).__name__}: {error}")

    def _steps(self, connection: Connection) -> str:
        try:
            try:
                connection.open()
                while connection.ended is None:
                    connection.step()
            finally:
                connection.close()
        except DeviceError as error:  # the outbox's disk
            return str(error)
        return connection.ended

    def _judge(self, connection: Connection) -> None:
        """Rule 5."""
        if connection.progress:
            self._cautious, self._strikes = False, 0
        elif connection.hung_up_on is not None:
            same = connection.hung_up_on == self._suspect
            self._cautious, self._suspect = True, connection.hung_up_on
            self._strikes = self._strikes + 1 if same else 1
        elif connection.crowded:
            self._cautious = True
        if self._strikes >= STRIKES:
            self.held.add(self._suspect)
            self._strikes = 0
            self.tally["held"] += 1
            self.last_refusal = f"item {self._suspect}: {STRIKES} connections in a row ended on it, it is held back"
            self.report(False, self.last_refusal)
