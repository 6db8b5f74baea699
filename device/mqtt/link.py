"""The link of a board to its broker: connects, announces the board, empties the outbox, receives commands.

Rules of this file:

1. One thread does all that touches the network, through a `Connection`. The `Delivery` decides what is sent, and when.
   Other threads only leave something with the `Delivery` and wake the link's thread.
2. Each connection is a fresh `Connection` with a fresh MQTT client: it repeats nothing of the last one. Only the
   outbox retransmits, and an item leaves it only after the broker's PUBACK.
3. Any failure ends the connection. `on_change(False, text)` reports it once, and the next try follows after an
   exponential back-off with full jitter: a delay drawn uniformly from [0, min(most, least *
   2^tries)] (Brooker, "Exponential Backoff And Jitter", 2015). Only a connection that lasted `reconnect_max_s` resets
   the back-off, so that two boards with the same name do not disconnect each other at full speed.
4. A broker that does not know MQTT 5 gets 3.1.1 at once; the next reconnect asks for MQTT 5 again.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from paho.mqtt.client import MQTTMessage

from device.mqtt import topics
from device.mqtt.connection import Backlog, Connection, LinkPolicy
from device.mqtt.delivery import Delivery, LinkCounters, State, Token
from device.mqtt.paho import TlsFiles
from edgeear.errors import DeviceError

__all__ = ["Inbound", "Link", "LinkCounters", "LinkPolicy", "TlsFiles"]


@dataclass(frozen=True)
class Inbound:
    """A command from the broker. `name` of topic `.../command/infer` is "infer". `expires`: unix seconds, None for
    never. `dup`: it may have been delivered before. `token`: for `Link.acknowledge`."""

    name: str
    kind: Literal["command"]
    payload: bytes
    response_topic: str | None
    correlation: bytes | None
    expires: float | None
    dup: bool
    token: Token | None


class Link:
    """Keeps a board connected. `start` once, `stop` once. The link's thread calls `on_command`, `on_frame`, `on_change`
    and `status`, which must return at once.

    `status(state)` gives the payload of the birth ("online") and of the will and farewell ("offline"). `on_frame`
    matters only where the policy asks for frames. `rng` draws the back-off. `clock` gives unix seconds.
    """

    def __init__(
        self,
        policy: LinkPolicy,
        outbox: Backlog,
        status: Callable[[State], bytes],
        on_command: Callable[[Inbound], None],
        on_frame: Callable[[bytes], None],
        on_change: Callable[[bool, str], None],
        rng: random.Random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._policy, self._outbox, self._status = policy, outbox, status
        self._on_command, self._on_frame, self._on_change = on_command, on_frame, on_change
        self._rng, self._clock = rng, clock
        status_topic = topics.topic_of(policy.site, policy.device, topics.STATUS)
        self._delivery = Delivery(policy.inflight, policy.rate, policy.hold_s, status_topic, status)
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

    def wake(self) -> None:
        """Something was put into the outbox."""
        self._delivery.wake()
        self._wake_up()

    def acknowledge(self, inbound: Inbound) -> None:
        """`inbound` is dealt with: the broker may forget it. Does nothing if an older connection brought it; the broker
        then sends it again, with `dup`."""
        if inbound.token is not None:
            self._delivery.acknowledge(inbound.token)
            self._wake_up()

    def request_redelivery(self) -> None:
        """Reconnect, so that the broker sends again what was not acknowledged."""
        self._delivery.request_redelivery()
        self._wake_up()

    def publish_now(self, topic: str, payload: bytes, correlation: bytes | None = None) -> bool:
        """Send once with QoS 0, past the outbox. False, and lost, if not connected or the network does not keep up."""
        taken = self._delivery.publish_now(topic, payload, correlation)
        self._wake_up()
        return taken

    def counters(self) -> LinkCounters:
        """What was counted since the start."""
        return self._delivery.counters()

    def stop(self, timeout: float) -> None:
        """Send what the outbox holds within half of `timeout` seconds, then the offline status, then disconnect."""
        now = time.monotonic()
        self._delivery.stop(now + timeout / 2, now + timeout)
        self._stopping.set()
        self._wake_up()
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
        tries, five = 0, self._policy.protocol == "5"
        while not self._stopping.is_set():
            began, connects = time.monotonic(), self.counters().connects
            if self._live(five) and five:
                five = False
                continue
            if self.counters().connects > connects:
                five = self._policy.protocol == "5"
            if time.monotonic() - began >= self._policy.reconnect_max_s:
                tries = 0
            self._stopping.wait(self._policy.backoff(tries, self._rng))
            tries += 1
        self._close()

    def _live(self, five: bool) -> bool:
        """One connection from its start to its end, which is reported. True: the broker does not know this version."""
        will, delivery = self._status("offline"), self._delivery
        connection = Connection(self._policy, five, delivery, self._outbox, will, self._receive, self._report)
        try:
            why = self._steps(connection)
            for action in delivery.disconnected(why, connection.blame):
                connection.perform(action)
        except DeviceError as error:
            self._report(False, str(error))
        except Exception as error:  # a bug, ours or of a callback: the link must go on
            logging.getLogger(__name__).exception("the link failed and starts again")
            why = f"internal error {type(error).__name__}: {error}"
            delivery.disconnected(why, blame=False)
            with contextlib.suppress(Exception):
                self._report(False, why)
        return connection.unsupported

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

    def _receive(self, message: MQTTMessage) -> None:
        """Pass a command or a frame on; acknowledge at once what is no command."""
        address = _address(message)
        token = self._delivery.received(message.mid) if message.qos else None
        ours = (
            address is not None
            and (address.site, address.device) == (self._policy.site, self._policy.device)
            and not message.retain  # only where the broker does not respect the subscription's options
        )
        if ours and address is not None and address.command is not None:
            self._on_command(self._inbound(address.command, message, token))
            return
        if ours and address is not None and address.topic is topics.FRAME:
            self._on_frame(bytes(message.payload))
        else:
            self._delivery.ignored()
        if token is not None:
            self._delivery.acknowledge(token)

    def _inbound(self, name: str, message: MQTTMessage, token: Token | None) -> Inbound:
        given, payload = message.properties, bytes(message.payload)
        expiry = getattr(given, "MessageExpiryInterval", None)
        answer_to = getattr(given, "ResponseTopic", None), getattr(given, "CorrelationData", None)
        expires = None if expiry is None else self._clock() + expiry
        return Inbound(name, "command", payload, *answer_to, expires, message.dup, token)

    def _report(self, connected: bool, text: str) -> None:
        """Call `on_change` unless it was told the same last."""
        if self._reported != (connected, text):
            self._reported = (connected, text)
            self._on_change(connected, text)


def _address(message: MQTTMessage) -> topics.Address | None:
    try:
        return topics.match(message.topic)
    except UnicodeDecodeError:
        return None
