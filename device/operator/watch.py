"""What an operator knows of a fleet: one row for each board, updated by its messages. `edgeear watch` shows them.

Rules of this file:

1. A repeated or late message changes nothing: for each board and kind of message the latest (boot, seq) is kept, and
   messages that are not newer are ignored. Messages with seq 0 are outside this order.
2. A birth is always accepted, even with a lower boot: that board lost its disk, and its order starts again. A farewell
   of an earlier session, which a broker may deliver late, is ignored.
3. A message that this version cannot read is counted for its board, and not shown.
4. Nothing here prints, connects or asks for the time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from device.mqtt import messages, topics

LATEST = 8
"""Events kept of the whole fleet."""
MINUTE = 60.0
SILENT_S = 180.0
"""An online board that sends nothing for this long, or for three of its telemetry windows, is in trouble."""
BAD = {
    "learning-failed",
    "rolled-back",
    "store-damaged",
    "rejected",
    "refused",
    "frame-refused",
    "dropped",
    "too-few-scenes",
}
"""A board needs attention for `BAD_S` seconds after one of these events."""
BAD_S = 3600.0

Place = tuple[int, int]


class Need(IntEnum):
    """How much a board needs attention, most urgent first."""

    OFFLINE = 0
    TROUBLE = 1
    LABELS = 2
    BUSY = 3
    NONE = 4


@dataclass(frozen=True)
class Row:
    """What is known of one board. `seen`: when its last message came, unix seconds of the operator's clock. `latest`:
    (boot, seq) of the newest message by kind. `strange`: messages that this version cannot read."""

    site: str
    device: str
    seen: float
    status: messages.Status | None = None
    telemetry: messages.Telemetry | None = None
    event: messages.Event | None = None
    latest: Mapping[str, Place] = field(default_factory=dict)
    strange: int = 0

    @property
    def name(self) -> str:
        return f"{self.site}/{self.device}"

    @property
    def online(self) -> bool:
        return self.status is not None and self.status.state == "online"

    @property
    def foreign(self) -> float:
        """Share of the last window's frames that were out of distribution."""
        return self.telemetry.ood / self.telemetry.frames if self.telemetry and self.telemetry.frames else 0.0

    def silent(self, now: float) -> bool:
        """Whether it should have sent something by now."""
        window = 0.0 if self.telemetry is None else self.telemetry.to_time - self.telemetry.from_time
        return now - self.seen > max(SILENT_S, 3 * window)

    def need(self, now: float) -> Need:
        """The most urgent reason to look at this board."""
        seen = self.telemetry
        if self.status is not None and not self.online:
            return Need.OFFLINE
        bad = self.event is not None and self.event.kind in BAD and now - self.event.time < BAD_S
        if bad or self.silent(now) or self.strange or self.foreign > 0.5:
            return Need.TROUBLE
        if seen is not None and seen.phase == "labelling":
            return Need.LABELS
        return Need.BUSY if seen is not None and (seen.paused or seen.phase != "serving") else Need.NONE


@dataclass(frozen=True)
class Heard:
    """One new message. `kind` is the topic below the board's prefix."""

    site: str
    device: str
    kind: str
    message: messages.Message

    def line(self) -> dict[str, Any]:
        """The message as a JSON object."""
        facts = self.message.model_dump(mode="json")
        return {"site": self.site, "device": self.device, "kind": self.kind, "message": facts}


@dataclass(frozen=True)
class Summary:
    """A fleet in a few numbers; `learning`: boards in any phase but serving; `events` in the last minute."""

    boards: int
    online: int
    offline: int
    learning: int
    labels: int
    trouble: int
    events: int

    def __str__(self) -> str:
        parts = [f"{self.boards} boards: {self.online} online", f"{self.offline} offline", f"{self.trouble} trouble"]
        parts += [f"{self.learning} learning", f"{self.labels} to label", f"{self.events} events/min"]
        return ", ".join(parts)


@dataclass
class Fleet:
    """All known boards by (site, device), and the latest events of the fleet."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    events: deque[Heard] = field(default_factory=lambda: deque(maxlen=LATEST))
    moments: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))
    """When each event of the last minute came."""

    def take(self, topic: str, payload: bytes, now: float) -> Heard | None:
        """Update the row of a board. Returns the message, None if it is not new or not from a board."""
        address = topics.match(topic)
        if address is None or address.topic not in (topics.STATUS, topics.TELEMETRY, topics.EVENT):
            return None
        key = (address.site, address.device)
        row = self.rows.get(key, Row(*key, now))
        message = messages.parse(address.topic.models[0], payload)
        if isinstance(message, messages.Refusal):
            self.rows[key] = replace(row, seen=now, strange=row.strange + 1)
            return None
        taken = _taken(row, message)
        if taken is None:
            return None
        self.rows[key] = replace(taken, seen=now)
        heard = Heard(*key, address.topic.name, message)
        if isinstance(message, messages.Event):
            self.events.append(heard)
            self.moments.append(now)
        return heard

    def summary(self, now: float) -> Summary:
        """The fleet at `now`."""
        while self.moments and self.moments[0] <= now - MINUTE:
            self.moments.popleft()
        needs = Counter(row.need(now) for row in self.rows.values())
        phases = Counter(row.telemetry.phase for row in self.rows.values() if row.online and row.telemetry)
        return Summary(
            boards=len(self.rows),
            online=sum(row.online for row in self.rows.values()),
            offline=needs[Need.OFFLINE],
            learning=phases.total() - phases["serving"],
            labels=phases["labelling"],
            trouble=needs[Need.TROUBLE],
            events=len(self.moments),
        )

    def by_need(self, now: float) -> list[Row]:
        """All rows, the most urgent first, then by name."""
        return sorted(self.rows.values(), key=lambda row: (row.need(now), row.site, row.device))


def _taken(row: Row, message: messages.Message) -> Row | None:
    """The row after a message; None if it changes nothing."""
    match message:
        case messages.Status():
            return _restated(row, message)
        case messages.Telemetry() | messages.Event():
            kind, place = type(message).__name__, (message.boot, message.seq)
            if message.seq:
                if place <= row.latest.get(kind, (0, 0)):
                    return None
                row = replace(row, latest={**row.latest, kind: place})
            if isinstance(message, messages.Event):
                return replace(row, event=message)
            return replace(row, telemetry=message)
        case _:
            return None


def _restated(row: Row, status: messages.Status) -> Row | None:
    known = row.status
    if status == known:
        return None
    if known is not None and status.session != known.session:
        if status.state == "offline" and status.boot < known.boot:
            return None
        if status.boot < known.boot:
            row = replace(row, latest={})
    return replace(row, status=status)
