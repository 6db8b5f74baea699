"""`edgeear bench nas`: do training-free proxies find good heads? Random heads are trained fully, once, and kept.

The table of trained accuracies is cached under the digest of the encoder, the data and the specification, so that
further proxies are scored against it in seconds. Accuracy is measured on the test split, by the fp32 or int8 head as
its specification says.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptors.latency import DEFAULT, LatencyModel
from adaptors.modules import Head
from adaptors.proxies import DEFAULT_PROXY, PROXIES, Probe
from adaptors.search import balanced, single_thread
from adaptors.search_space import Budget, SearchSpace
from adaptors.spec import Cost, HeadSpec
from adaptors.train import TrainPolicy, train
from device.paths import write_whole

F32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Table:
    """Features and labels of one domain: training views and the test split; `identity` names encoder and files."""

    views: Sequence[Mapping[str, F32]]
    labels: NDArray[np.int64]
    test: Mapping[str, F32]
    test_labels: NDArray[np.int64]
    classes: int
    identity: str


def bench_nas(
    table: Table,
    budget: Budget,
    cache: Path,
    *,
    heads: int = 120,
    seed: int = 0,
    samples: int = 210,
    latency: LatencyModel = DEFAULT,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """The JSON of DESIGN section 7 for `heads` random specifications within the budget."""
    shapes = {t: tuple(x.shape[1:]) for t, x in table.views[0].items()}
    space = SearchSpace(shapes, table.classes, latency)
    specs = space.sample(heads, budget, seed)
    accuracies = np.array(_trained(specs, shapes, table, cache, seed, on_progress))
    scores, seconds = _scores(specs, table, samples, seed, on_progress)
    best_of_8 = np.random.default_rng(seed).choice(accuracies, (1000, min(8, len(accuracies)))).max(axis=1).mean()
    return {
        "heads": len(specs),
        "default_proxy": DEFAULT_PROXY,
        "proxies": [_figures(name, scores[name], seconds[name], accuracies) for name in PROXIES],
        "best_accuracy": float(accuracies.max()),
        "mean_accuracy": float(accuracies.mean()),
        "random_of_8_accuracy": float(best_of_8),
        "specs_per_s": len(specs) / max(seconds[DEFAULT_PROXY], 1e-9),
        "seed": seed,
        "table": [
            {"spec": spec.to_dict(), "cost": asdict(price), "accuracy": float(a)}
            for (spec, price), a in zip(specs, accuracies, strict=True)
        ],
    }


def _trained(
    specs: Sequence[tuple[HeadSpec, Cost]],
    shapes: dict[str, tuple[int, ...]],
    table: Table,
    cache: Path,
    seed: int,
    on_progress: Progress,
) -> list[float]:
    """Test accuracy of every specification, trained once and then read from the cache."""
    out = []
    for i, (spec, _) in enumerate(specs):
        word = f"{table.identity}/{seed}/{json.dumps(spec.to_dict(), sort_keys=True)}"
        place = cache / f"{hashlib.sha256(word.encode()).hexdigest()}.json"
        if not place.exists():
            cache.mkdir(parents=True, exist_ok=True)
            write_whole(place, json.dumps(_accuracy(spec, shapes, table, seed)).encode())
        out.append(float(json.loads(place.read_text())))
        on_progress("train", i + 1, len(specs))
    return out


def _accuracy(spec: HeadSpec, shapes: dict[str, tuple[int, ...]], table: Table, seed: int) -> float:
    fitted = train(spec, shapes, table.views, table.labels, table.classes, TrainPolicy(seed=seed))
    head = Head(spec, shapes, table.classes, seed)
    head.load(fitted.weights)
    with torch.no_grad():
        scores = head({t: torch.from_numpy(np.ascontiguousarray(table.test[t])) for t in spec.inputs})
    return float((scores.argmax(1).numpy() == table.test_labels).mean())


def _scores(
    specs: Sequence[tuple[HeadSpec, Cost]], table: Table, samples: int, seed: int, on_progress: Progress
) -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
    """Per proxy: the scores (NaN where undefined) and the seconds that scoring all specifications took."""
    index = balanced(table.labels, samples, seed)
    taps = {t: torch.from_numpy(np.ascontiguousarray(x[index])) for t, x in table.views[0].items()}
    labels = torch.from_numpy(table.labels[index])
    scores: dict[str, NDArray[np.float64]] = {}
    seconds: dict[str, float] = {}
    with single_thread():
        for done, (name, proxy) in enumerate(PROXIES.items()):
            begun = time.perf_counter()
            values = [proxy(Probe(s, c, taps, labels, table.classes, seed)) for s, c in specs]
            seconds[name] = time.perf_counter() - begun
            scores[name] = np.array([np.nan if v is None else v for v in values])
            on_progress(f"proxy {name}", done + 1, len(PROXIES))
    return scores, seconds


def _figures(name: str, scores: NDArray[np.float64], seconds: float, accuracies: NDArray[np.float64]) -> dict[str, Any]:
    """Rank correlations over the heads where the proxy is defined, and the accuracy of its pick."""
    from scipy.stats import kendalltau, spearmanr

    defined = np.isfinite(scores)
    enough = defined.sum() > 2 and np.ptp(scores[defined]) > 0
    return {
        "name": name,
        "defined": int(defined.sum()),
        "kendall_tau": float(kendalltau(scores[defined], accuracies[defined])[0]) if enough else None,
        "spearman": float(spearmanr(scores[defined], accuracies[defined])[0]) if enough else None,
        "ms_per_spec": 1e3 * seconds / len(scores),
        "picked_accuracy": float(accuracies[np.nanargmax(scores)]) if defined.any() else None,
    }
