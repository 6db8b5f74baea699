"""A fleet on the screen: a summary, and a table that fits the terminal.

Rules of this file:

1. Boards that need attention come first. Boards that do not fit are counted, never left out without a word.
2. Columns with the lowest `keep` are left out until the rest fits. The board's name always stays.
3. Text from a board is cleaned of control codes before it reaches the terminal (`printable`, `dumped`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from device.mqtt import measures, messages
from device.operator.watch import Fleet, Need, Row

GAP = 2
NAME = 28
"""Most characters shown of a board's name."""
COLOURS = {Need.OFFLINE: "bold red", Need.TROUBLE: "red", Need.LABELS: "yellow", Need.BUSY: "", Need.NONE: ""}


@dataclass(frozen=True)
class Column:
    """`width` in characters. Columns with a higher `keep` stay longer. `show(row, now)` gives a cell."""

    name: str
    width: int
    keep: int
    show: Callable[[Row, float], Text]
    right: bool = True


def picture(fleet: Fleet, now: float, width: int, height: int) -> Group:
    """The fleet at `now`: a summary and a table, on `width` columns and at most `height` lines."""
    rows = fleet.by_need(now)
    shown = rows if len(rows) <= height - 2 else rows[: max(0, height - 3)]
    summary = Text(str(fleet.summary(now)), style="bold", no_wrap=True, overflow="ellipsis")
    rest = [Text(f"and {len(rows) - len(shown)} more", "dim")] if len(shown) < len(rows) else []
    return Group(summary, _table(shown, now, width), *rest)


def _table(shown: Sequence[Row], now: float, width: int) -> Table:
    longest = max((len(row.name) for row in shown), default=5)
    name = max(1, min(longest, NAME, width))
    columns = _fitting(width - name)
    made = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    made.add_column("board", no_wrap=True, overflow="ellipsis", width=name)
    for column in columns:
        side: Literal["left", "right"] = "right" if column.right else "left"
        made.add_column(column.name, no_wrap=True, overflow="ellipsis", width=column.width, justify=side)
    for row in shown:
        made.add_row(Text(row.name, COLOURS[row.need(now)]), *(column.show(row, now) for column in columns))
    return made


def printable(text: str) -> str:
    """`text` without control codes, which could move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def dumped(value: Any, indent: int | None = None) -> str:
    """JSON for a terminal: characters that are not printable are escaped, all others stay readable."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(char if char.isprintable() or char == "\n" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def ago(seconds: float) -> str:
    """A time span in at most six characters."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{min(seconds // size, 99 if unit == 'min' else 9999):.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _fitting(left: int) -> list[Column]:
    """The columns that fit. The last, if it is among them, gets the remaining width."""
    kept = []
    for column in sorted(COLUMNS, key=lambda column: -column.keep):
        if column.width + GAP > left:
            break
        left -= column.width + GAP
        kept.append(column)
    *others, last = COLUMNS
    wide = [replace(last, width=last.width + left)] if last in kept else []
    return [column for column in others if column in kept] + wide


def _state(row: Row, now: float) -> Text:
    if row.status is None:
        return Text("-")
    if row.online and row.silent(now):
        return Text("silent", "red")
    return Text(row.status.state, "green" if row.online else "bold red")


def _phase(row: Row, now: float) -> Text:
    seen = row.telemetry
    if seen is None:
        return Text("-")
    return Text("paused" if seen.paused else seen.phase, "" if seen.phase == "serving" else "yellow")


def _generation(row: Row, now: float) -> Text:
    known = [message for message in (row.telemetry, row.status) if message is not None]
    newest = max(known, key=lambda message: message.time, default=None)
    return Text("-" if newest is None else str(newest.generation))


def _lost(seen: messages.Telemetry) -> Text:
    lost = seen.dropped + seen.stale + seen.undecodable
    return Text(str(lost), "yellow" if lost > seen.frames else "")


def _of(show: Callable[[messages.Telemetry], Text]) -> Callable[[Row, float], Text]:
    """A cell made of telemetry; "-" where there is none."""
    return lambda row, now: Text("-") if row.telemetry is None else show(row.telemetry)


def _measured(row: measures.Row, cell: measures.Cell) -> Column:
    """The column of one measure; "-" where the board has no such figure."""

    def show(seen: messages.Telemetry) -> Text:
        value = row.value(getattr(seen, row.path[0]))
        value = getattr(value, cell.quantile) if cell.quantile and value is not None else value
        return Text("-" if value is None else format(value, cell.form))

    return Column(cell.heading, cell.width, cell.keep, _of(show))


MEASURED = [(row.measure.cell, _measured(row, row.measure.cell)) for row in messages.MEASURES if row.measure.cell]


def _event(row: Row, now: float) -> Text:
    strange = f"{row.strange} strange messages; " if row.strange else ""
    told = "-" if row.event is None else f"{row.event.kind}: {row.event.text}"
    return Text(printable(strange + told))


def _foreign(row: Row, now: float) -> Text:
    return Text("-" if row.telemetry is None else f"{row.foreign:.0%}", "bold red" if row.foreign > 0.5 else "")


COLUMNS = (
    Column("state", 7, 9, _state, right=False),
    Column("phase", 10, 8, _phase, right=False),
    Column("gen", 4, 4, _generation),
    Column("fps", 5, 5, _of(lambda seen: Text(f"{seen.frames / max(seen.to_time - seen.from_time, 1e-9):.1f}"))),
    Column("OOD", 4, 6, _foreign),
    *(column for cell, column in MEASURED if cell.quantile),
    Column("lost", 5, 3, _of(_lost)),
    *(column for cell, column in MEASURED if not cell.quantile),
    Column("outbox", 6, 2, _of(lambda seen: Text(str(seen.outbox.depth), "yellow" if seen.outbox.depth > 100 else ""))),
    Column("heard", 6, 7, lambda row, now: Text(ago(now - row.seen)), right=True),
    Column("last event", 20, 7, _event, right=False),
)
