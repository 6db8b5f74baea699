"""`edgeear bench runtime`: time the whole path of a frame and the bare encoder, alternating, in one run.

The parent writes generations of 1, 8, 64 ... domains with the real encoder, a real head operator and random weights;
time does not depend on their values. The child is a fresh inference process that measures itself. Compare times as
ratios within a row.

There are two baselines. `encoder_ms_p50` is the session of the encoder file itself, which always computes all of its
taps. `stripped_ms_p50` is the same network with its last pooled output only, as a plain classifier would run it:
`stripped_ratio` therefore includes the cost of the taps. `core_ms_p50` is the part between features and head:
hypervector, route and verdict. `core_bytes_per_domain` is what that part stores for a domain.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from device.encoder.session import OnnxEncoder
    from edgeear.system import System

WARMUP, ROUNDS = 10, 300
USUAL_DOMAINS = 8
"""Memory and time to readiness are reported for the largest system up to this many domains."""
CHILD = "device.evaluation.runtime"


def bench_runtime(
    encoder: Path, domains: Sequence[int] = (1, 8, 64), batch: int = 1, threads: int = 1, rounds: int = ROUNDS
) -> dict[str, Any]:
    """The JSON of `edgeear bench runtime`. Both sides answer the `batch` frames one after another."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for count in domains:
            _write_generation(encoder, root / str(count), count)
        _write_stripped(encoder, root / "stripped.onnx")
        plan: dict[str, Any] = {"root": scratch, "encoder": str(encoder), "domains": list(domains)}
        plan |= {"batch": batch, "threads": threads, "rounds": rounds}
        command = [sys.executable, "-m", CHILD, json.dumps(plan)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the measuring process failed ({done.returncode}): {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _write_generation(encoder: Path, folder: Path, count: int) -> None:
    """A system of `count` domains learned from random hypervectors, each with its own head."""
    from device.encoder.session import OnnxEncoder, pooled_taps
    from device.state.codec import to_files
    from edgeear.learned import learned
    from edgeear.space import HypervectorSpace
    from edgeear.system import System

    frozen = OnnxEncoder(encoder)
    space = HypervectorSpace(pooled_taps(frozen))
    system = System(frozen.digest, space)
    classes = tuple("abcdefg")
    rng = np.random.default_rng(0)
    for k in range(count):
        h = rng.standard_normal((140, space.dimensions)).astype(np.float32) + k
        labels = np.arange(140) % 7
        system = system.grown(learned(system, f"domain-{k}", h, labels, classes, _head(space, classes, k), {}, 0))
    folder.mkdir()
    for name, data in to_files(system).items():
        (folder / name).write_bytes(data)


def _head(space: Any, classes: tuple[str, ...], seed: int) -> Any:
    """The head that search usually chooses: 8192 Fourier dimensions over the deeper half of the taps."""
    from adaptors.archive import pack
    from adaptors.spec import HeadSpec

    taps = space.taps[len(space.taps) // 2 :]
    spec = HeadSpec(tuple(t.name for t in taps), "fourier", 8192, bandwidth=0.3, normalisation="unit")
    rng = np.random.default_rng(seed)
    width = sum(t.channels for t in taps)
    weights = {
        "matrix.readout": rng.standard_normal((len(classes), 8192)).astype(np.float32),
        "bias.readout": np.zeros(len(classes), np.float32),
        "shift": np.zeros(width, np.float32),
        "scale": np.ones(width, np.float32) / np.sqrt(width, dtype=np.float32),
    }
    return pack(spec, {t.name: t.shape for t in taps}, classes, weights, seed)


def _write_stripped(encoder: Path, target: Path) -> None:
    """Write the encoder with its last pooled tap (not the classifier) as the only output."""
    import onnx
    from onnx.utils import Extractor

    from device.encoder.session import OnnxEncoder

    last = [t.name for t in OnnxEncoder(encoder).taps if not t.spatial and t.name.endswith(".mean")]
    model = onnx.load(encoder)
    names = last[-1:] or [model.graph.output[0].name]
    onnx.save(Extractor(model).extract_model([model.graph.input[0].name], names), target)


def _measure(plan: dict[str, Any], started: float) -> dict[str, Any]:
    """Measure in the child, which does what a board's inference process does, and nothing else."""
    from device.encoder.engine import OrtEngine
    from device.encoder.session import OnnxEncoder
    from device.state.codec import from_files
    from edgeear.flow import infer, judge
    from edgeear.shift import ShiftState

    imported = time.perf_counter()
    root = Path(plan["root"])
    rng = np.random.default_rng(1)

    def opened(count: int) -> tuple[System, OnnxEncoder, dict[str, Callable[[], object]]]:
        system = from_files({p.name: p.read_bytes() for p in (root / str(count)).iterdir()})
        encoder = OnnxEncoder(plan["encoder"], threads=plan["threads"])
        engine, frame = OrtEngine(encoder), rng.integers(0, 256, (*encoder.input_size, 3), dtype=np.uint8)
        path = partial(infer, system, engine, ShiftState(), frame)
        path()
        features = engine.encode(frame, system.wanted_taps)
        return system, encoder, {"path": path, "core": lambda: judge(system, system.space.encode(features))}

    # Memory and readiness first, before loading anything that a board would not load.
    usual = max([c for c in plan["domains"] if c <= USUAL_DOMAINS], default=plan["domains"][0])
    system, encoder, _ = opened(usual)
    ready = time.perf_counter() - started
    rss = _peak_mb()
    size = encoder.input_size
    calls = {"encoder": _session(Path(plan["encoder"]), size), "stripped": _session(root / "stripped.onnx", size)}
    rows = [_row(plan, count, {**calls, **opened(count)[2]}) for count in plan["domains"]]
    return {
        "machine": f"{platform.machine()} {_cpu()} x{os.cpu_count()}",
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": version("onnxruntime"),
            "numpy": np.__version__,
        },
        "rows": rows,
        "rss_mb": round(rss, 1),
        "import_s": round(imported - started, 3),
        "ready_s": round(ready, 3),
        "torch_imported": "torch" in sys.modules,
        "bytes_per_domain": system.domains[0].bytes,
        "core_bytes_per_domain": system.domains[0].bytes - len(system.domains[0].head.onnx),
    }


def _session(file: Path, size: tuple[int, int]) -> Callable[[], object]:
    """One run of the network alone, without preprocessing, that fetches its last pooled tap."""
    from device.encoder.runtime import open_session

    session = open_session(file.read_bytes())
    pooled = [o.name for o in session.get_outputs() if o.name.endswith(".mean")]
    image = np.zeros((1, 3, *size), np.float32)
    return partial(session.run, pooled[-1:] or None, {session.get_inputs()[0].name: image})


def _row(plan: dict[str, Any], count: int, calls: dict[str, Callable[[], object]]) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARMUP + plan["rounds"]):
        for name, call in calls.items():
            begun = time.perf_counter()
            for _ in range(plan["batch"]):
                call()
            if i >= WARMUP:
                times[name].append(1e3 * (time.perf_counter() - begun))
    p50 = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "domains": count,
        "batch": plan["batch"],
        "threads": plan["threads"],
        "encoder_ms_p50": round(p50["encoder"], 3),
        "stripped_ms_p50": round(p50["stripped"], 3),
        "path_ms_p50": round(p50["path"], 3),
        "path_ms_p99": round(float(np.quantile(times["path"], 0.99)), 3),
        "core_ms_p50": round(p50["core"], 3),
        "overhead_ratio": round(p50["path"] / p50["encoder"], 4),
        "stripped_ratio": round(p50["path"] / p50["stripped"], 4),
    }


def _peak_mb() -> float:
    """Peak resident memory of this process in MB. getrusage would include the parent's before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]), time.perf_counter())))
