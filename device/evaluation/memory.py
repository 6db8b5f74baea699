"""Peak memory: of this process, and of a fresh one that does nothing but serve.

The second is a child process that never imports torch: it receives the final system, opens the encoder and infers.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from device.encoder.engine import OrtEngine
from device.encoder.session import OnnxEncoder
from device.images.decode import decode
from edgeear.flow import infer
from edgeear.shift import ShiftState
from edgeear.system import System


def peak_rss_mb() -> float:
    """Peak resident set of this process, in MB."""
    try:
        # getrusage keeps its figure across exec: a child would report its parent's size.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def inference_memory(encoder: Path | None, system: System, frames: Sequence[Path]) -> tuple[float | None, str | None]:
    """Peak resident set, in MB, of a process that infers the images `frames` with `system`; or None and the reason."""
    if encoder is None:
        return None, "the encoder was given as an object, and a new process needs its file"
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            # The child inherits the blocked signal: on Ctrl-C it prints no traceback of its own.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                serving = pool.submit(_serve, encoder, system, tuple(frames))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return serving.result(), None
    except (BrokenProcessPool, OSError) as error:
        return None, f"the process that measures it failed ({error})"


def _serve(path: Path, system: System, frames: Sequence[Path]) -> float:
    encoder = OnnxEncoder(path)
    engine, state = OrtEngine(encoder), ShiftState()
    for frame in frames:
        _, state, _ = infer(system, engine, state, decode(frame, encoder.input_size))
    return peak_rss_mb()
