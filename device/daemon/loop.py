"""The loop of an edge board: takes frames and commands, publishes predictions, events and telemetry.

Rules of this file:

1. One thread makes all changes. Sources and the link only put into bounded queues and wake it. A turn handles at most
   one frame, one command and one label request, so that none delays the others for long.
2. A frame is answered first, whatever else is due. Learning runs in a process of its own (learning/worker.py).
3. A command is acknowledged to the broker only when its effect and its response are on disk. A repeated command gets
   the recorded response. One that was refused or failed changed nothing: if the operator asks again, it is tried again.
   An id that was used for another command is refused.
4. A frame that cannot be encoded, or a full disk, is told as an event and the loop goes on. A damaged outbox ends it:
   the next start replaces the outbox.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from device.board.board import Board, Seen
from device.board.events import (
    ENDED,
    BoardEvent,
    FrameRefused,
    LabelsWanted,
    LearningFailed,
    MessagesLost,
    Paused,
    SourceChanged,
    Stopped,
)
from device.daemon import machine
from device.daemon.commands import Commands
from device.daemon.frames import Frame, FrameQueue
from device.daemon.labels import LabelBook
from device.daemon.publisher import Publisher, outbox_facts
from device.daemon.telemetry import Window
from device.mqtt import messages, topics
from device.mqtt.outbox import Outbox, OutboxDamaged
from device.mqtt.settings import LiveSettings
from edgeear import __version__
from edgeear.errors import DataError, DeviceError

if TYPE_CHECKING:
    from prometheus_client import Counter

    from device.daemon.metrics import Metrics
    from device.daemon.sources import RunningSource
    from device.mqtt.link import Inbound

LOG = logging.getLogger("edgeear")
INBOX, INBOX_BYTES = 256, 32 << 20
"""Commands, and bytes of them, that may wait. Some brokers ignore the receive maximum. A command beyond these bounds is
not acknowledged, and the broker is asked to deliver it again later."""
IDLE_S, LEARNING_S = 5.0, 0.2
"""Longest sleep of an idle loop, and while it waits for labels or a learner, seconds."""


@dataclass
class Counts:
    """Since the start: frames answered, frames that could not be encoded, messages refused unread or as late."""

    frames: int = 0
    unusable: int = 0
    refused_messages: int = 0


class Daemon:
    """The loop of one board. `address`: site and device; `settings`: as configured. `clock` gives unix seconds, `timer`
    seconds that never go back. Setting `wake` ends the sleep between two turns. A frame that waited for more than
    `max_age_s` is not answered; `label_requests`: whether frames that want a label are published."""

    def __init__(
        self,
        board: Board,
        labels: LabelBook,
        outbox: Outbox,
        frames: FrameQueue,
        address: tuple[str, str],
        settings: LiveSettings,
        *,
        clock: Callable[[], float],
        timer: Callable[[], float],
        wake: threading.Event | None = None,
        seed: int = 0,
        max_age_s: float = 2.0,
        label_requests: bool = True,
        source: RunningSource | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.board, self.outbox, self.frames, self.session = board, outbox, frames, messages.new_session()
        self.commands = Commands(board, outbox, labels, self.session, settings, self.describe)
        self.out = Publisher(outbox, address, self.session, clock)
        self.counts, self.metrics, self._max_age_s, self._asks_labels = Counts(), metrics, max_age_s, label_requests
        self.source = source
        self._trouble_at: int | None = None
        self._heard = 0, timer()
        """The count of frames received, and when it last rose."""
        self._damaged = 0
        self._clock, self._timer, self._random = clock, timer, random.Random(seed)
        self._inbox: deque[Inbound] = deque()
        self._held, self._overflowed, self._inbox_lock = 0, False, threading.Lock()
        self.wake = wake or threading.Event()
        self._requests: deque[Seen] = deque()
        self._lost: dict[str, int] = {}
        self._measured: tuple[float, dict[Counter, int]] = (-1.0, {})
        self._window = Window(timer(), self._random)
        self.readings: Mapping[str, Callable[[], Any]] = {
            "phase": lambda: board.phase,
            "paused": lambda: board.paused,
            "generation": lambda: board.system.generation,
            "outbox": lambda: outbox_facts(outbox.counters(), clock()),
            **machine.readings(),
        }
        """How the fields of telemetry that describe a state are read."""

    # Called by other threads

    def connection_changed(self, connected: bool, text: str) -> None:
        """Log that the link came up or went down."""
        LOG.info("broker: %s%s", "" if connected else "not connected: ", text)

    def receive(self, inbound: Inbound) -> None:
        """Queue a command."""
        with self._inbox_lock:
            if len(self._inbox) < INBOX and self._held + len(inbound.payload) <= INBOX_BYTES:
                self._held += len(inbound.payload)
                self._inbox.append(inbound)
            else:
                self._overflowed = True
        self.wake.set()

    def status(self, state: Literal["online", "offline"]) -> bytes:
        """The payload of this session's birth, or of its last will."""
        return messages.Status(
            state=state,
            session=self.session,
            boot=self.outbox.boot,
            time=self._clock(),
            version=__version__,
            encoder=self.board.system.encoder_digest,
            generation=self.board.system.generation,
        ).payload()

    # Before the loop

    def pause(self, why: str) -> None:
        """Pause learning because of `why`."""
        self.tell(*self.board.pause(True), Paused(*self.board.moment, why))

    def tell(self, *events: BoardEvent) -> None:
        """Log and publish events."""
        for event in events:
            LOG.info("%s: %s", event.kind, event.text)
            self.out.event(event, self.board.system.generation)
            if self.metrics is not None and isinstance(event, ENDED):
                self.metrics.learning_runs.labels(event.kind).inc()
            if isinstance(event, LabelsWanted) and self._asks_labels:
                self._requests = deque(self.board.wanted())

    # The loop

    def run(self, stop: threading.Event, progressed: Callable[[], object] = lambda: None) -> None:
        """Take turns until `stop` is set; `progressed` is called after each, for watchdogs."""
        while not stop.is_set():
            self.wake.clear()
            busy = self.turn()
            progressed()
            if not busy and not stop.is_set():
                self.wake.wait(self._patience())
        self.tell(Stopped(*self.board.moment))

    def turn(self) -> bool:
        """Handle at most one frame, one command and one label request, then the telemetry. False where there was none
        of the first three."""
        frame = self.frames.get(self._timer(), self._max_age_s)
        if frame is not None:
            self._serve(frame)
        elif self.board.waiting:
            self._poll()
        command = self._next_command()
        if command is not None:
            self._command(command)
        asked = self._ask_label()
        self._look_at_source()
        self._look_at_outbox()
        self._close_window()
        if self.metrics is not None:
            self._measure(self.metrics)
        return frame is not None or command is not None or asked

    @property
    def period_s(self) -> float:
        """Seconds between two telemetry messages."""
        return self.commands.settings.period_s

    def _patience(self) -> float:
        due = self._window.started + self.period_s - self._timer()
        return max(0.0, min(due, LEARNING_S if self.board.waiting else IDLE_S))

    def _serve(self, frame: Frame) -> None:
        begun = self._timer()
        try:
            prediction, events = self.board.step(frame.pixels)
        except DataError as error:
            self.counts.unusable += 1
            self.tell(FrameRefused(*self.board.moment, frame.ref, str(error)))
            return
        except DeviceError as error:
            self.tell(LearningFailed(*self.board.moment, None, str(error)))
            return
        seconds = self._timer() - begun
        self.counts.frames += 1
        self._window.add(prediction, seconds)
        if self.metrics is not None:
            self.metrics.answered(prediction, seconds)
        if self.commands.settings.predictions:
            self.out.prediction(
                prediction,
                replace(frame, captured=self._clock() - (begun - frame.captured)),
                self.board.at,
                self.board.system.generation,
            )
        if frame.answered is not None:
            frame.answered()
        self.tell(*events)

    def _poll(self) -> None:
        try:
            self.tell(*self.board.poll())
        except DeviceError as error:
            self.tell(LearningFailed(*self.board.moment, None, str(error)))

    # Commands

    def _next_command(self) -> Inbound | None:
        with self._inbox_lock:
            if self._inbox:
                command = self._inbox.popleft()
                self._held -= len(command.payload)
                return command
            overflowed, self._overflowed = self._overflowed, False
        if overflowed and self.out.link is not None:
            self.out.link.request_redelivery()
        return None

    def _command(self, inbound: Inbound) -> None:
        command = messages.parse_command(inbound.name, inbound.payload)
        if not isinstance(command, messages.Refusal) and (late := self._late(inbound, command)) is not None:
            command = messages.Refusal(command.id, late)
        if isinstance(command, messages.Refusal):
            self._turn_away(inbound, command)
        else:
            try:
                self._apply_once(inbound, command)
            except OutboxDamaged:
                raise
            except DeviceError as error:
                self._turn_away(inbound, messages.Refusal(command.id, f"the ledger cannot be written: {error}"))
        if self.out.link is not None:
            self.out.link.acknowledge(inbound.token)

    def _late(self, inbound: Inbound, command: messages.Command) -> str | None:
        ends = [t for t in (inbound.expires, command.expires) if t is not None]
        now = self._clock()
        if ends and min(ends) < now:
            return f"expired {now - min(ends):.1f} s ago: send it again with a later expiry"
        return None

    def _apply_once(self, inbound: Inbound, command: messages.Command) -> None:
        """Apply a command, or send the recorded response of a repeated one. Raises `DeviceError` from the ledger."""
        now = self._clock()
        recorded, digest = self.outbox.recall(command.id, now), command.digest
        if recorded is not None and recorded.digest not in (None, digest):
            why = f"the id {command.id} was used for another command: give each command an id of its own"
            self._turn_away(inbound, messages.Refusal(command.id, why))
            return
        if recorded is not None and recorded.payload is not None:
            if inbound.dup or _took_effect(recorded.payload):
                self.out.respond_again(inbound, recorded.payload)
                return
            self.outbox.forget(command.id)
            recorded = None
        self.outbox.begin(command.id, now, digest)
        outcome = self.commands.apply(command, again=recorded is not None)
        self.out.respond(inbound, command.id, outcome)
        self._count(inbound.name, outcome.outcome)
        self.tell(*outcome.events)

    def _turn_away(self, inbound: Inbound, refusal: messages.Refusal) -> None:
        self.counts.refused_messages += 1
        self._count(inbound.name, "refused")
        self.out.refuse(inbound, refusal)

    def _count(self, name: str, outcome: str) -> None:
        if self.metrics is not None:
            known = name if name in messages.COMMANDS else "unknown"  # invented names must not make new series
            self.metrics.commands.labels(known, outcome).inc()

    # Events and telemetry

    def _ask_label(self) -> bool:
        """Publish the next label request, unless its label is no longer wanted; False where none waits."""
        if not self._requests:
            return False
        seen, until = self._requests.popleft(), self.board.wanted_until
        if until is not None and seen in self.board.wanted():
            self.out.label_request(seen, until)
        return True

    def _look_at_source(self) -> None:
        """Tell once that frames stopped coming, with the reason, and once that they come again."""
        source = self.source
        if source is None:
            return
        received, now = self.frames.counts.received, self._timer()
        if received > self._heard[0]:
            self._heard = received, now
        silence = now - self._heard[1]
        if self._trouble_at is not None and received > self._trouble_at:
            self._trouble_at = None
            self.tell(SourceChanged(*self.board.moment, None))
        elif self._trouble_at is None and not source.alive and (source.last_error or source.finished):
            self._trouble_at = received
            why = "the source came to its end" if source.finished else f"no frames come: {source.last_error}"
            self.tell(SourceChanged(*self.board.moment, why))
        elif self._trouble_at is None and source.silent_s is not None and silence > source.silent_s:
            self._trouble_at = received
            why = f"no frame came for {silence:.0f} s; check the source, its power and its network"
            self.tell(SourceChanged(*self.board.moment, why))

    def _look_at_outbox(self) -> None:
        """Tell that messages were damaged in the outbox."""
        damaged, before = self.outbox.damaged, self._damaged
        if damaged > before:
            self._damaged = damaged
            self.tell(MessagesLost(*self.board.moment, "check the disk", damaged - before))

    def _close_window(self) -> None:
        if self._timer() >= self._window.started + self.period_s:
            self.report_window()

    def report_window(self) -> None:
        """Drop messages that waited too long, publish telemetry of the window that ends now, and start the next one."""
        now, ends, losses = self._clock(), self._timer(), self._losses()
        self.out.expire()
        facts = {
            "from_time": now - (ends - self._window.started),
            "to_time": now,
            **{name: read() for name, read in self.readings.items()},
            **{name: count - self._lost.get(name, 0) for name, count in losses.items()},
            **self._window.facts(),
        }
        self._window, self._lost = Window(ends, self._random), losses
        self.out.put(topics.TELEMETRY, messages.Telemetry, facts)

    def _losses(self) -> dict[str, int]:
        """Frames and messages that were not served since the start, by field of telemetry."""
        queue = self.frames.counts
        return {
            "dropped": queue.dropped,
            "stale": queue.stale,
            "undecodable": queue.undecodable + self.counts.unusable,
            "refused_messages": self.counts.refused_messages,
        }

    def _measure(self, metrics: Metrics) -> None:
        """Add to the metrics what was counted elsewhere, at most once a second."""
        now = self._timer()
        if now - self._measured[0] < 1.0:
            return
        losses, dropped = self._losses(), self.outbox.counters().dropped
        counts = {
            **{counter: losses[name] for name, counter in metrics.losses.items()},
            **{metrics.outbox_dropped.labels(cls): count for cls, count in dropped.items()},
        }
        before = self._measured[1]
        for counter, count in counts.items():
            counter.inc(max(0, count - before.get(counter, 0)))
        metrics.phase(self.board.phase)
        metrics.source_up.set(self._trouble_at is None)
        self._measured = now, counts

    def describe(self) -> dict[str, Any]:
        """The daemon's part of a report."""
        source = self.source
        return {
            "session": self.session,
            "boot": self.outbox.boot,
            "version": __version__,
            "frames": {"answered": self.counts.frames, **asdict(self.frames.counts)},
            "refused_messages": self.counts.refused_messages,
            "outbox": self.readings["outbox"](),
            "source": source and {name: getattr(source, name) for name in ("alive", "finished", "last_error")},
            "rss_mb": self.readings["rss_mb"](),
        }


def _took_effect(payload: bytes) -> bool:
    """Whether a recorded response says so; True where it cannot be read."""
    response = messages.parse(messages.Response, payload)
    return isinstance(response, messages.Refusal) or response.outcome == "ok"
