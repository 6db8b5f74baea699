"""A board's daemon as a process: `edgeear run` over a folder, and the systemd end of its notification socket.

Tests and benchmarks share it. Every wait is for something that the daemon says, or for its end.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import IO

from adaptors.search import SearchPolicy
from adaptors.train import TrainPolicy
from device.board.learner import LabelledJob, learn
from device.daemon.config.settings import DeviceSection
from device.encoder.engine import OrtEngine
from device.encoder.session import OnnxEncoder
from device.state.codec import to_files
from device.state.store import Store
from edgeear.samples import AdaptPolicy
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.system import Candidate, System
from tests.support import fakes, tiny_models

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
COMMAND = (sys.executable, "-c", "from device.cli.app import main; main()")
SITE, DEVICE = "lab", "cam"
OWN = f"edgeear/v1/{SITE}/{DEVICE}"
TAUGHT = "day"
"""The domain that `taught` knows: background 0 of tests/support/fakes.py."""
_PAGE, _TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class DaemonProcess:
    """`edgeear run` over `folder`/board.toml, with `folder` as its working directory and `environment` on top of ours.

    `start` returns when it runs, `wait_told` when it has said something to systemd, `wait_said` to its log."""

    def __init__(self, folder: Path, config: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self._config, self._environment = folder, folder / "board.toml", environment or {}
        self._said: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread()
        self._config.write_text(config)
        self._process: subprocess.Popen[str] | None = None
        self._systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._systemd.bind(b"")  # the kernel picks a free abstract name
        self.told: list[str] = []
        self.begun = 0.0

    def __enter__(self) -> DaemonProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._systemd.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> DaemonProcess:
        """Start it as systemd would with Type=notify."""
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": f"@{self._name()}"}
        self.told.clear()
        self.begun = time.monotonic()
        process = self._process = subprocess.Popen(
            [*COMMAND, "run", "--config", str(self._config)],
            cwd=self.folder,
            env={**os.environ, **own, **self._environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(process.stderr,))
        self._reader.start()
        return self

    def wait_told(self, text: str, times: int = 1) -> float:
        """Seconds from the start until systemd was told `text`, `times` times since."""
        with _ending(self.pid) as end:
            while sum(text in told for told in self.told) < times:
                ready, _, _ = select.select([self._systemd.fileno(), *end], [], [], PATIENCE if end else 0)
                assert self._systemd.fileno() in ready, f"{text} was not told:\n{self.said()}"
                self.told.append(self._systemd.recv(4096).decode())
        return time.monotonic() - self.begun

    def wait_said(self, text: str, times: int = 1) -> None:
        """Until so many lines of its log, from all its starts, held `text`."""
        with self._changed:
            seen = self._changed.wait_for(lambda: sum(text in line for line in self._said) >= times, PATIENCE)
            assert seen, f"{text} was not said:\n{self.said()}"

    def wait_ready(self) -> DaemonProcess:
        self.wait_told("READY=1")
        return self

    def ended(self) -> int:
        """Its exit code, negative where a signal ended it, once it has ended."""
        assert self._process is not None
        code = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def terminate(self) -> int:
        """Ask it to end, and wait for that."""
        os.kill(self.pid, signal.SIGTERM)
        return self.ended()

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        os.kill(self.pid, signal.SIGKILL)
        self.ended()

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        """What it logged, from all its starts."""
        with self._changed:
            return "".join(self._said)

    def rss_mb(self) -> float:
        """Resident memory now, MiB."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE / 2**20

    def cpu_s(self) -> float:
        """Seconds that it has computed so far, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def peak_mb(self) -> float:
        """The most resident memory so far, MiB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def maps(self) -> str:
        """What is mapped into it, as the kernel lists it."""
        return Path(f"/proc/{self.pid}/maps").read_text()

    def _read(self, log: IO[str]) -> None:
        with log:
            for line in log:
                with self._changed:
                    self._said.append(line)
                    self._changed.notify_all()

    def _name(self) -> str:
        return bytes(self._systemd.getsockname())[1:].decode()


@contextmanager
def _ending(pid: int) -> Iterator[list[int]]:
    """A descriptor that is ready once a process has ended; none where it has."""
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:
        yield []
        return
    try:
        yield [end]
    finally:
        os.close(end)


def state(folder: Path) -> DeviceSection:
    """Where `config` keeps the state of a board in `folder`."""
    return DeviceSection(state=folder / "state")


def config(folder: Path, port: int | None, encoder: Path, **extra: str) -> str:
    """A configuration as TOML: state in `folder`/state, the broker at `port` or none; `extra` has the lines of other
    sections, or of these instead; those of mqtt come on top."""
    broker = "enabled = false" if port is None else f'host = "127.0.0.1"\nport = {port}'
    sections = {
        "device": f'site = "{SITE}"\nname = "{DEVICE}"\nstate = "{state(folder).state}"\nencoder = "{encoder}"',
        "mqtt": broker,
        "learning": "labels = 40\nprobation = 20\nspecs = 12\nlabel_free = false",
    }
    for name, lines in extra.items():
        sections[name] = f"{sections[name]}\n{lines}" if name == "mqtt" else lines
    return "\n".join(f"[{name}]\n{lines}\n" for name, lines in sections.items())


@lru_cache(maxsize=1)
def taught() -> tuple[bytes, dict[str, bytes]]:
    """An encoder file and the files of a generation over it that knows the domain `TAUGHT`, really learned."""
    content = tiny_models.seeing()
    with TemporaryDirectory() as folder:
        encoder = OnnxEncoder(tiny_models.saved(Path(folder), content))
    space = HypervectorSpace(encoder.taps, SpacePolicy(dimensions=256, levels=fakes.M))
    empty = System(encoder.digest, space, fakes.empty(recognise=3.0).policy)
    labels = fakes.labels_of(60)
    frames = tuple(fakes.frames(0, fakes.CLASSES, labels, 1))
    job = LabelledJob(empty, TAUGHT, frames, tuple(fakes.CLASSES[i] for i in labels), seed=3)
    policy = AdaptPolicy(search=SearchPolicy(specs=12), train=TrainPolicy(epochs=5))
    outcome = learn(job, encoder, OrtEngine(encoder), policy, lambda *_: None)
    assert isinstance(outcome, Candidate)
    return content, to_files(outcome.system)


def teach(folder: Path) -> Path:
    """Put a store that knows `TAUGHT` where `config` looks for it; the encoder's file."""
    content, files = taught()
    with Store.open(state(folder).store) as store:
        number = store.write(files, created=0.0)
        store.commit(number)
        store.confirm(number)
    return tiny_models.saved(folder, content)
