"""What a board publishes: makes and stamps each kind of message, and puts it into the outbox or sends it at once.

Rules of this file:

1. A message that must not be lost goes through the outbox, also while there is no broker. On a full disk it is lost and
   logged. `OutboxDamaged` is passed on: the next start replaces the outbox.
2. Predictions, refusals of what is no command, and repeated responses are sent at once or dropped, so that they cannot
   fill the disk. The first two have seq 0, outside of the order of (boot, seq); a repeated response keeps its seq.
3. A response goes to the topic that the command names only if that is at or below the board's own response topic.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from device.board.board import Seen
from device.board.events import BoardEvent, bounded
from device.daemon.commands import Outcome, prediction_facts
from device.daemon.frames import Frame
from device.mqtt import messages, topics
from device.mqtt.outbox import Outbox, OutboxCounters, OutboxDamaged
from edgeear.errors import DeviceError
from edgeear.flow import Prediction
from edgeear.types import U8

if TYPE_CHECKING:
    from device.mqtt.delivery import Token
    from device.mqtt.link import Inbound

LOG = logging.getLogger("edgeear")
MAX_TEXT = 2000
"""Characters of the sentence in an event."""


class Uplink(Protocol):
    """What the daemon needs of `device.mqtt.delivery.Delivery`."""

    def acknowledge(self, token: Token | None) -> None: ...

    def request_redelivery(self) -> None: ...

    def publish_now(self, topic: str, payload: bytes, correlation: bytes | None = None) -> bool: ...

    def wake(self) -> None: ...


class Publisher:
    """Publishes for one session of the board at `address`, site and device. `clock` gives unix seconds."""

    def __init__(self, outbox: Outbox, address: tuple[str, str], session: str, clock: Callable[[], float]) -> None:
        self.outbox, self.session = outbox, session
        self.link: Uplink | None = None
        self._site, self._device = address
        self._clock, self._stamp = clock, messages.Stamper(session, outbox.boot)

    def event(self, event: BoardEvent, generation: int) -> None:
        """Publish an event of the board, or of the daemon."""
        facts = {"kind": event.kind, "text": bounded(event.text, MAX_TEXT), "at": event.at, "data": event.data}
        self.put(topics.EVENT, messages.Event, {**facts, "generation": generation})

    def expire(self) -> None:
        """Drop what has waited longer than the outbox allows. An error of the disk is logged, and tried again later."""
        try:
            self.outbox.expire(self._clock())
        except OutboxDamaged:
            raise
        except DeviceError as error:
            LOG.error("the outbox cannot drop old messages: %s", error)

    def label_request(self, seen: Seen, until: float) -> None:
        """Ask for the label of a frame; the board waits until `until`, unix seconds."""
        guess = {"guess": seen.prediction.label, "route": seen.prediction.route}
        facts = {"at": seen.number, "image": picture(seen.frame), "until": until}
        self.put(topics.LABEL_REQUEST, messages.LabelRequest, {**facts, **guess})

    def prediction(self, prediction: Prediction, frame: Frame, at: int, generation: int) -> None:
        """Send the answer for a frame, where a broker is connected."""
        if self.link is None:
            return
        message = messages.PredictionMessage(
            session=self.session,
            boot=self.outbox.boot,
            at=at,
            time=frame.captured,
            generation=generation,
            ref=frame.ref[-500:],
            **prediction_facts(prediction),
        )
        self.link.publish_now(self._topic(topics.PREDICTION), message.payload())

    def respond(self, inbound: Inbound, identity: str, outcome: Outcome) -> None:
        """Put the response to a command into the outbox and the ledger, in one transaction. Raises `DeviceError` where
        that failed."""
        topic, now = self._reply_topic(inbound), self._clock()
        properties = {} if inbound.correlation is None else {"correlation": inbound.correlation.hex()}
        payload = partial(self._response, identity, inbound.name, outcome)
        self.outbox.put("response", topic, payload, now, properties=properties, answers=identity)
        self._wake()

    def _response(self, identity: str, name: str, outcome: Outcome, seq: int) -> bytes:
        facts: dict[str, Any] = {**self._stamp(seq, self._clock()), "id": identity, "command": name}
        facts |= {"outcome": outcome.outcome, "reason": outcome.reason and outcome.reason[: messages.MAX_REASON]}
        try:
            return messages.Response(**facts, result=outcome.result).payload()
        except ValueError as error:  # the command took effect: its outcome must be told without the result
            LOG.error("the result of %s does not fit: %s", name, error)
            return messages.Response(**facts, result={"left_out": "the result does not fit into a message"}).payload()

    def respond_again(self, inbound: Inbound, payload: bytes) -> None:
        """Send the recorded response to a command that came again."""
        if self.link is not None:
            self.link.publish_now(self._reply_topic(inbound), payload, inbound.correlation)

    def refuse(self, inbound: Inbound, refusal: messages.Refusal) -> None:
        """Send a refusal of what is no command, or came too late."""
        if self.link is not None and (refusal.id or inbound.response_topic):
            message = refusal.response(self._stamp(0, self._clock()), inbound.name)
            self.link.publish_now(self._reply_topic(inbound), message.payload(), inbound.correlation)

    def put(self, row: topics.Topic, model: type[messages.Message], facts: dict[str, Any]) -> None:
        """Publish the message `model` with the fields `facts` and a stamp."""
        topic, now = self._topic(row), self._clock()
        assert row.cls is not None
        try:
            self.outbox.put(row.cls, topic, lambda seq: model(**self._stamp(seq, now), **facts).payload(), now)
        except OutboxDamaged:
            raise
        except DeviceError as error:
            LOG.error("a message for %s is lost: %s", row.name, error)
        self._wake()

    def _wake(self) -> None:
        if self.link is not None:
            self.link.wake()

    def _topic(self, row: topics.Topic) -> str:
        return topics.topic_of(self._site, self._device, row)

    def _reply_topic(self, inbound: Inbound) -> str:
        wanted = inbound.response_topic
        allowed = wanted and topics.may_respond(self._site, self._device, wanted)
        return wanted if wanted and allowed else self._topic(topics.RESPONSE)


def outbox_facts(counters: OutboxCounters, now: float) -> dict[str, Any]:
    """The outbox's part of telemetry and of a report."""
    oldest = None if counters.oldest is None else max(0.0, now - counters.oldest)
    return {"depth": counters.depth, "bytes": counters.bytes, "oldest_s": oldest, "dropped": counters.dropped}


def picture(frame: U8) -> str:
    """A frame as JPEG in base64."""
    target = io.BytesIO()
    Image.fromarray(frame).save(target, "JPEG", quality=85)
    return base64.b64encode(target.getvalue()).decode("ascii")
