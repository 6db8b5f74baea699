"""A broker for one machine and one run: `make demo`, `edgeear simulate --broker embedded`, tests. Not for a fleet.

- mosquitto, where it is installed, as a private process; iotcore (the extra `broker`, a rumqttd) only where it is not,
  since it lacks some of MQTT 5: docs/decisions/embedded-broker.md has the table.
- It listens on loopback only, on a port that nobody else gets while it runs, and serves when `embedded_broker` yields.
- Nothing stays behind: the state is in memory, and the process ends with the one that started it, even a killed one.
- It does not throttle: 65,535 messages may be in flight, and as many clients come as the system allows. What waits for
  an absent client is bounded in iotcore: it keeps the last 64 MiB of each subscription, delivered or not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, assert_never

from device.provenance import installation
from edgeear.errors import DeviceError, UsageError

Name = Literal["mosquitto", "iotcore"]

LOOPBACK = "127.0.0.1"
START_S = 20.0
STOP_S = 5.0
MAX_PAYLOAD = 16 << 20
"""iotcore wants a bound: twice the largest message that edgeear takes."""
REMEDY = f"install mosquitto (Debian: apt install mosquitto), or {installation('broker')}, or name a broker's host"

# A change of user would undo the tie to the parent, so mosquitto, started by root, is told to stay root. Its bounds are
# out of reach rather than 0 for "none", which some releases of 2.0 misread.
MOSQUITTO = """\
user root
listener {port} {host}
allow_anonymous true
persistence false
max_inflight_messages 65535
max_queued_messages 10000000
set_tcp_nodelay true
sys_interval 0
connection_messages false
log_dest stderr
log_type error
log_type warning
"""
IOTCORE = """\
id = 0
[router]
id = 0
max_connections = 10000
max_outgoing_packet_count = 1000
max_segment_size = 16777216
max_segment_count = 4
[v5.1]
name = "embedded"
listen = "{host}:{port}"
next_connection_delay_ms = 0
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {payload}
max_inflight_count = 65535
dynamic_filters = true
"""


@dataclass(frozen=True)
class EmbeddedBroker:
    """Where it listens, and which broker it is."""

    host: str
    port: int
    name: Name


@contextlib.contextmanager
def embedded_broker(folder: Path | None = None, prefer: Literal["auto"] | Name = "auto") -> Iterator[EmbeddedBroker]:
    """A running broker, ended on leaving. It also ends with the thread that entered.

    What it logs goes to `folder`/broker.log where a folder is named, and is kept there. Raises `UsageError` for an
    unknown `prefer`, `DeviceError` where the broker is not installed or does not start.
    """
    name = choose(prefer)
    with reserved_port() as port, log_file(folder) as log:
        process = launch(name, port, log)
        try:
            await_listening(process, name, port, log)
            yield EmbeddedBroker(LOOPBACK, port, name)
        finally:
            end(process)


def choose(prefer: Literal["auto"] | Name) -> Name:
    """The broker to run: the preferred one, or by itself the first that is installed."""
    match prefer:
        case "auto":
            wanted: tuple[Name, ...] = ("mosquitto", "iotcore")
        case "mosquitto" | "iotcore":
            wanted = (prefer,)
        case _:
            raise UsageError(f"broker {prefer!r}: choose auto, mosquitto or iotcore")
    for name in wanted:
        if program(name) is not None:
            return name
    raise DeviceError(f"no embedded broker: {' and '.join(wanted)} not installed; {REMEDY}")


def program(name: Name) -> str | None:
    """What `broker_process` is told to become; None where it is not installed."""
    match name:
        case "mosquitto":  # Debian puts it where users' shells do not look
            places = (os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin")
            return shutil.which("mosquitto", path=os.pathsep.join(places))
        case "iotcore":
            return "iotcore" if importlib.util.find_spec("iotcore") else None
        case _:
            assert_never(name)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port, kept from everybody who asks for any port.

    A bound socket that does not listen keeps it: Linux lets the broker, which also sets SO_REUSEADDR, listen beside it.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((LOOPBACK, 0))
        yield int(keeper.getsockname()[1])


@contextlib.contextmanager
def log_file(folder: Path | None) -> Iterator[IO[bytes]]:
    """The open log: in `folder`, or without a name, gone when closed."""
    if folder is None:
        with tempfile.TemporaryFile() as log:
            yield log
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "broker.log").open("a+b")
    except OSError as error:
        raise DeviceError(f"{folder}: cannot hold the broker's log ({error}); name a writable folder") from error
    with log:
        yield log


def launch(name: Name, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the process, tied to this one, and hand it its configuration."""
    template = MOSQUITTO if name == "mosquitto" else IOTCORE
    config = template.format(host=LOOPBACK, port=port, payload=MAX_PAYLOAD)
    starter = Path(__file__).with_name("broker_process.py")
    process = subprocess.Popen(
        [sys.executable, "-P", str(starter), str(os.getpid()), str(program(name))],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # one that died at once is reported by its log
        pipe.write(config.encode())
    return process


def await_listening(process: subprocess.Popen[bytes], name: Name, port: int, log: IO[bytes]) -> None:
    """Return when it accepts connections; `DeviceError` with the end of its log where it ends or takes too long."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
    state = "still starting" if process.poll() is None else f"exit status {process.returncode}"
    log.seek(0)
    said = "; ".join(log.read().decode(errors="replace").split("\n"))[-1000:].strip("; ")
    raise DeviceError(f"{name} does not listen on {LOOPBACK}:{port} ({state}): {said or 'no message'}; {REMEDY}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End it and wait for that. There is nothing to save, so a slow one is killed."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
