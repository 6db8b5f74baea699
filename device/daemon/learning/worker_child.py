"""The learning process: it reads one job, writes one answer to standard output and exits. Only it loads torch.

Rules of this file:

1. It limits itself before it loads anything heavy (worker.py, rules 4 and 5).
2. Standard output is for messages only. What libraries print there goes to standard error.
3. It ends with the board. The kernel kills it then, even while it is stopped; where the kernel cannot do that, it exits
   at the end of standard input.
4. A job that cannot be learned is an answer with a reason. Only a bug ends with a traceback, which the board reports.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptors.latency import LatencyModel
from adaptors.search_space import BUDGETS
from device.board.learner import Job, learn
from device.daemon.learning.snapshot import Kind, domain_parts, job_of, message, pack
from device.encoder.engine import OrtEngine
from device.encoder.session import OnnxEncoder
from device.provenance import installation
from edgeear.errors import EdgeearError
from edgeear.samples import AdaptPolicy
from edgeear.system import Candidate

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
PROGRESS_S = 0.5
"""Seconds between two messages of progress in one phase, at least."""


def main(arguments: Sequence[str]) -> None:
    """Do the job in the file with the descriptor `arguments[0]`."""
    out = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_watch_input, daemon=True).start()
    with os.fdopen(int(arguments[0]), "rb") as file:
        job, how = job_of(file.read())
    _end_with(how["parent"])
    _limit_resources(how)
    try:
        kind, parts = _answer(job, how, out)
    except ModuleNotFoundError as error:
        kind, parts = _failed(f"{error}: learning needs torch, {installation('learn')}")
    except MemoryError:
        kind, parts = _failed(f"out of memory at its limit of {how['memory_limit_mb']} MB: raise the limit")
    except (EdgeearError, ValueError, KeyError) as error:
        kind, parts = _failed(f"{type(error).__name__}: {error}")
    _send(out, kind, parts)


def _answer(job: Job, how: dict[str, Any], out: int) -> tuple[Kind, Sequence[Any]]:
    encoder = OnnxEncoder(Path(how["encoder"]), how["threads"])
    if encoder.digest != job.system.encoder_digest:
        return _failed(f"{how['encoder']} is another encoder than the board serves with: restart the board")
    outcome = learn(job, encoder, OrtEngine(encoder), _policy(how), _Reporter(out))
    if isinstance(outcome, Candidate):
        return "grown", domain_parts(outcome.system, job.name)
    return "rejected", pack({"reasons": list(outcome.reasons)}, {})


def _policy(how: dict[str, Any]) -> AdaptPolicy:
    import torch

    from adaptors.search import SearchPolicy
    from adaptors.train import TrainPolicy

    torch.set_num_threads(how["threads"])
    latency = None if how["latency"] is None else LatencyModel(how["latency"])
    train = None if how["epochs"] is None else TrainPolicy(epochs=how["epochs"])
    return AdaptPolicy(BUDGETS[how["budget"]], SearchPolicy(specs=how["specs"]), train, latency=latency)


def _failed(reason: str) -> tuple[Kind, Sequence[Any]]:
    return "failed", pack({"reason": reason}, {})


class _Reporter:
    """`Progress` as messages, at most one each `PROGRESS_S` in a phase."""

    def __init__(self, out: int) -> None:
        self._out, self._phase, self._told = out, "", 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._told < PROGRESS_S:
            return
        self._phase, self._told = phase, now
        _send(self._out, "progress", pack({"progress": [phase, done, total]}, {}))


def _send(out: int, kind: Kind, parts: Sequence[Any]) -> None:
    for part in message(kind, parts):
        view = memoryview(part).cast("B")
        while view:
            view = view[os.write(out, view) :]


def _end_with(parent: int) -> None:
    """Ask the kernel to kill this process with the thread of the board that started it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent is gone already: the kernel will not send the signal


def _watch_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def _limit_resources(how: dict[str, Any]) -> None:
    limit = how["memory_limit_mb"] << 20
    allowed = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(how["nice"])
    # A kernel or a container may refuse each of these: the job goes on without.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, AttributeError):
        if how["idle"]:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError, AttributeError):
        cores = sorted(os.sched_getaffinity(0))
        if how["spare_core"] and len(cores) > 1:
            os.sched_setaffinity(0, cores[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
