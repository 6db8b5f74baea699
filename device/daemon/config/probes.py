"""What the doctor asks the machine: each function reads one fact; doctor.py decides what it means."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import socket
import ssl
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device.daemon.config.certificates import Validity
from device.daemon.config.settings import MqttSection
from device.encoder.cache import cached_encoder
from device.encoder.session import OnnxEncoder, Problem, check_encoder
from device.files import cache_dir
from device.state.codec import from_files
from device.state.store import CURRENT, Store

TIMEOUT_S = 5.0
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


@dataclass(frozen=True)
class EncoderFacts:
    """`digest` and `frame_ms` (median of a few frames) are None if the file cannot serve."""

    threads: int
    problems: tuple[Problem, ...]
    digest: str | None
    frame_ms: float | None


@dataclass(frozen=True)
class StoreFacts:
    """`encoder` is the digest that the live generation was learned on; `damage` is why the store uses an older one."""

    live: int | None
    confirmed: int | None
    domains: int
    encoder: str | None
    damage: str | None


def read(path: str) -> str:
    """A file's text; empty if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_mb(meminfo: str | None = None, limit: str | None = None, used: str | None = None) -> float | None:
    """Memory available now, from `/proc/meminfo` and the control group's limit; None if neither reports it."""
    found = re.search(r"(?m)^MemAvailable:\s*(\d+) kB", read("/proc/meminfo") if meminfo is None else meminfo)
    bound = (read("/sys/fs/cgroup/memory.max") if limit is None else limit).strip()
    taken = (read("/sys/fs/cgroup/memory.current") if used is None else used).strip()
    known = [int(found[1]) / 1024] if found else []
    if bound.isdigit() and taken.isdigit():
        known.append(max(0, int(bound) - int(taken)) / 2**20)
    return min(known, default=None)


def clock_synchronised() -> bool | None:
    """Whether the kernel says that the clock is synchronised (adjtimex); None if it does not say."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    state: int = adjtimex(ctypes.create_string_buffer(1024))  # struct timex, all zero: read only
    return None if state < 0 else state != _UNSYNCHRONISED


def writable(folder: Path) -> str | None:
    """Why this user cannot write to `folder`, or to its nearest parent if it does not exist; None if it can."""
    while not folder.exists():
        folder = folder.absolute().parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written to ({error.strerror})"


def free_mb(folder: Path) -> float:
    """Free space on the disk of `folder`, or of its nearest parent if it does not exist."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free / 2**20


def installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def encoder(path: Path | None, threads: int, preprocessing: str | None = None, frames: int = 7) -> EncoderFacts:
    """The file at `path`, or the cached one, checked and timed."""
    chosen = path or cached_encoder(cache_dir())
    if chosen is None:
        problems: tuple[Problem, ...] = (_no_encoder(),)
    elif not chosen.is_file():
        problems = (Problem("error", f"{chosen} does not exist", "correct device.encoder"),)
    elif not os.access(chosen, os.R_OK):
        problems = (Problem("error", f"{chosen}: this user may not read it", f"chmod a+r {chosen}"),)
    else:
        problems = check_encoder(chosen, preprocessing=preprocessing)
    if chosen is None or any(problem.severity == "error" for problem in problems):
        return EncoderFacts(threads, problems, None, None)
    network = OnnxEncoder(chosen, threads, preprocessing=preprocessing)
    frame, taps = np.zeros((1, *network.input_size, 3), np.uint8), [tap.name for tap in network.taps if not tap.spatial]
    times = []
    for _ in range(frames):
        begun = time.perf_counter()
        network.encode(frame, taps)
        times.append(1000 * (time.perf_counter() - begun))
    return EncoderFacts(threads, problems, network.digest, statistics.median(times))


def _no_encoder() -> Problem:
    remedy = "run `edgeear encoder export`"
    if not (installed("torch") and installed("onnx")):
        remedy = (
            "run `edgeear encoder export --output encoder.onnx` on a machine that has the learn extra, copy the file "
        )
        remedy += "to this machine and set device.encoder to it"
    return Problem("error", f"no intact built-in encoder in {cache_dir()}", remedy)


def store(folder: Path) -> StoreFacts | None:
    """None if there is no store. Raises what `Store.open` and reading it raise."""
    if not (folder / CURRENT).is_file():
        return None
    with Store.open(folder) as opened:
        damage = None if opened.recovered_from is None else str(opened.recovered_from)
        if opened.live is None:
            return None
        system = from_files(opened.read(opened.live))
        return StoreFacts(opened.live, opened.confirmed, len(system.domains), system.encoder_digest, damage)


def connect(host: str, port: int) -> None:
    """Connect to a TCP port and close the connection. Raises `OSError`."""
    socket.create_connection((host, port), TIMEOUT_S).close()


def broker(mqtt: MqttSection) -> Validity | None:
    """Connect to the broker; when its certificate is valid, None without TLS. Raises `OSError`, also for faults of TLS
    (`ssl.SSLError`)."""
    with socket.create_connection((mqtt.host, mqtt.port), TIMEOUT_S) as plain:
        if not mqtt.secure:
            return None
        context = ssl.create_default_context(cafile=None if mqtt.ca is None else str(mqtt.ca))
        if mqtt.cert is not None:
            context.load_cert_chain(mqtt.cert, mqtt.key)
        with context.wrap_socket(plain, server_hostname=mqtt.host) as secure:
            shown = secure.getpeercert() or {}
            start, end = (ssl.cert_time_to_seconds(str(shown[key])) for key in ("notBefore", "notAfter"))
            return Validity(start, end)
