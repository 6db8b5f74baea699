"""What an operator sees of a fleet: the boards' messages folded into one row each. `edgeear watch` shows them.

Rules of this file:

1. A repeated message changes nothing: (boot, seq) of the latest is kept for each board, and what is not newer is
   passed over. Messages with seq 0 stand outside of that order.
2. A message that is none of this version's is counted for its board, never shown as if it were.
3. Nothing here prints, connects or asks for the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from device.mqtt import messages, topics

LATEST = 8
"""Events that the table shows below it."""


@dataclass(frozen=True)
class Row:
    """What is known of one board; `seen` is the operator's time of its last message, unix seconds."""

    site: str
    device: str
    seen: float
    status: messages.Status | None = None
    telemetry: messages.Telemetry | None = None
    event: messages.Event | None = None
    latest: tuple[int, int] = (0, 0)
    strange: int = 0


@dataclass(frozen=True)
class Heard:
    """One message that was new: `kind` is the topic below the board's prefix."""

    site: str
    device: str
    kind: str
    message: messages.Message

    def line(self) -> dict[str, Any]:
        """As one line of JSON says it."""
        facts = self.message.model_dump(mode="json")
        return {"site": self.site, "device": self.device, "kind": self.kind, "message": facts}


@dataclass
class Fleet:
    """All boards heard of, by (site, device), and the latest events of any."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    events: list[Heard] = field(default_factory=list)

    def take(self, topic: str, payload: bytes, now: float) -> Heard | None:
        """Fold one message in; what it was, None where it was nothing new or nothing of ours."""
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
            self.events = [*self.events, heard][-LATEST:]
        return heard


def _taken(row: Row, message: messages.Message) -> Row | None:
    """The row after a message; None for one that was taken before."""
    match message:
        case messages.Status():
            return replace(row, status=message)
        case messages.Telemetry() | messages.Event():
            place = (message.boot, message.seq)
            if message.seq and place <= row.latest:
                return None
            row = replace(row, latest=max(place, row.latest))
            if isinstance(message, messages.Event):
                return replace(row, event=message)
            return replace(row, telemetry=message)
        case _:
            return None


def table(fleet: Fleet, now: float) -> Table:
    """The fleet as a person would rather look at it; offline boards and trouble stand out."""
    shown = Table(title=f"{len(fleet.rows)} boards", title_justify="left", box=None, pad_edge=False)
    for name in ("board", "state", "phase", "gen"):
        shown.add_column(name)
    for name in ("fps", "OOD", "novelty", "p99 ms", "°C", "MiB", "outbox", "heard"):
        shown.add_column(name, justify="right")
    shown.add_column("last event", overflow="ellipsis", no_wrap=True)
    for _, row in sorted(fleet.rows.items()):
        shown.add_row(*_cells(row, now))
    return shown


def _cells(row: Row, now: float) -> list[Text]:
    seen, status, heard = row.telemetry, row.status, max(0.0, now - row.seen)
    state = Text("-") if status is None else Text(status.state, "green" if status.state == "online" else "bold red")
    generation = seen.generation if seen else status.generation if status else None
    cells = [Text(f"{row.site}/{row.device}"), state]
    if seen is None:
        cells += [Text("-"), Text("-" if generation is None else str(generation)), *[Text("-")] * 7]
    else:
        span = max(seen.to_time - seen.from_time, 1e-9)
        ood = seen.ood / seen.frames if seen.frames else 0.0
        cells += [
            Text("paused" if seen.paused else seen.phase, "" if seen.phase == "serving" else "yellow"),
            Text(str(generation)),
            Text(f"{seen.frames / span:.1f}"),
            Text(f"{ood:.0%}", "bold red" if ood > 0.5 else ""),
            Text("-" if seen.novelty is None else f"{seen.novelty.p50:.2f}"),
            Text("-" if seen.latency_ms is None else f"{seen.latency_ms.p99:.1f}"),
            Text("-" if seen.temperature_c is None else f"{seen.temperature_c:.0f}"),
            Text(f"{seen.rss_mb:.0f}"),
            Text(str(seen.outbox.depth), "yellow" if seen.outbox.depth > 100 else ""),
        ]
    event = Text("-" if row.event is None else printable(f"{row.event.kind}: {row.event.text}"))
    return [*cells, Text(f"{heard:.0f} s"), event]


def printable(text: str) -> str:
    """Without control codes, which could move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
