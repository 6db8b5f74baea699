"""Labels for samples that nobody labelled: scores of imperfect teachers, spread over the samples' own neighbourhoods.

Rules of this file:

1. Samples near each other are of one class more often than a teacher from another domain is right about either, so the
   teacher's scores only seed label propagation (Zhou et al., "Learning with Local and Global Consistency", NIPS 2003).
2. A shifted teacher prefers a few classes. Class shares are moved part of the way to equal ones (one damped Sinkhorn
   step), not all the way, because a stream may show some classes more often.
3. Plain arrays in, plain arrays out; no randomness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptors.temperature import probabilities

F32 = NDArray[np.float32]
_TINY = 1e-9


@dataclass(frozen=True)
class SelfTrainPolicy:
    """`neighbours` of a sample in the graph; `spread` in [0, 1): how much of its label a sample takes from them;
    `steps` of propagation; `temperature` of the softmax over standardised scores; `balance` in [0, 1]: how far class
    shares are moved to equal ones."""

    neighbours: int = 15
    spread: float = 0.9
    steps: int = 40
    temperature: float = 0.6
    balance: float = 0.5


def standardised(scores: NDArray[np.floating]) -> F32:
    """Scores `(samples, classes)` with mean 0 in every class and deviation 1 over all: comparable between teachers."""
    centred = scores - scores.mean(axis=0)
    out: F32 = (centred / max(float(centred.std()), _TINY)).astype(np.float32)
    return out


def neighbour_graph(x: F32, neighbours: int) -> F32:
    """Symmetric normalised affinity `(samples, samples)` of codes `x (samples, width)`: the cubed cosine of every
    sample to its nearest ones after centring, zero elsewhere. At most a quarter of the samples are neighbours."""
    n = len(x)
    unit = x - x.mean(axis=0)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), _TINY)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    k = max(1, min(neighbours, n // 4))
    nearest = np.argpartition(-cosine, k, axis=1)[:, :k]
    graph = np.zeros_like(cosine)
    rows = np.arange(n)[:, None]
    graph[rows, nearest] = np.maximum(cosine[rows, nearest], 0) ** 3
    graph = np.maximum(graph, graph.T)
    degree = 1 / np.sqrt(graph.sum(axis=1) + _TINY)
    out: F32 = (graph * degree[:, None] * degree).astype(np.float32)
    return out


def propagate(graph: F32, shares: F32, policy: SelfTrainPolicy) -> F32:
    """Class shares `(samples, classes)` after `steps` of taking `spread` of them from the neighbours."""
    spread, out = np.float32(policy.spread), shares
    for _ in range(policy.steps):
        out = spread * (graph @ out) + (1 - spread) * shares
    return out


def balanced(shares: F32, strength: float) -> F32:
    """Shares moved towards equal classes: each class over its mean share to the power `strength`, rows renormalised."""
    shares = np.maximum(shares, _TINY)
    shares = shares / shares.mean(axis=0) ** strength
    out: F32 = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    return out


def self_label(graph: F32, scores: F32, policy: SelfTrainPolicy) -> NDArray[np.int64]:
    """Classes `(samples,)` for standardised scores `(samples, classes)`: balanced, propagated, balanced again."""
    seeds = balanced(probabilities(scores, policy.temperature), policy.balance)
    spread = balanced(propagate(graph, seeds, policy), policy.balance)
    labels: NDArray[np.int64] = spread.argmax(axis=1).astype(np.int64)
    return labels


def class_diversity(labels: NDArray[np.int64], classes: int) -> float:
    """Exponential of the entropy of the label counts over the number of classes: 1 when all are equally frequent."""
    share = np.bincount(labels, minlength=classes) / max(len(labels), 1)
    return float(np.exp(-(share * np.log(share + _TINY)).sum()) / classes)


def chance_corrected(agreement: float, classes: int) -> float:
    """Agreement in [0, 1] on a scale where guessing among equally frequent classes is 0 and identity is 1."""
    chance = 1 / max(classes, 2)
    return (agreement - chance) / (1 - chance)
