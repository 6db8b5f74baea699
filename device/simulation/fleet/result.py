"""The result of a fleet run, as JSON and as a table. The keys of the JSON object are stable:

    {"passed": true, "faults": ["d-0007: 8 windows of telemetry came, 9 were due"],     // at most 100
     "devices": 200, "domains": ["mnist", ...], "broker": "mosquitto (embedded)", "address": "127.0.0.1:1883",
     "machine": "...", "versions": {...}, "samples": 120, "seed": 0, "every_s": 10.0, "period_s": 300.0,
     "births": {"expected": 200, "received": 200, "unique_sessions": 200},
     "telemetry": {"windows_expected": 0, "windows_received": 0, "frames_shown": 0, "frames_answered": 0,
                   "frames_reported": 0},
     "sequence": {"messages": 0, "missing": 0, "repeated": 0, "devices_out_of_order": 0},
     "events": {"shift": 0, ...},                                                       // by kind
     "commands": {"sent": 0, "answered_once": 0, "to_be_refused": 0, "refused": 0, "wrong_correlation": 0,
                  "wrong_session": 0},
     "shift": {"moved": 100, "declared": 0, "declared_without_move": 0, "labels_wanted": 0},
     "taught": [{"device": "d-0001", "outcome": "grown", "knows": true, "seconds": 0.0}],
     "speed": {"wall_s": 0.0, "virtual_s": 0.0, "speed_up": 0.0, "frames_per_s": 0.0, "messages_per_s": 0.0,
               "start_s": 0.0},
     "cpu": {"device_s": 0.0,               // per device while frames are shown: its turns and its network thread,
             "device_with_encoder_s": 0.0,  // and with what the encoder would take for each frame
             "start_s": 0.0,                // per device, to open and connect it
             "turn_ms_per_frame": 0.0, "link_ms_per_frame": 0.0, "encoder_ms_per_frame": 0.0, "frame_ms": 0.0,
             "process_s": 0.0},             // all of this process, the operator too
     "turn_ms": {"p50": 0.0, "p99": 0.0, "max": 0.0},  // of the wall, without the encoder, the disk's waits included
     "memory": {"rss_mb_before": 0.0, "rss_mb_started": 0.0, "rss_mb_after": 0.0, "rss_mb_per_device_started": 0.0,
                "rss_mb_per_device": 0.0, "disk_mb_per_device": 0.0},
     "files": {"open": 0, "per_device": 0.0},
     "per_device": [{"name": "d-0000", "moved_to": null, "frames": 0, "windows": 0, "messages": 0, "answers": 0,
                     "cpu_s": 0.0, "faults": 0}]}

The command line adds "machine" and "versions". "sequence" counts messages that went through the outboxes. "shift" is a
finding, not a fault: it says what the detector did, not whether a message was lost. A device that was taught and did
not end in "grown" is a fault. Memory leaves out the encoder, the first generation and the pictures, which the devices
of one process share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from device.simulation.fleet.check import Asked, Heard, Truth, correlates, faults

MAX_FAULTS = 100


@dataclass(frozen=True)
class Fleet:
    """What was run: name and address of the broker, settings for the record, how many devices were to be taught."""

    broker: str
    address: str
    settings: dict[str, Any]
    domains: tuple[str, ...]
    teach: int


@dataclass(frozen=True)
class Row:
    """One device: where it moved to, if anywhere, CPU seconds of its turns, what it did and what was heard of it."""

    name: str
    moved_to: str
    cpu_s: float
    truth: Truth
    asked: Sequence[Asked]
    heard: Heard


@dataclass(frozen=True)
class Taught:
    """A device that the operator labelled frames for: the event that ended it, and whether it knows the domain now."""

    device: str
    outcome: str
    knows: bool
    seconds: float


@dataclass
class Costs:
    """What the run cost. CPU and messages are those of the time in which frames were shown."""

    encoder_ms: float = 0.0
    start_s: float = 0.0
    start_cpu_s: float = 0.0
    stream_s: float = 0.0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    link_s: float = 0.0
    messages: int = 0
    files: int = 0
    disk_mb: float = 0.0
    rss_mb_before: float = 0.0
    rss_mb_started: float = 0.0
    rss_mb_after: float = 0.0
    turns_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class FleetResult:
    """The JSON object that the module's docstring describes."""

    fields: dict[str, Any]

    @property
    def passed(self) -> bool:
        return bool(self.fields["passed"])

    @property
    def faults(self) -> list[str]:
        return list(self.fields["faults"])


def result(fleet: Fleet, rows: Sequence[Row], costs: Costs, taught: Sequence[Taught]) -> FleetResult:
    """Compare what was sent, heard and done, and put the result together."""
    wrong = {row.name: faults(row.truth, row.asked, row.heard) for row in rows}
    told = [f"{name}: {fault}" for name, found in wrong.items() for fault in found]
    told += _together(rows) + _lessons(fleet, taught)
    return FleetResult(
        {
            "passed": not told,
            "faults": told[:MAX_FAULTS],
            "devices": len(rows),
            "domains": list(fleet.domains),
            "broker": fleet.broker,
            "address": fleet.address,
            **fleet.settings,
            **_messages(rows),
            "taught": [
                {"device": t.device, "outcome": t.outcome, "knows": t.knows, "seconds": round(t.seconds, 1)}
                for t in taught
            ],
            **_figures(rows, costs),
            "per_device": [_device(row, len(wrong[row.name])) for row in rows],
        }
    )


def _together(rows: Sequence[Row]) -> list[str]:
    shared = [session for session, count in Counter(row.truth.session for row in rows).items() if count > 1]
    return [f"session {session} is used by several devices" for session in shared]


def _lessons(fleet: Fleet, taught: Sequence[Taught]) -> list[str]:
    found = [f"{t.device}: it was taught, and the outcome is {t.outcome}" for t in taught if t.outcome != "grown"]
    if len(taught) < fleet.teach:
        found.append(f"{fleet.teach} devices were to be taught, {len(taught)} asked for labels")
    return found


def _messages(rows: Sequence[Row]) -> dict[str, Any]:
    heard = [row.heard for row in rows]
    kinds: Counter[str] = sum((h.kinds for h in heard), Counter())
    births = [session for h in heard for session in set(h.births)]
    return {
        "births": {"expected": len(rows), "received": len(births), "unique_sessions": len(set(births))},
        "telemetry": {
            "windows_expected": sum(row.truth.windows for row in rows),
            "windows_received": sum(len(h.telemetry) for h in heard),
            "frames_shown": sum(row.truth.shown for row in rows),
            "frames_answered": sum(row.truth.answered for row in rows),
            "frames_reported": sum(h.frames for h in heard),
        },
        "sequence": {
            "messages": sum(len(h.order) for h in heard),
            "missing": sum(len(h.gaps) for h in heard),
            "repeated": sum(h.repeated for h in heard),
            "devices_out_of_order": sum(not h.ordered for h in heard),
        },
        "events": dict(sorted(kinds.items())),
        "commands": _commands(rows),
        "shift": {
            "moved": sum(bool(row.moved_to) for row in rows),
            "declared": sum(bool(row.moved_to and row.heard.kinds["shift"]) for row in rows),
            "declared_without_move": sum(bool(not row.moved_to and row.heard.kinds["shift"]) for row in rows),
            "labels_wanted": kinds["label-wanted"],
        },
    }


def _commands(rows: Sequence[Row]) -> dict[str, int]:
    asked = [(row, command, row.heard.answers.get(command.id, [])) for row in rows for command in row.asked]
    return {
        "sent": len(asked),
        "answered_once": sum(len(answers) == 1 for _, _, answers in asked),
        "to_be_refused": sum(command.outcome == "refused" for _, command, _ in asked),
        "refused": sum(any(a.response.outcome == "refused" for a in answers) for _, _, answers in asked),
        "wrong_correlation": sum(not correlates(command, a) for _, command, answers in asked for a in answers),
        "wrong_session": sum(a.response.session != row.truth.session for row, _, answers in asked for a in answers),
    }


def _figures(rows: Sequence[Row], costs: Costs) -> dict[str, Any]:
    devices, frames = len(rows), max(1, sum(row.truth.shown for row in rows))
    turns, links = sum(row.cpu_s for row in rows), costs.link_s
    encoding = costs.encoder_ms * frames / 1e3
    figures: dict[str, dict[str, float]] = {
        "speed": {
            "wall_s": costs.stream_s,
            "virtual_s": costs.virtual_s,
            "speed_up": costs.virtual_s / costs.stream_s,
            "frames_per_s": frames / costs.stream_s,
            "messages_per_s": costs.messages / costs.stream_s,
            "start_s": costs.start_s,
        },
        "cpu": {
            "device_s": (turns + links) / devices,
            "device_with_encoder_s": (turns + links + encoding) / devices,
            "start_s": costs.start_cpu_s / devices,
            "turn_ms_per_frame": 1e3 * turns / frames,
            "link_ms_per_frame": 1e3 * links / frames,
            "encoder_ms_per_frame": costs.encoder_ms,
            "frame_ms": 1e3 * (turns + links + encoding) / frames,
            "process_s": costs.cpu_s,
        },
        "turn_ms": dict(zip(("p50", "p99", "max"), np.quantile(costs.turns_ms or [0.0], (0.5, 0.99, 1)), strict=True)),
        "memory": {
            "rss_mb_before": costs.rss_mb_before,
            "rss_mb_started": costs.rss_mb_started,
            "rss_mb_after": costs.rss_mb_after,
            "rss_mb_per_device_started": (costs.rss_mb_started - costs.rss_mb_before) / devices,
            "rss_mb_per_device": (costs.rss_mb_after - costs.rss_mb_before) / devices,
            "disk_mb_per_device": costs.disk_mb / devices,
        },
        "files": {"open": costs.files, "per_device": costs.files / devices},
    }
    return {name: {key: round(float(value), 3) for key, value in group.items()} for name, group in figures.items()}


def _device(row: Row, wrong: int) -> dict[str, Any]:
    return {
        "name": row.name,
        "moved_to": row.moved_to or None,
        "frames": row.truth.answered,
        "windows": len(row.heard.telemetry),
        "messages": len(row.heard.order),
        "answers": sum(map(len, row.heard.answers.values())),
        "cpu_s": round(row.cpu_s, 3),
        "faults": wrong,
    }


def table(found: FleetResult) -> Table:
    """The summary for people."""
    f = found.fields
    births, telemetry, sequence, commands = f["births"], f["telemetry"], f["sequence"], f["commands"]
    speed, cpu, memory, shift = f["speed"], f["cpu"], f["memory"], f["shift"]
    verdict = "passed" if found.passed else f"FAILED: {len(found.faults)} faults"
    made = Table(title=f"{f['devices']} devices, {f['broker']}: {verdict}", box=box.SIMPLE, show_header=False)
    for name, text in (
        ("births", f"{births['received']} of {births['expected']}, {births['unique_sessions']} sessions"),
        (
            "telemetry",
            f"{telemetry['windows_received']:,} of {telemetry['windows_expected']:,} windows, "
            f"{telemetry['frames_reported']:,} of {telemetry['frames_answered']:,} frames",
        ),
        (
            "messages",
            f"{sequence['messages']:,}, {sequence['missing']} missing, {sequence['repeated']} repeated; "
            f"{speed['messages_per_s']:,.0f} a second",
        ),
        (
            "commands",
            f"{commands['answered_once']:,} of {commands['sent']:,} answered once, "
            f"{commands['refused']:,} of {commands['to_be_refused']:,} refused",
        ),
        (
            "shifts",
            f"{shift['declared']} of {shift['moved']} moves, {shift['declared_without_move']} without a move; "
            f"{shift['labels_wanted']} asked for labels",
        ),
        ("taught", ", ".join(f"{t['device']} {t['outcome']}" for t in f["taught"]) or "-"),
        ("time", f"{speed['virtual_s']:,.0f} s of a device in {speed['wall_s']:.1f} s, {speed['speed_up']:.0f} times"),
        (
            "CPU per frame",
            f"{cpu['turn_ms_per_frame']:.2f} ms + network {cpu['link_ms_per_frame']:.2f} ms + "
            f"encoder {cpu['encoder_ms_per_frame']:.1f} ms",
        ),
        (
            "a turn takes",
            f"{f['turn_ms']['p50']:.1f} ms, p99 {f['turn_ms']['p99']:.1f} ms, at most {f['turn_ms']['max']:.0f} ms",
        ),
        (
            "CPU per device",
            f"{cpu['device_s']:.2f} s without the encoder, {cpu['device_with_encoder_s']:.2f} s with it; "
            f"{cpu['start_s']:.2f} s to start",
        ),
        (
            "memory per device",
            f"{memory['rss_mb_per_device']:.2f} MB ({memory['rss_mb_per_device_started']:.2f} MB at the start); "
            f"all: {memory['rss_mb_before']:.0f} MB before, {memory['rss_mb_after']:.0f} MB after",
        ),
        ("files per device", f"{f['files']['per_device']:.1f} open, {memory['disk_mb_per_device']:.1f} MB on disk"),
    ):
        made.add_row(name, text)
    return made
