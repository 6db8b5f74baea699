"""The embedded broker: it serves when `embedded_broker` yields, keeps its port, and always ends without a trace."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from device.simulation import embedded
from device.simulation.embedded import EmbeddedBroker, Name, embedded_broker
from edgeear.errors import DeviceError, UsageError
from tests.support.needs import need

need("a broker")
ROOT = Path(__file__).resolve().parents[3]
NAMES: tuple[Name, ...] = ("mosquitto", "iotcore")
PARENT = """
import os, sys
from device.simulation.embedded import embedded_broker
with embedded_broker(prefer=sys.argv[1]) as broker:
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    print(broker.port, *children, flush=True)
    sys.stdin.read()
"""


def refuses(broker: EmbeddedBroker) -> bool:
    """Nobody listens there."""
    with contextlib.closing(socket.socket()) as client:
        return client.connect_ex((broker.host, broker.port)) != 0


def children() -> set[int]:
    """The processes that this one started and that still run."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


@pytest.mark.parametrize("name", NAMES)
def test_serves_while_it_is_held_and_leaves_nothing(
    name: Name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = children()
    with embedded_broker(prefer=name) as broker:
        assert broker.name == name and not refuses(broker)
    assert refuses(broker)
    assert children() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_ends_when_its_parent_is_killed(name: Name) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        port, child = map(int, parent.stdout.readline().split())
        end = os.pidfd_open(child)
        assert not refuses(EmbeddedBroker(embedded.LOOPBACK, port, name))
        parent.send_signal(signal.SIGKILL)
        await_end(end)
    assert refuses(EmbeddedBroker(embedded.LOOPBACK, port, name))


def await_end(process: int) -> None:
    """Return when the process behind a pidfd has ended."""
    ready, _, _ = select.select([process], [], [], 20)
    os.close(process)
    assert ready, "the broker outlived its parent by 20 s"


def test_many_run_side_by_side() -> None:
    with contextlib.ExitStack() as stack:
        ports = {stack.enter_context(embedded_broker(prefer=name)).port for name in NAMES * 3}
        assert len(ports) == 6


def test_the_port_is_kept_from_others() -> None:
    with embedded.reserved_port() as port, socket.socket() as other, pytest.raises(OSError):
        other.bind((embedded.LOOPBACK, port))


def test_a_failed_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MOSQUITTO", embedded.MOSQUITTO + "no_such_option 1\n")
    before = children()
    with (
        pytest.raises(DeviceError, match=r"no_such_option.*apt install mosquitto"),
        embedded_broker(prefer="mosquitto"),
    ):
        pass
    assert children() == before


def test_ends_with_an_error_inside() -> None:
    before = children()
    with pytest.raises(ZeroDivisionError), embedded_broker():
        raise ZeroDivisionError
    assert children() == before


def test_its_log_is_kept_where_a_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "logs"
    with embedded_broker(folder):
        assert (folder / "broker.log").is_file()
    assert [path.name for path in folder.iterdir()] == ["broker.log"]


def test_a_folder_that_cannot_hold_the_log_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match="file"), embedded_broker(tmp_path / "file"):
        pass


def installed(*names: Name) -> Callable[[Name], str | None]:
    """A replacement for `embedded.program`."""
    return lambda name: name if name in names else None


@pytest.mark.parametrize(("there", "chosen"), [(NAMES, "mosquitto"), (("iotcore",), "iotcore")])
def test_mosquitto_comes_first(there: tuple[Name, ...], chosen: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "program", installed(*there))
    assert embedded.choose("auto") == chosen
    assert embedded.choose("iotcore") == "iotcore"


def test_none_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "program", installed())
    with pytest.raises(DeviceError, match=r"apt install mosquitto.*'\.\[broker\]'"):
        embedded.choose("auto")
    with pytest.raises(DeviceError, match="iotcore not installed"):
        embedded.choose("iotcore")


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(UsageError, match="'hbmqtt': choose auto, mosquitto or iotcore"):
        embedded.choose(cast(Name, "hbmqtt"))
