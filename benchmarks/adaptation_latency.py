"""Does learning disturb predictions? Latency of a serving board, without and during a full adaptation in the child.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.adaptation_latency --data DIR --json FILE

A board that has learned one domain serves its frames at a fixed rate, open loop: a frame is due when it is due, however
late the one before was. Windows alternate: quiet, adapting, quiet, ... An adapting window lasts as long as the learning
process does, from `adapt_now` to the step that commits the new generation, that step included; it is then rolled back,
and the quiet window follows. Service is the time of `Board.step`, response counts from when the frame was
due. The bar holds the median over the windows of p99, adapting over quiet, of both. All of it runs on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from device.board.board import Board, BoardPolicy
from device.daemon.learning.worker import ProcessLearner, WorkerPolicy, resident_mb
from device.encoder.export import default_encoder_path
from device.encoder.session import OnnxEncoder, pooled_taps
from device.files import cache_dir, write_whole
from device.images.dataset import read_folder, split
from device.images.decode import decode
from device.provenance import machine, versions
from edgeear.space import HypervectorSpace
from edgeear.system import Live, System
from edgeear.types import U8

BAR = 1.5
LABELS = 150
KNOWN, NEW = "photo", "sketch"
QUIET = 240
"""Frames of a quiet window."""


@dataclass
class _Truth:
    """`device.board.board.Labeller` of a set of frames, by sample number."""

    seen: dict[int, str]

    def label(self, at: Sequence[int]) -> list[str | None]:
        return [self.seen.get(number) for number in at]

    def domain(self, at: Sequence[int]) -> str:
        return NEW


@dataclass
class _World:
    """Decoded frames and their labels of one domain, shown in turn."""

    frames: list[U8]
    labels: list[str]


class _Bench:
    def __init__(self, data: Path, policy: WorkerPolicy, rate: float) -> None:
        path = default_encoder_path(cache_dir())
        encoder = OnnxEncoder(path)
        self.rate, self.truth, self.at, self.peak_mb = rate, _Truth({}), 0, 0.0
        self.worlds = {name: _world(data, name, encoder) for name in (KNOWN, NEW)}
        start = System(encoder.digest, HypervectorSpace(pooled_taps(encoder)))
        self.learner = ProcessLearner(path, policy)
        self.board = Board(
            Live(start, start),
            encoder,
            self.truth,
            time.time,
            BoardPolicy(labels=LABELS, memory=LABELS, probation=10**9),
            learner=self.learner,
        )
        self.board.pause(True)
        self.adapt(KNOWN)
        self.board.confirm()

    def adapt(self, name: str) -> tuple[list[float], list[float]]:
        """Learn a domain; service and response of the frames served meanwhile, seconds."""
        for frame, label in zip(self.worlds[name].frames[:LABELS], self.worlds[name].labels, strict=False):
            self._step(frame, label)
        self.board.pause(False)
        self.board.adapt_now(name)
        times = self._serve(10**9)
        if self.board.phase != "probation":
            raise SystemExit(f"nothing was learned: {self.board.phase}")
        self.board.pause(True)
        return times

    def quiet(self, count: int) -> tuple[list[float], list[float]]:
        return self._serve(count)

    def _serve(self, count: int) -> tuple[list[float], list[float]]:
        """Show at most `count` known frames while the phase stays."""
        service, response, phase, frames = [], [], self.board.phase, self.worlds[KNOWN].frames
        start = time.perf_counter()
        for k in range(count):
            due = start + k / self.rate
            time.sleep(max(0.0, due - time.perf_counter()))
            begun = time.perf_counter()
            self._step(frames[k % len(frames)])
            ended = time.perf_counter()
            service.append(ended - begun)
            response.append(ended - max(due, start))
            if (pid := self.learner.pid) is not None:
                self.peak_mb = max(self.peak_mb, resident_mb(pid))
            if self.board.phase != phase:
                break
        return service, response

    def _step(self, frame: U8, label: str | None = None) -> None:
        self.at += 1
        if label is not None:
            self.truth.seen[self.at] = label
        self.board.step(frame)


def _world(data: Path, name: str, encoder: OnnxEncoder) -> _World:
    folder = read_folder(data, (name,))
    items = split(folder.items[name])[0]
    chosen = [items[int(i)] for i in np.random.default_rng(0).permutation(len(items))[:LABELS]]
    return _World([decode(i.path, encoder.input_size) for i in chosen], [folder.classes[i.label] for i in chosen])


def measure(data: Path, policy: WorkerPolicy, rate: float, windows: int) -> dict[str, Any]:
    """Alternating windows, their quantiles and the ratios."""
    bench = _Bench(data, policy, rate)
    rows: list[dict[str, Any]] = []
    for _ in range(windows):
        adapting = bench.adapt(NEW)
        seconds = len(adapting[0]) / rate
        bench.board.rollback()
        quiet = bench.quiet(QUIET)
        rows.append({"seconds": round(seconds, 1), "adapting": _figures(adapting), "quiet": _figures(quiet)})
        print(json.dumps(rows[-1]), flush=True)
    ratios = {
        f"{kind}_{q}": _median([r["adapting"][f"{kind}_{q}"] for r in rows])
        / _median([r["quiet"][f"{kind}_{q}"] for r in rows])
        for kind in ("service", "response")
        for q in ("p50", "p99")
    }
    return {"windows": rows, "ratios": ratios, "bar": BAR, "child_peak_mb": round(bench.peak_mb)}


def _figures(times: tuple[list[float], list[float]]) -> dict[str, float]:
    named = zip(("service", "response"), times, strict=True)
    return {
        "frames": len(times[0]),
        **{f"{kind}_p{q}": round(1e3 * float(np.percentile(x, q)), 3) for kind, x in named for q in (50, 99)},
        "service_max": round(1e3 * max(times[0]), 3),
    }


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=cache_dir() / "PACS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rate", type=float, default=20.0, help="frames a second")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=JSON", help="fields of WorkerPolicy")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    policy = replace(WorkerPolicy(), **{k: json.loads(v) for k, v in (pair.split("=", 1) for pair in given.set)})
    found = measure(given.data, policy, given.rate, given.windows)
    record = {"machine": machine(), "versions": versions(), "rate": given.rate, **found}
    if given.json is not None:
        write_whole(given.json, (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps({"ratios": found["ratios"], "child_peak_mb": found["child_peak_mb"]}))


if __name__ == "__main__":
    main()
