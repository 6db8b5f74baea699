"""The machine that a fleet runs on: the broker, the limit of open files, the CPU time of threads."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from device.simulation.embedded import embedded_broker
from edgeear.errors import DeviceError, UsageError

EMBEDDED = "embedded"
FILES, SPARE_FILES = 12, 256
"""Open files of a device and of its client at an embedded broker; and of everything else."""


def broker_address(text: str) -> tuple[str, int]:
    """Host and port of HOST[:PORT]. Raises `UsageError`."""
    host, colon, port = text.rpartition(":") if text.rpartition(":")[2].isdecimal() else (text, "", "1883")
    if not host or not 0 < int(port) < 65_536 or any(character in host for character in " /@"):
        raise UsageError(f"broker {text!r}: give {EMBEDDED}, HOST or HOST:PORT, a port from 1 to 65535")
    return host.strip("[]") if colon else host, int(port)


@contextmanager
def broker_at(text: str) -> Iterator[tuple[str, int, str]]:
    """Host, port and name of the broker; an embedded one runs until the end."""
    if text == EMBEDDED:
        with embedded_broker() as broker:
            yield broker.host, broker.port, f"{broker.name} (embedded)"
    else:
        yield *broker_address(text), ""


def raise_file_limit(devices: int) -> None:
    """Raise the limit of open files for this process and its broker. Raises `DeviceError` where that is impossible."""
    needed = devices * FILES + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        most = max(0, (hard - SPARE_FILES) // FILES)
        raise DeviceError(
            f"{devices} devices need {needed} open files, the hard limit is {hard}: raise it (`ulimit -Hn {needed}` as "
            f"root, or LimitNOFILE={needed}), or simulate at most {most}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def link_cpu_s() -> float:
    """CPU seconds of the devices' network threads."""
    links = [t.ident for t in threading.enumerate() if t.name == "edgeear-link" and t.ident is not None]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in links)
