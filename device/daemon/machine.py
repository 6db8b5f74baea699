"""Readings of this process and this board, for telemetry. Each answers None where the system has no such thing."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ZONES = Path("/sys/class/thermal")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def rss_mb() -> float | None:
    """Resident memory of this process now, MiB."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 2**20
    return None


def temperature_c(zones: Path = _ZONES) -> float | None:
    """The hottest thermal zone, degrees Celsius."""
    found = []
    for zone in zones.glob("thermal_zone*/temp"):
        with suppress(OSError, ValueError):
            found.append(int(zone.read_text()) / 1000)
    return max(found, default=None)


@dataclass
class CpuShare:
    """Share of one core that this process used since the last question; above 1 with several threads."""

    wall: float = 0.0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def read(self) -> float:
        wall, cpu = time.monotonic(), time.process_time()
        share = (cpu - self.cpu) / max(wall - self.wall, 1e-9)
        self.wall, self.cpu = wall, cpu
        return share
