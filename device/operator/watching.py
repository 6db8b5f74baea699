"""What an operator's program does: follow a fleet (`edgeear watch`), read a typed command (`edgeear send`)."""

from __future__ import annotations

import base64
import json
import os
import queue
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from device.mqtt import messages
from device.mqtt.topics import EVENT, STATUS, TELEMETRY, prefix
from device.operator.client import BrokerAddress, Operator
from device.operator.screen import dumped, picture, printable
from device.operator.watch import LATEST, Fleet, Heard
from edgeear.errors import UsageError

PERIOD_S = 0.5
"""Seconds between two updates of the screen."""


def follow(address: BrokerAddress, site: str, seconds: float | None, as_json: bool) -> None:
    """Show a fleet until interrupted, or for `seconds`: a table on a terminal, else a line for each status and event;
    with `as_json` a line of JSON for each message. Raises `DeviceError` if the broker cannot be reached."""
    console, fleet = Console(), Fleet()
    inbox: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    until = None if seconds is None else time.monotonic() + seconds
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        us = stack.enter_context(Operator(address, _filters(site), lambda topic, payload: inbox.put((topic, payload))))
        fancy = console.is_terminal and not as_json
        live = stack.enter_context(Live(console=console, auto_refresh=False, screen=True)) if fancy else None
        while until is None or time.monotonic() < until:
            if not _printed(_news(fleet, inbox, PERIOD_S), as_json, quiet=live is not None):
                return
            if live is not None:
                live.update(_picture(fleet, time.time(), console, us.connected), refresh=True)


def _filters(site: str) -> tuple[str, ...]:
    if site != "+":
        prefix(site, "any")  # raises for a wrong name
    return tuple(f"{messages.PROTOCOL}/{site}/+/{row.name}" for row in (STATUS, TELEMETRY, EVENT))


def _picture(fleet: Fleet, now: float, console: Console, connected: bool) -> Group:
    shown = picture(fleet, now, console.width, max(5, console.height - LATEST - 2))
    lines = [Text(_line(event), style="dim", no_wrap=True, overflow="ellipsis") for event in fleet.events]
    return Group(shown, Text("" if connected else "the broker is gone: reconnecting", style="bold red"), *lines)


def _printed(news: list[Heard], as_json: bool, quiet: bool) -> bool:
    """Print new messages. False when the reader, such as `head`, has closed the pipe."""
    lines = [dumped(new.line()) if as_json else _line(new) for new in news if as_json or new.kind != TELEMETRY.name]
    try:
        if lines and not quiet:
            print("\n".join(lines), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python exits
        return False
    return True


def _news(fleet: Fleet, inbox: queue.SimpleQueue[tuple[str, bytes]], wait_s: float) -> list[Heard]:
    """Update the fleet with all messages that come within `wait_s`; the new ones."""
    news, end = [], time.monotonic() + wait_s
    with suppress(queue.Empty):
        while (left := end - time.monotonic()) > 0:
            if (new := fleet.take(*inbox.get(timeout=left), time.time())) is not None:
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
    """The command that was typed, with fields as NAME=VALUE. A value is read as JSON where the field accepts that,
    otherwise as text. Raises `UsageError` that names field, value and limit."""
    typed: dict[str, str] = {}
    for field in fields:
        key, equals, value = field.partition("=")
        if not equals or not key:
            raise UsageError(f"field {field!r}: give NAME=VALUE, such as domain=winter")
        if key in typed:
            raise UsageError(f"field {key} is given twice, as {typed[key]!r} and {value!r}: give it once")
        typed[key] = value
    own = {"id": identity or f"cli-{messages.new_session()}"}
    read = {key: _value(value) for key, value in typed.items()}
    as_text = {key: typed[key] if isinstance(value, int | float | None) else value for key, value in read.items()}
    command = _parsed(name, {**own, **read})
    if isinstance(command, messages.Refusal):
        again = _parsed(name, {**own, **as_text})  # a domain may be called 2024
        if isinstance(again, messages.Refusal):
            raise UsageError(f"{name}: {command.reason}")
        return again
    return command


def _parsed(name: str, facts: dict[str, Any]) -> messages.Command | messages.Refusal:
    return messages.parse_command(name, json.dumps(facts).encode())


def _value(text: str) -> Any:
    if text.startswith("@"):
        try:
            return base64.b64encode(Path(text[1:]).read_bytes()).decode("ascii")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"{text[1:]}: cannot be read ({why}): name a JPEG or PNG file") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
