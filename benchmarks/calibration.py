"""How far probabilities are from frequencies, before and after the temperature: expected calibration error on test
images.

    python benchmarks/calibration.py --data DIR --order a,b [--shots N] [--seeds N] --json OUT

1. Domains are learned one after another by the Python interface's own policy; every test image is answered through the
   router. An image that no head answers is left out.
2. The error is that of the first class: 15 bins of equal width, mean of |confidence - accuracy| weighted by the images
   in a bin (Guo et al., 2017). "scores" takes softmax of a head's raw scores, "default" the temperature of heads
   without a record, "fitted" the head's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from adaptors.temperature import probabilities
from device.api import default_policy
from device.encoder.engine import OrtEngine
from device.evaluation.data import DataOptions, open_encoder, read_domains
from device.files import write_whole
from device.provenance import machine, versions
from edgeear.flow import Prediction, adapt, infer_features
from edgeear.shift import ShiftState
from edgeear.system import TEMPERATURE, Candidate, System

BINS = 15


def error(confidence: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    """Expected calibration error, fraction of one, of `confidence (n,)` in [0, 1] and `right (n,)`."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    parts = [bins == k for k in range(BINS) if (bins == k).any()]
    return float(sum(abs(confidence[p].mean() - right[p].mean()) * p.mean() for p in parts))


def confidence(answer: Prediction, temperature: float | None) -> float:
    """Of the first class; None takes the answer's own temperature. Mixtures have none and stay as they are."""
    if temperature is None or answer.temperature is None:
        return max(answer.probabilities.values())
    return float(probabilities(answer.scores[None], temperature).max())


def measure(options: DataOptions) -> dict[str, Any]:
    encoder, _ = open_encoder(options)
    data = read_domains(options, encoder, lambda *_: None)
    system, engine = System(encoder.digest, data.space), OrtEngine(encoder)
    for domain in data.domains:
        policy = default_policy(options.seed)
        outcome = adapt(system, domain.samples(data.classes), policy, options.seed)
        assert isinstance(outcome, Candidate), outcome
        system = outcome.system
    found, right = [], []
    for domain in data.domains:
        for i, label in enumerate(domain.test_labels):
            taps = {t: domain.test[t][i : i + 1] for t in system.wanted_taps}
            answer = infer_features(system, engine, ShiftState(), taps)[0]
            if answer.label is not None:
                found.append(answer)
                right.append(answer.label == data.classes[label])
    truth = np.array(right, float)
    errors = {
        name: error(np.array([confidence(a, t) for a in found]), truth)
        for name, t in (("scores", 1.0), ("default", TEMPERATURE[True]), ("fitted", None))
    }
    temperatures = {d.name: d.temperature for d in system.domains}
    return {"seed": options.seed, "accuracy": float(truth.mean()), "error": errors, "temperatures": temperatures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--order", required=True)
    parser.add_argument("--shots", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    order = tuple(given.order.split(","))
    rows = []
    for seed in range(given.seeds):
        rows.append(measure(DataOptions(given.data, order, given.shots, seed)))
        print(rows[-1], file=sys.stderr, flush=True)
    means = {name: float(np.mean([row["error"][name] for row in rows])) for name in rows[0]["error"]}
    result = {"shots": given.shots, "mean_error": means, "rows": rows, "machine": machine(), "versions": versions()}
    write_whole(given.json, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
