"""Peak memory: of this process, and of a fresh one that does nothing but serve.

The second is a child process that never imports torch: it receives the final system, opens the encoder and infers.
"""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from device.encoder.engine import OrtEngine
from device.encoder.session import OnnxEncoder
from device.images.decode import decode
from edgeear.flow import infer
from edgeear.shift import ShiftState
from edgeear.system import System

TIMEOUT_S = 300


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
    """Peak resident set, in MB, of a process that infers the images `frames` with `system`; or None and the reason.

    Waits for the process itself, not for an answer, so a child that is killed at any moment ends the wait."""
    if encoder is None:
        return None, "the encoder was given as an object, and a new process needs its file"
    job = pickle.dumps((encoder, system, tuple(frames)))
    try:
        # A process group of its own: on Ctrl-C the child prints no traceback of its own; run() kills it.
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=job, capture_output=True, timeout=TIMEOUT_S, process_group=0
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return None, f"the process that measures it failed ({error})"
    try:
        return float(done.stdout), None
    except ValueError:
        last = done.stderr.decode("utf-8", "backslashreplace").strip().rpartition("\n")[2]
        return None, f"the process that measures it failed (exit code {done.returncode}{last and ', '}{last})"


def _serve(path: Path, system: System, frames: Sequence[Path]) -> float:
    encoder = OnnxEncoder(path)
    engine, state = OrtEngine(encoder), ShiftState()
    for frame in frames:
        _, state, _ = infer(system, engine, state, decode(frame, encoder.input_size))
    return peak_rss_mb()


if __name__ == "__main__":
    print(_serve(*pickle.load(sys.stdin.buffer)))  # from the parent, which is this program
