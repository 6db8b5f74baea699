"""`edgeear bench nas`: compare every training-free proxy, and the search, with the accuracies of trained heads.

Rules of this file:

1. Each head is trained once (nas_table.py). Proxies and search see training images only.
2. The combination of proxies is learned from the tables of other domains, never from the one that it is tested on.
3. Figures are means over the seeds of the sample and of the random heads.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptors import transfer
from adaptors.cost import cost
from adaptors.progress import Progress
from adaptors.proxies import PROXIES, Probe, Sample
from adaptors.search import COMBINED, DEFAULT_PROXY, Scored, SearchPolicy, balanced, cheap_first, search, single_thread
from adaptors.search_space import Budget, SearchSpace
from adaptors.spec import HeadSpec
from adaptors.transfer import Ranker
from device.evaluation.nas_table import (
    CHEAP,
    F64,
    FULL,
    Images,
    Regime,
    Truth,
    draw,
    examples,
    measure,
    trained_accuracy,
)

TRAINING_SEEDS = (0, 1)
TIE = 0.003
"""Accuracy, as a fraction of one, that a cheap head may lose by the search's estimate. It is absolute;
`adaptors.search.PREFERENCES` are relative."""
QUICK = SearchPolicy(filtered=2000, specs=150, reference=75, finalists=4, closer=700)
"""The search whose time is compared with one training."""


def make_truth(
    domain: str,
    images: Images,
    encoder: str,
    space: SearchSpace,
    budget: Budget,
    cache: Path,
    *,
    heads: int,
    seeds: Sequence[int],
    regime: Regime = CHEAP,
    samples: int = SearchPolicy.samples,
    on_progress: Progress = lambda *_: None,
) -> Truth:
    """Train `heads` specifications drawn for the domain, and score them by every proxy, once for each seed."""
    specs = draw(space, budget, domain, heads)
    accuracy = measure(specs, images, regime, TRAINING_SEEDS, cache, on_progress)
    scores, _ = score(specs, images, samples, seeds, on_progress)
    return Truth(domain, specs, accuracy, scores, regime, encoder, images.classes, len(images.test_labels))


def score(
    specs: Sequence[HeadSpec], images: Images, samples: int, seeds: Sequence[int], on_progress: Progress
) -> tuple[dict[str, F64], dict[str, float]]:
    """Scores `(seeds, specs)` by every proxy, NaN where it is undefined, and the seconds of each for one seed."""
    scores = {name: np.full((len(seeds), len(specs)), np.nan) for name in PROXIES}
    seconds = dict.fromkeys(PROXIES, 0.0)
    for k, seed in enumerate(seeds):
        index = balanced(images.labels, samples, seed)
        taps = {t: torch.from_numpy(np.ascontiguousarray(x[index])) for t, x in images.views[0].items()}
        labels = torch.from_numpy(images.labels[index])
        for done, (name, proxy) in enumerate(PROXIES.items()):
            sample = Sample(taps, labels, images.classes, seed)
            begun = time.perf_counter()
            with single_thread():
                for i, spec in enumerate(specs):
                    value = proxy(Probe(spec, cost(spec, images.shapes, images.classes), sample))
                    scores[name][k, i] = np.nan if value is None else value
            seconds[name] += (time.perf_counter() - begun) / len(seeds)
            on_progress(f"proxies, seed {seed}", done + 1, len(PROXIES))
    return scores, seconds


def bench_nas(
    truth: Truth,
    others: Sequence[Truth],
    images: Images,
    space: SearchSpace,
    budget: Budget,
    cache: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    specs: int = 2000,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """The JSON of `edgeear bench nas`. The combination of proxies is learned from the tables `others`; without any, the
    built-in one is used, which may have seen this domain."""
    ranker = transfer.fit([e for o in others for e in examples(o)]) if others else transfer.built_in()
    scores, seconds = score(truth.specs, images, SearchPolicy.samples, seeds, on_progress)
    columns = [{name: rows[k] for name, rows in scores.items()} for k in range(len(seeds))]
    combined = np.stack([ranker.score(truth.specs, own, own) for own in columns])
    scores = {COMBINED: combined, **scores, "family": np.tile(_family(ranker, truth.specs), (len(seeds), 1))}
    seconds = {COMBINED: sum(seconds[n] for n in transfer.INPUTS), **seconds, "family": 0.0}
    searches: list[dict[str, Any]] = []
    for done, seed in enumerate(seeds):
        on_progress("searches", done, len(seeds))
        searches += _searches(SearchPolicy(seed=seed, specs=specs, ranker=ranker), truth, images, space, budget, cache)
    on_progress("searches", len(seeds), len(seeds))
    best_of_8 = np.random.default_rng(seeds[0]).choice(truth.mean, (1000, min(8, len(truth.mean)))).max(axis=1).mean()
    timed = [s for s in searches if s["search"] == "default"]
    return {
        "heads": len(truth.specs),
        "default_proxy": DEFAULT_PROXY,
        "learned_on": list(ranker.learned_on),
        "proxies": [_figures(name, scores[name], seconds[name], truth.mean) for name in scores],
        "best_accuracy": float(truth.mean.max()),
        "mean_accuracy": float(truth.mean.mean()),
        "random_of_8_accuracy": float(best_of_8),
        "specs_per_s": float(np.mean([s["specs_scored"] / s["seconds"] for s in timed])),
        "searches": searches,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seeds": list(seeds),
        "regime": asdict(truth.regime),
        "test_images": truth.test_images,
    }


def _searches(
    policy: SearchPolicy, truth: Truth, images: Images, space: SearchSpace, budget: Budget, cache: Path
) -> list[dict[str, Any]]:
    """Several searches of one seed and the cheap heads of the default one, each with the accuracy of its choice."""
    plain = images.views[0]
    rows = []

    def row(name: str, pick: Scored, seconds: float, filtered: int, scored: int) -> None:
        accuracy = measure([pick.spec], images, truth.regime, TRAINING_SEEDS, cache).mean()
        rows.append(
            {
                "search": name,
                "seed": policy.seed,
                "accuracy": float(accuracy),
                "estimate": pick.score,
                "seconds": seconds,
                "specs_filtered": filtered,
                "specs_scored": scored,
                "spec": pick.spec.to_dict(),
                "cost": asdict(pick.cost),
            }
        )

    for name, own in {
        "default": policy,
        "quick": replace(QUICK, seed=policy.seed, ranker=policy.ranker),
        "halving": replace(policy, halving=8),
    }.items():
        begun = time.perf_counter()
        found = search(space, budget, plain, images.labels, own)
        seconds = time.perf_counter() - begun
        row(name, found.best, seconds, own.filtered, len(found.ranking))
        if name == "default":
            for price in ("latency_ms", "bytes"):
                thrifty = cheap_first(found.ranking, TIE / float(found.best.score or 1.0), price)
                row(f"least {price}", thrifty[0], seconds, own.filtered, len(found.ranking))
    return rows


def fidelity(domain: str, truth: Truth, full: Images, cache: Path, heads: int, on_progress: Progress) -> dict[str, Any]:
    """Kendall's tau between the table and full training of its first heads, which shows whether the regime keeps the
    ranking; and the seconds of one full training."""
    from scipy.stats import kendalltau

    specs = truth.specs[:heads]
    accuracy = measure(specs, full, FULL, TRAINING_SEEDS, cache, on_progress).mean(axis=1)
    begun = time.perf_counter()
    for spec in specs[:4]:  # one of each operator, because families are drawn in turn
        trained_accuracy(spec, full, FULL, 2)
    return {
        "domain": domain,
        "heads": len(specs),
        "kendall_tau": float(kendalltau(truth.mean[:heads], accuracy)[0]),
        "full_training_s": (time.perf_counter() - begun) / 4,
        "full": asdict(FULL),
        "accuracy": accuracy.tolist(),
    }


def _family(ranker: Ranker, specs: Sequence[HeadSpec]) -> F64:
    """A control: the combination's score from a head's family alone."""
    return np.array([ranker.weights.get(transfer.family(s), 0.0) for s in specs])


def _figures(name: str, scores: F64, seconds: float, accuracy: F64) -> dict[str, Any]:
    """Rank correlations over the heads where the proxy is defined, and the accuracy of its pick; means over seeds."""
    from scipy.stats import kendalltau, spearmanr

    taus, rhos, picks = [], [], []
    for row in scores:
        defined = np.isfinite(row)
        if defined.sum() > 2 and np.ptp(row[defined]) > 0:
            taus.append(kendalltau(row[defined], accuracy[defined])[0])
            rhos.append(spearmanr(row[defined], accuracy[defined])[0])
            picks.append(accuracy[int(np.nanargmax(row))])
    return {
        "name": name,
        "defined": int(np.isfinite(scores).sum(axis=1).mean()),
        "kendall_tau": float(np.mean(taus)) if taus else None,
        "spearman": float(np.mean(rhos)) if rhos else None,
        "ms_per_spec": 1e3 * seconds / scores.shape[1],
        "picked_accuracy": float(np.mean(picks)) if picks else None,
    }
