"""The learner of a daemon: each job in a process of its own, niced, limited, and killed at a limit.

Rules of this file:

1. This process never imports torch. A job goes out as bytes and a domain comes back as bytes (snapshot.py); `install`
   here makes the candidate over the very generation that the job was for.
2. Whatever the child does, the outcome is a value: out of time, out of memory, killed, crashed, no answer, invalid
   data, no torch. A thread talks to the child, so `poll` never waits and never raises for it.
3. The child ends with the job and with this process: the kernel kills it, and its standard input closes. It is always
   reaped. The job is an anonymous file in memory, so nothing stays on a disk.
4. Predictions come first. The child has the idle scheduling class, the highest niceness and one thread; where there is
   more than one core, it does not use the first one. The kernel kills it first when memory runs out.
5. The memory limit holds for what the child occupies. This process checks its resident memory; the kernel bounds its
   private data, which stops what grows between two checks. A bound on address space is no use: an adaptation that
   occupies 450 MB, 420 MB of them private data, has 1.0 to 1.4 GB mapped.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from adaptors.latency import LatencyModel
from adaptors.progress import Progress
from adaptors.search_space import BUDGETS
from device.board.learner import Failed, Job, Outcome
from device.daemon.learning.snapshot import Inbox, Kind, job_parts, system_of, unpack
from edgeear.errors import FormatError, UsageError
from edgeear.flow import install
from edgeear.system import Candidate, Rejected

COMMAND = (sys.executable, "-m", "device.daemon.learning.worker_child")
CHECK_S = 0.2
"""Seconds between two checks of the child's memory and time."""
STDERR_BYTES = 2000
"""The last bytes of the child's standard error that are kept."""


@dataclass(frozen=True)
class WorkerPolicy:
    """How the child learns, and its limits.

    `budget` names one of the search space's budgets, `latency` is the cost table of a profiled board. `time_limit_s`:
    seconds for the whole job; `memory_limit_mb`: resident memory; `nice`: 0 to 19; `idle`: use the idle scheduling
    class; `spare_core`: do not use the first core. Raises UsageError for numbers out of range."""

    budget: str = "medium"
    specs: int = 300
    epochs: int | None = None
    latency: Mapping[str, float] | None = None
    time_limit_s: float = 1800.0
    memory_limit_mb: int = 1200
    threads: int = 1
    nice: int = 19
    idle: bool = True
    spare_core: bool = True

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise UsageError(f"budget is {self.budget!r}: it must be one of {', '.join(BUDGETS)}")
        for name, least in (("specs", 1), ("time_limit_s", 0.001), ("memory_limit_mb", 1), ("threads", 1), ("nice", 0)):
            if not getattr(self, name) >= least:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.latency is not None:
            LatencyModel(self.latency)


class ProcessLearner:
    """`device.board.learner.Learner` in a child process over the encoder's file.

    `on_progress` is called from `poll`; `on_ready` from another thread, when `poll` has an outcome to give. `command`
    starts the child."""

    def __init__(
        self,
        encoder: Path,
        policy: WorkerPolicy | None = None,
        *,
        on_progress: Progress = lambda *_: None,
        on_ready: Callable[[], None] = lambda: None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._encoder, self._policy = encoder, policy or WorkerPolicy()
        self._on_progress, self._on_ready, self._command = on_progress, on_ready, tuple(command)
        self._run: _Run | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return self._run.pid if self._run is not None else None

    def start(self, job: Job) -> None:
        if self._run is not None:
            raise UsageError("a job is running already: take its outcome or cancel it first")
        self._run = _Run(job, self._encoder, self._policy, self._command, self._on_ready)
        self._run.thread.start()

    def poll(self) -> Outcome | None:
        run = self._run
        if run is None:
            return None
        if (progress := run.progress) is not None:
            run.progress = None
            self._on_progress(*progress)
        if run.outcome is not None:
            self._run = None
        return run.outcome

    def cancel(self) -> None:
        """Kill the child, if any, without waiting for its end."""
        run, self._run = self._run, None
        if run is not None:
            run.cancel()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the running job has an outcome."""
        if self._run is not None:
            self._run.thread.join(timeout)


class _Run:
    """One job in one child, and the thread that watches it. That thread writes `outcome` and `progress`."""

    def __init__(
        self, job: Job, encoder: Path, policy: WorkerPolicy, command: tuple[str, ...], on_ready: Callable[[], None]
    ) -> None:
        self.outcome: Outcome | None = None
        self.progress: tuple[str, int, int] | None = None
        self.thread = threading.Thread(target=self._watch, name="learner", daemon=True)
        self._job, self._encoder, self._policy, self._command = job, encoder, policy, command
        self._on_ready = on_ready
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = threading.Event()
        self._inbox, self._stderr = Inbox(), b""
        self._answer: tuple[Kind, bytes] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    def cancel(self) -> None:
        self._cancelled.set()
        if self._process is not None:
            self._process.kill()

    def _watch(self) -> None:
        try:
            outcome = self._outcome(self._run_child())
        except Exception as error:  # without an outcome the board would wait for ever
            outcome = Failed(f"learning failed ({type(error).__name__}: {error}): see what the learning process sends")
        self.outcome = outcome
        if not self._cancelled.is_set():
            self._on_ready()

    def _run_child(self) -> str | None:
        """Run the child to its end. Returns why there is no answer, None where there is one."""
        deadline = time.monotonic() + self._policy.time_limit_s
        with _memory_file() as file:
            how = {**asdict(self._policy), "encoder": str(self._encoder), "parent": os.getpid()}
            for part in job_parts(self._job, how):
                file.write(part)
            file.flush()
            file.seek(0)
            self._process = process = self._spawn(file.fileno())
        with process:
            try:
                reason = "cancelled" if self._cancelled.is_set() else self._listen(process, deadline)
            except FormatError as error:
                reason = f"the learning process sent invalid data ({error}): update edgeear and its packages"
            finally:
                process.kill()  # it has answered, or must stop
        return None if self._answer and reason is None else reason or self._exit_reason(process.returncode)

    def _spawn(self, job: int) -> subprocess.Popen[bytes]:
        threads = str(self._policy.threads)
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        return subprocess.Popen(
            [*self._command, str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(job,),
            bufsize=0,
            start_new_session=True,  # Ctrl-C on a terminal reaches the parent only
            env={**os.environ, **dict.fromkeys(names, threads), "PYTHONPATH": path},
        )

    def _listen(self, process: subprocess.Popen[bytes], deadline: float) -> str | None:
        """Read until the child answers or ends. Returns the reason where it exceeded a limit."""
        assert process.stdout is not None and process.stderr is not None
        with selectors.DefaultSelector() as selector:
            for pipe in (process.stdout, process.stderr):
                selector.register(pipe, selectors.EVENT_READ)
            while self._answer is None and selector.get_map():
                for key, _ in selector.select(CHECK_S):
                    data = os.read(key.fd, 1 << 18)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stderr:
                        self._stderr = (self._stderr + data)[-STDERR_BYTES:]
                    else:
                        self._receive(data)
                if self._answer is None and (reason := self._exceeded(process.pid, deadline)):
                    return reason
        if self._answer is None:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return self._exceeded(process.pid, deadline)
        return None

    def _receive(self, data: bytes) -> None:
        for kind, payload in self._inbox.feed(data):
            if kind == "progress":
                phase, done, total = unpack(payload)[0]["progress"]
                self.progress = (str(phase), int(done), int(total))
            else:
                self._answer = (kind, payload)
                return

    def _exceeded(self, pid: int, deadline: float) -> str | None:
        if time.monotonic() >= deadline:
            limit = f"{self._policy.time_limit_s:g} s"
            return f"killed at its time limit of {limit}: raise the limit, or search fewer specifications"
        held = resident_mb(pid)
        if held > self._policy.memory_limit_mb:
            limit = f"{self._policy.memory_limit_mb} MB"
            return (
                f"killed with {held:.0f} MB of memory, over its limit of {limit}: raise the limit, or learn from less"
            )
        return None

    def _exit_reason(self, code: int) -> str:
        """Why a child ended without an answer."""
        said = self._stderr.decode(errors="replace").strip().splitlines()
        last = f"; its last line of output: {said[-1]}" if said else ""
        if self._inbox.partial:
            return f"the learning process ended in the middle of its answer (exit code {code}){last}"
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            return f"the learning process was killed by {name}: by the kernel for lack of memory, or by a user{last}"
        return f"the learning process ended without an answer (exit code {code}){last}"

    def _outcome(self, reason: str | None) -> Outcome:
        if reason is not None or self._answer is None:
            return Failed(reason or "the learning process gave no answer")
        kind, payload = self._answer
        if kind == "grown":
            found = system_of(payload, self._job.name)
            (domain,) = found.domains
            outcome = install(self._job.system, domain, found.encoder_digest, found.space.digest)
            if isinstance(outcome, Candidate):  # computed in this thread, so that the first frame does not wait
                _ = outcome.system.router, domain.detector
            return outcome
        header = unpack(payload)[0]
        if kind == "rejected":
            return Rejected(self._job.name, tuple(str(reason) for reason in header["reasons"]))
        return Failed(str(header["reason"]))


def _memory_file() -> IO[bytes]:
    """An anonymous file, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("edgeear-job"), "w+b")
    return tempfile.TemporaryFile()


def resident_mb(pid: int) -> float:
    """Resident memory of a process, 0 where it is unknown."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    except (OSError, IndexError, ValueError):
        return 0.0
