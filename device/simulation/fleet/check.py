"""Compares what a device of a fleet sent to the broker with what it did. Pure: messages in, sentences on faults out.

Rules of this file:

1. `(boot, seq)` orders the messages of a device and identifies repeated ones. Without those nothing may be missing or
   out of order, and the last event must be `stopped`, so that lost last messages are noticed, too.
2. Every command must have one answer, with its own correlation data and the expected outcome and facts, and must have
   taken effect once. An answer without a command is a fault.
3. The windows of telemetry must follow each other without a gap and count every answered frame once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from device.mqtt import messages, topics

SHOWN = 6
"""A fault lists at most so many numbers and counts the rest."""
EFFECTS: Mapping[str, tuple[str, ...]] = {"pause": ("paused", "resumed"), "set-policy": ("policy",)}
"""The events that a command causes, one each time it is accepted."""


@dataclass(frozen=True)
class Asked:
    """A command that was sent, the outcome that it must have, and expected facts of its result by path, such as
    `frames.answered`."""

    id: str
    name: str
    outcome: Literal["ok", "refused"]
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A response and the correlation data that came with it."""

    response: messages.Response
    correlation: bytes | None


@dataclass(frozen=True)
class Truth:
    """What the device did, as known in this process. `started` and `ended` are seconds of its clock."""

    session: str
    boot: int
    shown: int
    answered: int
    windows: int
    started: float
    ended: float


@dataclass
class Heard:
    """The messages of one device in the order of arrival; repeated ones are counted and not kept. `wanted`: sample
    numbers of label requests."""

    births: list[str] = field(default_factory=list)
    farewells: int = 0
    telemetry: list[messages.Telemetry] = field(default_factory=list)
    events: list[messages.Event] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    order: list[tuple[int, int]] = field(default_factory=list)
    sessions: set[str] = field(default_factory=set)
    repeated: int = 0
    broken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    @property
    def kinds(self) -> Counter[str]:
        """How many events of each kind."""
        return Counter(event.kind for event in self.events)

    def hear(self, row: topics.Topic, payload: bytes, correlation: bytes | None) -> None:
        """Add a message of a topic that the device publishes on."""
        message = messages.parse(row.models[0], payload)
        match message:
            case messages.Refusal():
                self.broken.append(f"{row.name}: {message.reason}")
            case messages.Status():
                self.sessions.add(message.session)
                self._status(message)
            case messages.Event() | messages.Telemetry() | messages.LabelRequest() | messages.Response():
                self.sessions.add(message.session)
                if self._is_new(message.boot, message.seq):
                    self._keep(message, correlation)

    def _status(self, status: messages.Status) -> None:
        if status.state == "online":
            self.births.append(status.session)
        else:
            self.farewells += 1

    def _is_new(self, boot: int, seq: int) -> bool:
        """Messages that bypass the outbox have seq 0: they have no order and are never repeated."""
        if seq == 0:
            return True
        if (boot, seq) in self._seen:
            self.repeated += 1
            return False
        self._seen.add((boot, seq))
        self.order.append((boot, seq))
        return True

    def _keep(
        self,
        message: messages.Event | messages.Telemetry | messages.LabelRequest | messages.Response,
        correlation: bytes | None,
    ) -> None:
        match message:
            case messages.Event():
                self.events.append(message)
            case messages.Telemetry():
                self.telemetry.append(message)
            case messages.LabelRequest():
                self.wanted.append(message.at)
            case messages.Response():
                self.answers.setdefault(message.id or "", []).append(Answer(message, correlation))

    @property
    def gaps(self) -> list[int]:
        """The missing sequence numbers below the highest that arrived."""
        highest = max((seq for _, seq in self.order), default=0)
        return sorted(set(range(1, highest + 1)) - {seq for _, seq in self.order})

    @property
    def ordered(self) -> bool:
        return self.order == sorted(self.order)

    @property
    def frames(self) -> int:
        """Frames that telemetry counts."""
        return sum(window.frames for window in self.telemetry)


def faults(truth: Truth, asked: Sequence[Asked], heard: Heard) -> list[str]:
    """What is wrong with a device, one sentence a fault; empty if nothing is."""
    checks = (_presence(truth, heard), _sequence(truth, heard), _windows(truth, heard), _commands(truth, asked, heard))
    return [fault for found in checks for fault in found]


def _presence(truth: Truth, heard: Heard) -> Iterator[str]:
    if not heard.births:
        yield "no birth came"
    if heard.sessions - {truth.session}:
        yield f"session is {truth.session}, messages say {', '.join(sorted(heard.sessions))}"
    if not heard.farewells:
        yield "no offline status came"
    if heard.broken:
        yield f"{len(heard.broken)} messages do not parse in this version: {heard.broken[0]}"


def _sequence(truth: Truth, heard: Heard) -> Iterator[str]:
    if boots := {boot for boot, _ in heard.order} - {truth.boot}:
        yield f"boot is {truth.boot}, messages say {_some(sorted(boots))}"
    if gaps := heard.gaps:
        yield f"{len(gaps)} messages are missing: seq {_some(gaps)}"
    if not heard.ordered:
        yield "messages came out of order"
    if not heard.events or heard.events[-1].kind != "stopped":
        yield "the last messages are missing: no event says that the device stopped"


def _windows(truth: Truth, heard: Heard) -> Iterator[str]:
    windows = heard.telemetry
    if len(windows) != truth.windows:
        yield f"{len(windows)} windows of telemetry came, {truth.windows} were due"
    edges = [truth.started, *(edge for w in windows for edge in (w.from_time, w.to_time)), truth.ended]
    if any(end != begin for end, begin in zip(edges[::2], edges[1::2], strict=True)):
        yield "the windows of telemetry do not join"
    if truth.answered != truth.shown:
        yield f"{truth.shown} frames were shown, {truth.answered} answered"
    if heard.frames != truth.answered:
        yield f"{truth.answered} frames were answered, telemetry counts {heard.frames}"


def _commands(truth: Truth, asked: Sequence[Asked], heard: Heard) -> Iterator[str]:
    for command in asked:
        answers = heard.answers.get(command.id, [])
        if len(answers) != 1:
            yield f"command {command.id} has {len(answers)} answers"
        for answer in answers:
            yield from (f"command {command.id}: {fault}" for fault in _answer(truth, command, answer))
    for identity in heard.answers.keys() - {command.id for command in asked}:
        yield f"an answer came to {identity!r}, which was never sent"
    refused = sum(command.outcome == "refused" for command in asked)
    if (told := sum(window.refused_messages for window in heard.telemetry)) != refused:
        yield f"{refused} commands were to be refused, telemetry counts {told}"
    for name, kinds in EFFECTS.items():
        applied = sum(command.name == name and command.outcome == "ok" for command in asked)
        if (told := sum(heard.kinds[kind] for kind in kinds)) != applied:
            yield f"{name} was accepted {applied} times, events report {told}"


def _answer(truth: Truth, command: Asked, answer: Answer) -> Iterator[str]:
    response = answer.response
    if not correlates(command, answer):
        yield f"correlation data is {answer.correlation!r}"
    if response.session != truth.session:
        yield f"answered by session {response.session}"
    if (response.command, response.outcome) != (command.name, command.outcome):
        yield f"{response.command} {response.outcome} ({response.reason}), expected {command.name} {command.outcome}"
    for path, wanted in command.facts.items():
        if (found := fact(response.result, path)) != wanted:
            yield f"{path} is {json.dumps(found)}, expected {json.dumps(wanted)}"


def correlates(command: Asked, answer: Answer) -> bool:
    """Whether the correlation data is the command's."""
    return answer.correlation == command.id.encode()


def fact(result: Mapping[str, Any], path: str) -> object:
    """The value at a path such as `frames.answered`, or None."""
    value: Any = result
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _some(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return ", ".join(map(str, numbers[:SHOWN])) + more
