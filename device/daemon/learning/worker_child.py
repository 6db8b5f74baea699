"""The learning process: one job from a file, one answer to standard output, and the end. Only it loads torch.

Rules of this file:

1. It makes itself small before anything heavy is loaded: niceness, scheduling class, cores, memory; and the first that
   the kernel kills when memory runs out.
2. Standard output belongs to the messages: what libraries print goes to standard error.
3. It lives no longer than the board: the kernel kills it then, even stopped; where the kernel cannot, the end of
   standard input ends it.
4. What cannot be learned is an answer with its reason; only a bug ends it with a traceback, which the board reports.
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
from device.daemon.learning.snapshot import Kind, domain_parts, job_of, message, parcel
from device.encoder.engine import OrtEngine
from device.encoder.session import OnnxEncoder
from device.provenance import installation
from edgeear.errors import EdgeearError
from edgeear.samples import AdaptPolicy
from edgeear.system import Candidate

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
PROGRESS_S = 0.5
"""Least seconds between two messages of progress in one phase."""


def main(arguments: Sequence[str]) -> None:
    """Do the job in the open file whose descriptor is given."""
    out = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_watch_input, daemon=True).start()
    with os.fdopen(int(arguments[0]), "rb") as file:
        job, how = job_of(file.read())
    _die_with(how["parent"])
    _make_small(how)
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
    return "rejected", parcel({"reasons": list(outcome.reasons)}, {})


def _policy(how: dict[str, Any]) -> AdaptPolicy:
    import torch

    from adaptors.search import SearchPolicy
    from adaptors.train import TrainPolicy

    torch.set_num_threads(how["threads"])
    latency = None if how["latency"] is None else LatencyModel(how["latency"])
    train = None if how["epochs"] is None else TrainPolicy(epochs=how["epochs"])
    return AdaptPolicy(BUDGETS[how["budget"]], SearchPolicy(specs=how["specs"]), train, latency=latency)


def _failed(reason: str) -> tuple[Kind, Sequence[Any]]:
    return "failed", parcel({"reason": reason}, {})


class _Reporter:
    """`Progress`, as messages, not too many of them."""

    def __init__(self, out: int) -> None:
        self._out, self._phase, self._told = out, "", 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._told < PROGRESS_S:
            return
        self._phase, self._told = phase, now
        _send(self._out, "progress", parcel({"progress": [phase, done, total]}, {}))


def _send(out: int, kind: Kind, parts: Sequence[Any]) -> None:
    for part in message(kind, parts):
        view = memoryview(part).cast("B")
        while view:
            view = view[os.write(out, view) :]


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process with the thread of the board that started it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # too late for the kernel


def _watch_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def _make_small(how: dict[str, Any]) -> None:
    limit = how["memory_limit_mb"] << 20
    allowed = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(how["nice"])
    # Each of these is a courtesy that a kernel or a container may not know.
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
