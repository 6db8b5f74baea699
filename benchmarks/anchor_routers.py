"""Which domain an input belongs to: published routers and controls, our own re-implementations, one function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.anchor_learners import FineTuning
from benchmarks.data import Inputs, Split
from benchmarks.ours import learn_domain, route_by
from device.evaluation.data import I64
from device.evaluation.ood import unit
from edgeear.types import F32

CENTRES = 5


@dataclass(frozen=True, eq=False)
class FittedRouter:
    """`route` of inputs `(samples,)`, bytes stored for one domain, whether it is trained on all domains at once."""

    route: Callable[[Inputs], I64]
    bytes: int
    joint: bool = False


def k_means(train: Sequence[F32], seed: int, centres: int = CENTRES) -> tuple[F32, I64]:
    """Centres `(domains * centres, channels)` of k-means in each domain, and their domains."""
    from sklearn.cluster import KMeans

    found = [KMeans(centres, n_init=2, max_iter=50, random_state=seed).fit(x).cluster_centers_ for x in train]
    return np.concatenate(found).astype(np.float32), np.repeat(np.arange(len(found)), centres)


def nearest(centres: F32, owner: I64) -> Callable[[F32], I64]:
    """Owner of the nearest centre by Euclidean distance."""
    half = 0.5 * np.square(centres).sum(axis=1)

    def route(x: F32) -> I64:
        found: I64 = owner[(x @ centres.T - half).argmax(axis=1)]
        return found

    return route


def fit_all(domains: Sequence[Split], seed: int) -> dict[str, FittedRouter]:
    """Every router of the training images of all domains; the routers not called joint see one domain at a time."""
    trains, width = [d.train for d in domains], domains[0].train.last.shape[1]
    joined = trains[0].taps.shape[1]
    labels = np.repeat(np.arange(len(trains)), [len(t) for t in trains])
    memories = [learn_domain(d.train.h, d.train_labels, seed) for d in domains]
    ours = route_by([m.memory for m in memories])
    last = nearest(*k_means([t.last for t in trains], seed))
    taps = nearest(*k_means([t.taps for t in trains], seed))
    mean = unit(np.stack([t.taps.mean(axis=0) for t in trains]))
    softmax = FineTuning(len(trains), seed)
    softmax.learn(np.concatenate([t.taps for t in trains]), labels)
    return {
        "edgeear": FittedRouter(lambda y: ours(y.h), max(m.bytes for m in memories)),
        "k-means-5, last tap": FittedRouter(lambda y: last(y.last), 4 * CENTRES * width),
        "k-means-5, all taps": FittedRouter(lambda y: taps(y.taps), 4 * CENTRES * joined),
        "domain prototype": FittedRouter(lambda y: (y.taps @ mean.T).argmax(axis=1), 4 * joined),
        "domain classifier": FittedRouter(lambda y: softmax.predict(y.taps), 4 * joined, joint=True),
    }


SOURCES = {
    "edgeear": "this project",
    "k-means-5, last tap": "Wang et al. (S-Prompts), NeurIPS 2022: nearest of 5 centres a domain",
    "k-means-5, all taps": "the same on all taps, each at length one",
    "domain prototype": "cosine to the mean of each domain, all taps",
    "domain classifier": "softmax regression on all taps of all domains at once, which keeps all images",
    "oracle": "the true domain",
}
