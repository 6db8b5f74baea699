"""`make bench-science`: ours and the published anchors on the same cached features, one JSON file a part.

    python -m benchmarks.science [--part detectors,routers] [--seeds 5] [--jobs 2]

Rules of this file:

1. A part is a list of independent jobs; a job runs in a process of one thread, and its rows are gathered in order, so
   that a file depends on the data, the seeds and the versions alone, except for times.
2. A finished part is written at once: an interrupted run loses the part under way. `--part` takes up or repeats parts.
3. Figures of all seeds are kept; means and deviations are the page's business.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DATA_SETS = ("pacs", "digits", "cwru")
ABLATION_SEEDS = 3
Row = dict[str, object]


@dataclass(frozen=True)
class Job:
    """One call in a process of its own; `function` is `module:name` under benchmarks."""

    function: str
    arguments: tuple[object, ...]

    def __str__(self) -> str:
        return f"{self.function.partition(':')[2]}({', '.join(map(str, self.arguments))})"


def parts(seeds: int) -> dict[str, list[Job]]:
    """Part -> its jobs; those of one data set and seed are neighbours, which share what a process has loaded."""
    from benchmarks.ablation import OUTLIER_WEIGHTS, variants

    every = range(seeds)
    ablated = [(v, s) for s in range(min(seeds, ABLATION_SEEDS)) for v in variants()]
    joint = [(w, s) for s in every for w in OUTLIER_WEIGHTS]
    return {
        "detectors": [Job("detection:detect", (name, s)) for name in DATA_SETS for s in every],
        "routers": [Job("learning:route", (name, s)) for name in DATA_SETS for s in every],
        "learners": [Job("learning:learn_domains", (shots, s)) for shots in (None, 20) for s in every],
        "classes": [Job("learning:learn_classes", (s,)) for s in every],
        "attribution": [Job("attribution:attribution", (s,)) for s in every],
        "ablation": [Job("ablation:ablate", a) for a in ablated] + [Job("ablation:joint_training", a) for a in joint],
    }


def run(job: Job) -> list[Row]:
    """Called in a worker process."""
    import importlib

    module, name = job.function.split(":")
    function: Callable[..., list[Row]] = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    return function(*job.arguments)


def _start() -> None:
    import torch

    torch.set_num_threads(1)


def run_part(name: str, jobs: Sequence[Job], pool: ProcessPoolExecutor, results: Path) -> None:
    """Run all jobs and write `science-NAME.json`."""
    started, rows = time.perf_counter(), []
    for number, (job, found) in enumerate(zip(jobs, pool.map(run, jobs), strict=True), 1):
        rows += found
        print(f"{name} {number}/{len(jobs)}: {job}, {time.perf_counter() - started:.0f} s", flush=True)
    write(results / f"science-{name}.json", name, rows, time.perf_counter() - started)


def write(path: Path, part: str, rows: Sequence[Row], seconds: float) -> None:
    """Rows of the same keys as one table, a row a line; figures to five digits."""
    from device.provenance import machine, versions

    head = {"part": part, "machine": machine(), "versions": versions(), "seconds": round(seconds)}
    tables: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        tables.setdefault(tuple(row), []).append(json.dumps([_short(v) for v in row.values()], separators=(",", ":")))
    body = ",\n".join(
        f'{{"columns": {json.dumps(columns)}, "rows": [\n' + ",\n".join(lines) + "\n]}"
        for columns, lines in tables.items()
    )
    text = json.dumps(head, indent=1)[:-2] + ',\n "tables": [\n' + body + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def rows_of(content: dict[str, Any]) -> list[Row]:
    """The rows of a file that `write` wrote, table by table."""
    return [dict(zip(t["columns"], row, strict=True)) for t in content["tables"] for row in t["rows"]]


def _short(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.science", description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="", help="parts to run, by commas; all where it is left out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    available = parts(options.seeds)
    wanted = [name for name in options.part.split(",") if name] or list(available)
    unknown = [name for name in wanted if name not in available]
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(available)}")
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn, initializer=_start) as pool:
        for done in pool.map(run, [Job("data:prepare", (name,)) for name in ("pacs", "digits", "cwru", "textures")]):
            print(*done, flush=True)
        print(*pool.submit(run, Job("data:prepare", ("corrupted",))).result(), flush=True)  # made from pacs
        for name in wanted:
            run_part(name, available[name], pool, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
