"""Readings of this process and this board, for telemetry. Missing or implausible readings are None."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ZONES = Path("/sys/class/thermal")
_STATM = Path("/proc/self/statm")
_PAGE = os.sysconf("SC_PAGE_SIZE")
PLAUSIBLE = (-60.0, 150.0)
"""Degrees Celsius of a working board. Drivers report values far outside of it for a sensor that is off."""


def rss_mb(statm: Path = _STATM) -> float:
    """Resident memory of this process now, MiB; without /proc its peak."""
    with suppress(OSError, IndexError, ValueError):
        return int(statm.read_text().split()[1]) * _PAGE / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def temperature_c(zones: Path = _ZONES) -> float | None:
    """The hottest thermal zone, degrees Celsius."""
    found = []
    for zone in zones.glob("thermal_zone*/temp"):
        with suppress(OSError, ValueError):
            found.append(int(zone.read_text()) / 1000)
    return max((degrees for degrees in found if PLAUSIBLE[0] <= degrees <= PLAUSIBLE[1]), default=None)


def readings() -> dict[str, Callable[[], float | None]]:
    """How the fields of telemetry that the machine knows are read."""
    return {"temperature_c": temperature_c, "rss_mb": rss_mb, "cpu_share": CpuShare().read}


@dataclass
class CpuShare:
    """Share of one core that this process used since the last reading; above 1 with several threads."""

    wall: float = 0.0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def read(self) -> float:
        wall, cpu = time.monotonic(), time.process_time()
        share = (cpu - self.cpu) / max(wall - self.wall, 1e-9)
        self.wall, self.cpu = wall, cpu
        return share
