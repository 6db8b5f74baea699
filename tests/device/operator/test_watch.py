"""A fleet on the operator's screen: messages in the boards' order, trouble first, safe for the terminal."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from device.mqtt import messages, topics
from device.operator.screen import ago, dumped, picture, printable
from device.operator.watch import BAD_S, LATEST, SILENT_S, Fleet, Need, Row

NOW = 1_800_000_000.0
SESSION, LATER = "0123456789abcdef", "fedcba9876543210"
EVIL = "\x1b[2J\x1b]0;owned\x07 \u202egpj \x9b31m\r\n\x7f"


def telemetry(boot: int = 1, seq: int = 1, **changes: Any) -> messages.Telemetry:
    facts: dict[str, Any] = dict(
        session=SESSION, boot=boot, seq=seq, time=NOW, from_time=NOW - 60, to_time=NOW, frames=600, dropped=0, stale=0,
        undecodable=0, ood=6, abstained=0, novelty={"p50": 0.25, "p90": 1.0, "p99": 2.0},
        latency_ms={"p50": 10.0, "p90": 11.0, "p99": 12.5}, routes={"day": 600}, phase="serving", generation=3,
        temperature_c=51.0, rss_mb=150.0, cpu_share=0.2, refused_messages=0,
        outbox={"depth": 4, "bytes": 100, "oldest_s": 1.0},
    )  # fmt: skip
    return messages.Telemetry(**facts | changes)


def event(boot: int = 1, seq: int = 1, **changes: Any) -> messages.Event:
    facts: dict[str, Any] = dict(kind="grown", text="winter", at=7, generation=3)
    return messages.Event(**facts | dict(session=SESSION, boot=boot, seq=seq, time=NOW) | changes)


def status(state: str = "online", session: str = SESSION, boot: int = 1, **changes: Any) -> messages.Status:
    facts: dict[str, Any] = dict(time=NOW, version="1", encoder="e", generation=2)
    return messages.Status(**facts | dict(state=state, session=session, boot=boot) | changes)


ROWS = {messages.Status: topics.STATUS, messages.Telemetry: topics.TELEMETRY, messages.Event: topics.EVENT}


def hear(fleet: Fleet, *told: messages.Message, device: str = "cam-1", now: float = NOW) -> list[bool]:
    """Whether each was new."""
    return [
        fleet.take(topics.topic_of("hall", device, ROWS[type(one)]), one.payload(), now) is not None for one in told
    ]


def row(fleet: Fleet, device: str = "cam-1") -> Row:
    return fleet.rows["hall", device]


def shown(fleet: Fleet, width: int = 200, height: int = 10_000, now: float = NOW, colour: bool = False) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colour, color_system="standard" if colour else None)
    console.print(picture(fleet, now, width, height))
    return [line.rstrip() for line in out.getvalue().splitlines()]


# The fold

places = st.tuples(st.integers(0, 3), st.integers(1, 5))


@given(st.lists(st.tuples(st.sampled_from([telemetry, event]), places), max_size=30))
def test_any_order_and_repetition_leave_the_newest_of_each_kind(told: list[tuple[Any, tuple[int, int]]]) -> None:
    fleet = Fleet()
    for make, (boot, seq) in told:
        hear(fleet, make(boot, seq))
    for make, name in ((telemetry, "telemetry"), (event, "event")):
        of_kind = [place for other, place in told if other is make]
        kept = getattr(row(fleet), name) if of_kind else None
        assert ((kept.boot, kept.seq) if kept else None) == max(of_kind, default=None)


@given(st.lists(places, min_size=1, max_size=20))
def test_each_event_is_told_at_most_once_and_only_forwards(told: list[tuple[int, int]]) -> None:
    fleet = Fleet()
    new = [place for place in told if hear(fleet, event(*place)) == [True]]
    assert new == sorted(set(new)) and [(e.message.boot, e.message.seq) for e in fleet.events] == new[-LATEST:]  # type: ignore[attr-defined]
    assert fleet.summary(NOW).events == len(new)


def test_a_late_event_of_another_kind_of_message_is_not_lost() -> None:
    fleet = Fleet()
    assert hear(fleet, telemetry(1, 9), event(1, 8), telemetry(1, 8)) == [True, True, False]


def test_a_repeated_message_changes_nothing_but_one_without_a_place_always_counts() -> None:
    fleet = Fleet()
    hear(fleet, status(), event(1, 5))
    before = dict(fleet.rows)
    assert hear(fleet, status(), event(1, 5), now=NOW + 9) == [False, False] and fleet.rows == before
    assert hear(fleet, event(1, 0), event(1, 0), event(1, 5)) == [True, True, False]


def test_a_board_that_lost_its_disk_is_heard_again() -> None:
    fleet = Fleet()
    hear(fleet, status(boot=7), telemetry(7, 90))
    assert hear(fleet, telemetry(1, 1)) == [False]
    assert hear(fleet, status(session=LATER, boot=1), telemetry(1, 1)) == [True, True]
    assert row(fleet).telemetry == telemetry(1, 1)


def test_a_late_farewell_does_not_take_a_board_off_line() -> None:
    fleet = Fleet()
    hear(fleet, status(boot=1), status(session=LATER, boot=2))
    assert hear(fleet, status("offline", boot=1)) == [False] and row(fleet).online
    assert hear(fleet, status("offline", session=LATER, boot=2)) == [True] and not row(fleet).online


@settings(max_examples=40)
@given(st.sampled_from(["status", "telemetry", "event"]), st.binary(max_size=80) | st.text().map(str.encode))
def test_what_is_no_message_is_counted_and_shown_as_such(name: str, payload: bytes) -> None:
    fleet = Fleet()
    hear(fleet, event())
    assert fleet.take(f"edgeear/v1/hall/cam-1/{name}", payload, NOW) is None
    assert row(fleet).strange == 1 and row(fleet).event == event() and row(fleet).need(NOW) is Need.TROUBLE
    assert "1 strange messages; grown: winter" in shown(fleet)[-1]


def test_another_version_is_strange_and_another_topic_is_nothing() -> None:
    fleet = Fleet()
    other = event().payload().replace(b'"v":1', b'"v":2')
    assert fleet.take("edgeear/v1/hall/cam-1/event", other, NOW) is None and row(fleet).strange == 1
    for topic in ("edgeear/v1/hall/cam-2/prediction", "elsewhere", "edgeear/v1/hall/cam-2/event/x"):
        assert fleet.take(topic, event().payload(), NOW) is None
    assert set(fleet.rows) == {("hall", "cam-1")}


def test_a_line_of_json_is_the_message_with_its_board() -> None:
    heard = Fleet().take("edgeear/v1/hall/cam-1/event", event(text=EVIL).payload(), NOW)
    assert heard is not None
    line = json.loads(dumped(heard.line()))
    assert (line["site"], line["device"], line["kind"]) == ("hall", "cam-1", "event")
    assert messages.Event(**line["message"]) == event(text=EVIL)


# What a person is told

NEEDS: list[tuple[Need, list[messages.Message]]] = [
    (Need.OFFLINE, [status("offline"), telemetry()]),
    (Need.TROUBLE, [status(), telemetry(ood=400)]),
    (Need.TROUBLE, [status(), event(kind="learning-failed")]),
    (Need.LABELS, [status(), telemetry(phase="labelling")]),
    (Need.BUSY, [status(), telemetry(phase="learning")]),
    (Need.BUSY, [status(), telemetry(paused=True)]),
    (Need.NONE, [status(), telemetry(), event()]),
    (Need.NONE, [telemetry(frames=0, ood=0)]),
]


@pytest.mark.parametrize(("need", "told"), NEEDS, ids=lambda value: getattr(value, "name", ""))
def test_how_much_a_board_needs_attention(need: Need, told: list[messages.Message]) -> None:
    fleet = Fleet()
    hear(fleet, *told)
    assert row(fleet).need(NOW) is need


def test_silence_is_trouble_and_old_trouble_is_over() -> None:
    fleet = Fleet()
    hear(fleet, status(), telemetry())
    assert row(fleet).need(NOW + SILENT_S) is Need.NONE and row(fleet).need(NOW + SILENT_S + 1) is Need.TROUBLE
    assert "silent" in shown(fleet, now=NOW + SILENT_S + 1)[-1]
    slow = Fleet()
    hear(slow, telemetry(from_time=NOW - 3600))
    assert row(slow).need(NOW + 2 * 3600) is Need.NONE
    bad = Fleet()
    hear(bad, event(kind="rejected"), now=NOW + BAD_S)
    assert row(bad).need(NOW + BAD_S) is Need.NONE


def test_boards_that_need_attention_come_first_then_by_name() -> None:
    fleet = Fleet()
    for number, (_, told) in enumerate(reversed(NEEDS)):
        hear(fleet, *told, device=f"cam-{number}")
    rows = fleet.by_need(NOW)
    assert [each.need(NOW) for each in rows] == sorted(need for need, _ in NEEDS)
    assert [line.split()[0] for line in shown(fleet)[2:]] == [each.name for each in rows]


def test_the_summary_of_a_fleet() -> None:
    fleet = Fleet()
    for number, (_, told) in enumerate(NEEDS):
        hear(fleet, *told, device=f"cam-{number}", now=NOW - 61 if number == 2 else NOW)
    expected = "8 boards: 6 online, 1 offline, 2 trouble, 2 learning, 1 to label, 1 events/min"
    assert str(fleet.summary(NOW)) == expected == shown(fleet)[0]


def test_the_cells_of_a_board() -> None:
    fleet = Fleet()
    hear(fleet, status(), telemetry(dropped=1, stale=2, undecodable=3, ood=60), event())
    header, line = shown(fleet, now=NOW + 75)[1:]
    assert (
        " ".join(header.split()) == "board state phase gen fps OOD novelty p99 ms lost °C MiB outbox heard last event"
    )
    assert " ".join(line.split()) == "hall/cam-1 online serving 3 10.0 10% 0.25 12.5 6 51 150 4 1 min grown: winter"


def test_what_is_not_known_is_a_dash() -> None:
    fleet = Fleet()
    hear(fleet, status(generation=8))
    assert shown(fleet)[-1].split() == ["hall/cam-1", "online", "-", "8", *["-"] * 8, "0", "s", "-"]
    hear(fleet, telemetry(novelty=None, latency_ms=None, temperature_c=None, frames=0, ood=0))
    assert shown(fleet)[-1].split()[5:11] == ["0%", "-", "-", "0", "-", "150"]


def test_no_board_yet() -> None:
    assert shown(Fleet(), 80, 24)[0].startswith("0 boards")


# What fits

names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@settings(max_examples=30)
@given(st.integers(20, 260), st.integers(5, 40), st.lists(names, max_size=30, unique=True), st.text(max_size=300))
def test_the_table_fits_any_terminal(width: int, height: int, devices: list[str], text: str) -> None:
    fleet = Fleet()
    for device in devices:
        hear(
            fleet,
            status(),
            telemetry(frames=10**9),
            event(text=text.encode("utf-8", "replace").decode()),
            device=device,
        )
    lines = shown(fleet, width, height)
    assert max(cell_len(line) for line in lines) <= width and len(lines) <= height
    hidden = [int(line.split()[1]) for line in lines if line.startswith("and ")]
    named = [line for line in lines if line.startswith("hall/")]
    assert len(named) + sum(hidden) == len(devices)


def test_eighty_columns_keep_what_matters() -> None:
    fleet = Fleet()
    hear(fleet, status(), telemetry(), event(text="x" * 500))
    header = shown(fleet, 80)[1].split()
    assert header == ["board", "state", "phase", "gen", "fps", "OOD", "heard", "last", "event"]
    assert shown(fleet, 40)[1].split() == ["board", "state", "phase", "heard"]


def test_a_thousand_cameras_show_the_worst_and_count_the_rest() -> None:
    fleet = Fleet()
    for number in range(1000):
        hear(fleet, status("offline" if number == 777 else "online"), telemetry(), device=f"cam-{number}")
    lines = shown(fleet, 100, 24)
    assert len(lines) == 24 and lines[0].startswith("1000 boards: 999 online, 1 offline")
    assert lines[2].startswith("hall/cam-777") and lines[-1] == "and 979 more"


# What reaches the terminal


@settings(max_examples=40)
@given(st.text(max_size=200))
def test_control_codes_never_reach_the_terminal(text: str) -> None:
    told = (EVIL + text).encode("utf-8", "replace").decode()
    fleet = Fleet()
    hear(fleet, event(text=told))
    heard = fleet.events[0]
    for line in (*shown(fleet), printable(told), dumped(heard.line())):
        assert line.isprintable()
    assert dumped({"a": [told]}, indent=2).replace("\n", "").isprintable()
    assert json.loads(dumped({"a": told})) == {"a": told}


def test_text_of_a_board_sets_no_colours() -> None:
    fleet = Fleet()
    hear(fleet, status(), telemetry(), event(text="\x1b[5mblink [red]markup[/red]"))
    text = "\n".join(shown(fleet, colour=True))
    assert "\x1b[5m" not in text and "[red]markup[/red]" in text


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-5, "0 s"), (0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "59 min"), (7200, "2 h"), (86_400 * 400, "400 d")],
)
def test_how_long_ago(seconds: float, told: str) -> None:
    assert ago(seconds) == told
