"""The notification socket, against a real datagram socket as systemd binds it."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from device.daemon.systemd import Notifier

PID = 4242


@pytest.fixture(params=["path", "abstract"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A bound socket, and what systemd would write into NOTIFY_SOCKET for it."""
    name = f"edgeear-{uuid.uuid4().hex}"
    bound, told = (f"\0{name}", f"@{name}") if request.param == "abstract" else (str(tmp_path / "notify"),) * 2
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.settimeout(10)
        server.bind(bound)
        yield server, told


def test_a_life_is_told(supervisor: tuple[socket.socket, str]) -> None:
    server, address = supervisor
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(PID)}, PID)
    assert notifier.watchdog_s == 20.0
    assert notifier.ready("serving 3 domains") and server.recv(999) == b"READY=1\nSTATUS=serving 3 domains"
    assert notifier.alive(0.0) and server.recv(999) == b"WATCHDOG=1"
    assert notifier.status("learning") and server.recv(999) == b"STATUS=learning"
    assert notifier.stopping() and server.recv(999) == b"STOPPING=1\nSTATUS=stopping"


def test_watchdog_is_fed_at_most_every_half_interval(supervisor: tuple[socket.socket, str]) -> None:
    _, address = supervisor
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000000"}, PID)
    fed = {now: notifier.alive(now) for now in (100.0, 100.1, 109.9, 110.0, 119.0, 120.5)}
    assert [now for now, told in fed.items() if told] == [100.0, 110.0, 120.5]


def test_status_cannot_smuggle_in_another_assignment(supervisor: tuple[socket.socket, str]) -> None:
    server, address = supervisor
    assert Notifier({"NOTIFY_SOCKET": address}, PID).status("a\nMAINPID=1\r\n b")
    assert server.recv(999) == b"STATUS=a MAINPID=1 b"


@pytest.mark.parametrize(
    ("usec", "watched"), [("", str(PID)), ("0", str(PID)), ("soon", str(PID)), ("-5", str(PID)), ("20000000", "1")]
)
def test_no_watchdog_where_none_is_meant_for_us(usec: str, watched: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": usec, "WATCHDOG_PID": watched}, PID)
    assert notifier.watchdog_s is None and not notifier.alive(1e9)


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "vsock:2:3", "relative"])
def test_nobody_to_tell_is_no_error(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address} if address else {}, PID)
    assert not notifier.ready("up") and not notifier.stopping()


def test_a_supervisor_that_does_not_read_cannot_block_us(supervisor: tuple[socket.socket, str]) -> None:
    _, address = supervisor
    notifier = Notifier({"NOTIFY_SOCKET": address}, PID)
    assert not all(notifier.status("x" * 1000) for _ in range(10_000))


def test_defaults_are_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "1000000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        assert Notifier().watchdog_s == 1.0 and Notifier().ready("up")
        assert server.recv(999).startswith(b"READY=1\n")
