"""`edgeear watch` and `edgeear send` at work: the screen, the clock and the broker around watch.py and operator.py."""

from __future__ import annotations

import base64
import json
import queue
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from device.daemon.watch import Fleet, Heard, printable, table
from device.mqtt import messages
from device.mqtt.operator import BrokerAddress, operator
from device.mqtt.topics import EVENT, STATUS, TELEMETRY
from edgeear.errors import UsageError

PERIOD_S = 0.5
"""Between two looks of the screen."""


def follow(address: BrokerAddress, site: str, seconds: float | None, as_json: bool) -> None:
    """Show a fleet until interrupted, or for `seconds`: a table on a terminal, else a line for each status and event;
    with `as_json` each message as a line. Raises `DeviceError` where the broker cannot be reached."""
    console, fleet = Console(), Fleet()
    heard: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    filters = tuple(f"{messages.PROTOCOL}/{site}/+/{row.name}" for row in (STATUS, TELEMETRY, EVENT))
    until = None if seconds is None else time.monotonic() + seconds
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        stack.enter_context(operator(address, filters, lambda topic, payload: heard.put((topic, payload))))
        fancy = console.is_terminal and not as_json
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if fancy else None
        while until is None or time.monotonic() < until:
            for new in _news(fleet, heard, PERIOD_S):
                if as_json:
                    print(json.dumps(new.line()), flush=True)
                elif live is None and new.kind != TELEMETRY.name:
                    print(_line(new), flush=True)
            if live is not None:
                lines = [Text(_line(event), style="dim") for event in fleet.events]
                live.update(Group(table(fleet, time.time()), Text(""), *lines), refresh=True)


def _news(fleet: Fleet, heard: queue.SimpleQueue[tuple[str, bytes]], wait_s: float) -> list[Heard]:
    """All that came within `wait_s`, folded in."""
    news, end = [], time.monotonic() + wait_s
    with suppress(queue.Empty):
        while (left := end - time.monotonic()) > 0:
            if (new := fleet.take(*heard.get(timeout=left), time.time())) is not None:
                news.append(new)
    return news


def _line(heard: Heard) -> str:
    who, message = f"{heard.site}/{heard.device}", heard.message
    if isinstance(message, messages.Event):
        return printable(f"{_clock(message.time)}  {who}  {message.kind}: {message.text}")
    if isinstance(message, messages.Status):
        return printable(f"{_clock(message.time)}  {who}  {message.state}, generation {message.generation}")
    return who


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def command_of(name: str, fields: Sequence[str], identity: str | None) -> messages.Command:
    """The command that was typed: fields are NAME=VALUE. Raises `UsageError` naming field, value and limit."""
    facts: dict[str, Any] = {"id": identity or f"cli-{messages.new_session()}"}
    for field in fields:
        key, equals, value = field.partition("=")
        if not equals or not key:
            raise UsageError(f"field {field!r}: give NAME=VALUE, such as domain=winter")
        facts[key] = _value(value)
    command = messages.parse_command(name, json.dumps(facts).encode())
    if isinstance(command, messages.Refusal):
        raise UsageError(f"{name}: {command.reason}")
    return command


def _value(text: str) -> Any:
    if text.startswith("@"):
        try:
            return base64.b64encode(Path(text[1:]).read_bytes()).decode("ascii")
        except OSError as error:
            raise UsageError(f"{text[1:]}: cannot be read ({error.strerror}): name a JPEG or PNG file") from error
    try:
        return json.loads(text)
    except ValueError:
        return text
