"""A broker for one machine and one run: `make demo`, `edgeear simulate --broker embedded`, tests. Not for a fleet.

- mosquitto as a private process, if it is installed. Otherwise iotcore (the extra `broker`, a rumqttd), which lacks
  some of MQTT 5: docs/decisions/embedded-broker.md has the table.
- It listens on loopback only, on a port that no other program gets while it runs, and serves when `embedded_broker`
  yields.
- Its state is in memory, and it ends with the process that started it, even if that is killed.
- It does not throttle: 65,535 messages may be in flight, and as many clients may connect as the system allows. iotcore
  keeps at most the last 64 MiB of each subscription, delivered or not.
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
"""iotcore needs a limit: twice the largest message that edgeear accepts."""
REMEDY = f"install mosquitto (Debian: apt install mosquitto), or {installation('broker')}, or name a broker's host"

# A change of user would cancel PR_SET_PDEATHSIG, so mosquitto, if started by root, stays root. Its limits are very high
# instead of 0 for "none", which some releases of 2.0 misread.
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

    It logs to `folder`/broker.log if you name a folder. Raises `UsageError` for an unknown `prefer`, `DeviceError` if
    the broker is not installed or does not start.
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
    """The broker to run: the preferred one, or for "auto" the first that is installed."""
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
    """The PROGRAM for `broker_process`; None if it is not installed."""
    match name:
        case "mosquitto":  # Debian installs it outside the PATH of users
            places = (os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin")
            return shutil.which("mosquitto", path=os.pathsep.join(places))
        case "iotcore":
            return "iotcore" if importlib.util.find_spec("iotcore") else None
        case _:
            assert_never(name)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port that the system gives to nobody else.

    A bound socket that does not listen reserves it: Linux still lets the broker, which also sets SO_REUSEADDR, listen.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((LOOPBACK, 0))
        yield int(keeper.getsockname()[1])


@contextlib.contextmanager
def log_file(folder: Path | None) -> Iterator[IO[bytes]]:
    """The open log: `folder`/broker.log, or a temporary file."""
    if folder is None:
        with tempfile.TemporaryFile() as log:
            yield log
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "broker.log").open("a+b")
    except OSError as error:
        raise DeviceError(f"{folder}: cannot write the broker's log ({error}); name a writable folder") from error
    with log:
        yield log


def launch(name: Name, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the broker as a child that ends with this process, and pass its configuration."""
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
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # if it ended at once, its log says why
        pipe.write(config.encode())
    return process


def await_listening(process: subprocess.Popen[bytes], name: Name, port: int, log: IO[bytes]) -> None:
    """Return when it accepts connections. Raises `DeviceError` with the end of its log if it ends or takes too long."""
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
    """Terminate it and wait. It has nothing to save, so it is killed if it is slow."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
