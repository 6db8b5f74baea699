"""Writes one JSON file: bounds that hold or not (bounds.py), detectors beside each other (detectors.py, streams.py).

Steps: photo known, then art arrives; and so on in the order given, as in `edgeear eval`, which also fixes the split.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shift import bounds, video
from benchmarks.shift.detectors import METHODS, Method, Run
from benchmarks.shift.streams import (
    Stream,
    burst_hypervectors,
    bursts,
    drawn,
    joined,
    judged,
    known_system,
    measured,
    ramp,
)
from device.evaluation.data import DataOptions, EvalData, open_encoder, read_domains
from device.provenance import machine, versions
from edgeear.system import System

SHOTS = 20
QUIET, BEFORE, AFTER, RAMP, EPISODES, IMAGES = 2000, 500, 600, 200, 3, 60
VIDEO_SEEDS = 10
TUNING_SEED, TOLERATED = 99, 1e-4
"""A calibrated detector is the least strict with at most this rate of false alarms on 10,000 frames of another seed."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shift", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--order", default="photo,art_painting,cartoon,sketch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--parts", default="false_ood,band,million,detectors,video", help="the others are kept as they are"
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    read = DataOptions(options.data, tuple(options.order.split(",")))
    encoder, _ = open_encoder(read)
    result: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    result |= {
        "machine": machine(),
        "versions": versions() | {"river": _version("river")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"make bench-shift: python -m benchmarks.shift --data PACS --order {options.order} "
        f"--seeds {options.seeds}",
        "seeds": list(range(options.seeds)),
        "encoder": encoder.digest,
    }
    wanted = options.parts.split(",")
    if wanted != ["video"]:
        data = read_domains(read, encoder, lambda *_: None, views=("plain",))
    parts: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("false_ood", lambda: [r for shots in (None, 20) for r in bounds.false_ood(data, shots, options.seeds)]),
        ("band", lambda: bounds.band()),
        ("million", lambda: bounds.million(data, options.seeds)),
        ("detectors", lambda: compared(data, burst_hypervectors(data, encoder, IMAGES, seed=0), options.seeds)),
        ("video", lambda: video.measure(encoder, options.data, VIDEO_SEEDS)),
    )
    for name, run in parts:
        if name in wanted:
            print(name, file=sys.stderr, flush=True)
            result[name] = run()
            options.json.write_text(json.dumps(result, indent=1) + "\n")


def compared(data: EvalData, shaken: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """A row a scenario and detector: means and deviations over seeds, each seed being the mean of the steps. Domains
    are known from `SHOTS` images a class: there the p-values are least sharp."""
    figures: dict[tuple[Any, ...], list[dict[str, float]]] = defaultdict(list)
    for step in range(1, len(data.domains)):
        pools = partial(_pools, data, shaken, step)
        runs = list(_tuned(*pools(TUNING_SEED)))
        for seed in range(seeds):
            print(f"detectors: step {step}, seed {seed}", file=sys.stderr, flush=True)
            system, parts = pools(seed)
            for scenario, stream, began in _scenarios(parts, np.random.default_rng([seed, step])):
                for label, run in runs:
                    figures[scenario, label, seed].append(measured(stream, run(stream, system), began))
    rows: dict[tuple[Any, ...], list[dict[str, float]]] = defaultdict(list)
    for (scenario, label, _), steps in figures.items():
        rows[scenario, label].append(_mean(steps))
    return [{"scenario": c, "detector": d, "shots": SHOTS} | _spread(seen) for (c, d), seen in rows.items()]


def _pools(data: EvalData, shaken: dict[str, Any], step: int, seed: int) -> tuple[System, Any]:
    """What is known after `step` domains, and the frames of known and foreign images, single and shaken."""
    old, new = data.domains[:step], data.domains[step]
    system = known_system(data, [d.name for d in old], SHOTS, seed)
    quiet = joined(*(judged(system, d.test_h, foreign=False) for d in old))
    foreign = judged(system, np.concatenate([new.test_h, new.train_h]), foreign=True)
    shaken_quiet = joined(*(judged(system, shaken[d.name], foreign=False) for d in old))
    return system, (quiet, foreign, shaken_quiet, judged(system, shaken[new.name], foreign=True))


def _tuned(system: System, parts: tuple[Stream, ...]) -> Iterable[tuple[str, Run]]:
    """Every method at its default, and at the strictness that a quiet stream of independent frames asks for."""
    stream = drawn(parts[0], 10_000, np.random.default_rng(TUNING_SEED))
    for method in METHODS:
        yield method.name, method.run(method.strictness[method.default])
        if len(method.strictness) > 1:
            yield f"{method.name}, calibrated", method.run(_strict_enough(method, stream, system))


def _strict_enough(method: Method, stream: Stream, system: System) -> float:
    for strictness in method.strictness:
        for seen, _ in enumerate(method.run(strictness)(stream, system), start=1):
            if seen > TOLERATED * len(stream):
                break
        else:
            return strictness
    return method.strictness[-1]


def _scenarios(parts: tuple[Stream, ...], rng: np.random.Generator) -> Iterable[tuple[str, Stream, int | None]]:
    """Name, stream, and for a ramp the frame at which it begins: from there nothing counts as a false alarm."""
    quiet, foreign, shaken_quiet, shaken_foreign = parts
    yield "quiet", drawn(quiet, QUIET, rng), None
    yield "quiet in bursts", bursts(shaken_quiet, QUIET, rng), None
    yield "abrupt", joined(drawn(quiet, BEFORE, rng), drawn(foreign, AFTER, rng)), None
    mixed = ramp(quiet, foreign, RAMP, rng)
    yield "gradual", joined(drawn(quiet, BEFORE, rng), mixed, drawn(foreign, AFTER - RAMP, rng)), BEFORE
    yield "recurring", joined(*(drawn(s, 200, rng) for _ in range(EPISODES) for s in (quiet, foreign))), None
    yield "abrupt in bursts", joined(bursts(shaken_quiet, BEFORE, rng), bursts(shaken_foreign, 4 * AFTER, rng)), None


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {k: float(np.nanmean(v)) if not np.isnan(v).all() else float("nan") for k, v in _columns(rows).items()}


def _spread(rows: list[dict[str, float]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in _columns(rows).items():
        seen = v[~np.isnan(v)]
        out[k] = float(seen.mean()) if len(seen) else None
        out[f"{k}_deviation"] = float(seen.std(ddof=1)) if len(seen) > 1 else None
    return out


def _columns(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {k: np.array([r[k] for r in rows]) for k in rows[0]}


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
