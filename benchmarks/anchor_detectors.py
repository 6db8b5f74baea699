"""Published out-of-distribution scores on given features, one short function each: larger = more novel.

Rules of this file:

1. Every function here is our own re-implementation of the named paper's formula, fitted on the known domain alone.
2. `x (samples, channels)` are the last pooled features, `head` a softmax regression on them; a score takes `Inputs`.
3. Covariances are shrunk as in our own detector, because 1280 channels meet some thousand images; no paper fixes that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.data import Inputs
from benchmarks.ours import learn_domain
from device.evaluation.data import I64
from device.evaluation.ood import NEIGHBOURS, mahalanobis, nearest_mean, nearest_neighbours, unit
from edgeear.types import F32

Score = Callable[[F32], F32]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A detector of one domain: `score` of inputs, the bytes that it stores, whether images are in them."""

    score: Callable[[Inputs], F32]
    bytes: int
    exemplars: bool = False


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Softmax regression: `logits = x @ weight.T + bias`, `weight (classes, channels)`."""

    weight: F32
    bias: F32

    def logits(self, x: F32) -> F32:
        out: F32 = x @ self.weight.T + self.bias
        return out


def linear_head(x: F32, labels: I64) -> LinearHead:
    """L2-regularised softmax regression on the features as they are, up to one common scale."""
    from sklearn.linear_model import LogisticRegression

    scale = float(np.sqrt(np.square(x).mean()))
    fitted = LogisticRegression(C=0.1, max_iter=500, tol=1e-2).fit(x / scale, labels)
    weight, bias = fitted.coef_ / scale, fitted.intercept_
    if len(weight) == 1:  # two classes have one row, of log-odds
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return LinearHead(weight.astype(np.float32), bias.astype(np.float32))


def log_sum(logits: F32) -> F32:
    top = logits.max(axis=1, keepdims=True)
    out: F32 = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return out


def msp(head: LinearHead) -> Score:
    """1 - max softmax. Hendrycks & Gimpel, ICLR 2017."""
    return lambda y: 1 - np.exp(head.logits(y).max(axis=1) - log_sum(head.logits(y)))


def energy(head: LinearHead) -> Score:
    """-log sum exp(logits). Liu et al., NeurIPS 2020."""
    return lambda y: -log_sum(head.logits(y))


def react(head: LinearHead, x: F32, percentile: float = 90) -> Score:
    """Energy of features clipped at the training features' percentile. Sun et al., NeurIPS 2021."""
    limit = np.float32(np.percentile(x, percentile))
    return lambda y: -log_sum(head.logits(np.minimum(y, limit)))


def ash(head: LinearHead, percentile: float = 65) -> Score:
    """ASH-S: energy after the smallest features are set to 0 and the rest is scaled by exp(s1 / s2), the sums before
    and after. Djurisic et al., ICLR 2023."""

    def score(y: F32) -> F32:
        kept = np.where(y >= np.percentile(y, percentile, axis=1, keepdims=True), y, np.float32(0))
        ratio = y.sum(axis=1, keepdims=True) / np.maximum(kept.sum(axis=1, keepdims=True), 1e-6)
        out: F32 = -log_sum(head.logits((kept * np.exp(np.clip(ratio, 0, 10))).astype(np.float32)))
        return out

    return score


def she(head: LinearHead, x: F32, labels: I64) -> Score:
    """-<y, mean training feature of the predicted class>, of correctly classified images. Zhang et al., ICLR 2023."""
    right = head.logits(x).argmax(axis=1) == labels
    means = []
    for c in range(len(head.bias)):
        own = x[right & (labels == c)]
        means.append((own if len(own) else x[labels == c]).mean(axis=0))
    stored = np.stack(means)
    return lambda y: -np.einsum("nd,nd->n", y, stored[head.logits(y).argmax(axis=1)])


def vim(head: LinearHead, x: F32) -> Score:
    """alpha * |residual outside the principal subspace| - log sum exp(logits). Wang et al., CVPR 2022."""
    width = x.shape[1]
    dims = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
    origin = -np.linalg.pinv(head.weight) @ head.bias
    centred = x - origin
    _, vectors = np.linalg.eigh(centred.T @ centred)
    rest = vectors[:, : width - dims].astype(np.float32)
    alpha = head.logits(x).max(axis=1).mean() / np.linalg.norm(centred @ rest, axis=1).mean()
    return lambda y: alpha * np.linalg.norm((y - origin) @ rest, axis=1) - log_sum(head.logits(y))


def class_mahalanobis(x: F32, labels: I64) -> Score:
    """Squared Mahalanobis distance from the nearest class mean, covariance shared by all. Lee et al., NeurIPS 2018."""
    means = np.stack([x[labels == c].mean(axis=0) for c in np.unique(labels)])
    white = _whitener(x - means[np.unique(labels, return_inverse=True)[1]])
    centres = means @ white

    def score(y: F32) -> F32:
        z = y @ white
        nearest: F32 = np.stack([np.square(z - c).sum(axis=1) for c in centres]).min(axis=0)
        return nearest

    return score


def relative_mahalanobis(conditional: Score, x: F32) -> Score:
    """Class-conditional minus background Mahalanobis distance. Ren et al., 2021 (arXiv 2106.09022)."""
    background = mahalanobis(x)
    return lambda y: conditional(y) - background(y)


def _whitener(centred: F32) -> F32:
    n, width = centred.shape
    ratio = 0.02 + 0.3 * width / (width + n)
    covariance = (centred.T @ centred).astype(np.float64) / n
    level = max(float(np.trace(covariance)) / width, 1e-12)
    lower = np.linalg.cholesky((1 - ratio) * covariance + ratio * level * np.eye(width))
    return np.linalg.inv(lower).T.astype(np.float32)


def fit_all(train: Inputs, labels: I64, seed: int) -> dict[str, Fitted]:
    """Every detector, fitted on the training images of one domain; labels of any numbering."""
    x, n = train.last, len(train)
    names, labels = np.unique(labels, return_inverse=True)
    k, width = len(names), x.shape[1]
    head, square, means, linear = linear_head(x, labels), 4 * width * width, 4 * k * width, 4 * k * (width + 1)
    dimensions, joined = train.flat.shape[1], sum(t.channels for t in train.space.taps)

    def last(score: Score, stored: int, exemplars: bool = False) -> Fitted:
        return Fitted(lambda y: score(y.last), stored, exemplars)

    def sphere(score: Score, stored: int) -> Fitted:
        return Fitted(lambda y: score(unit(y.last)), stored)

    plain, round_ = class_mahalanobis(x, labels), class_mahalanobis(unit(x), labels)
    ours = learn_domain(train.h, labels, seed)
    bundled, side_by_side, single = (nearest_mean(z, labels) for z in (train.flat, train.taps, unit(x)))
    return {
        "edgeear": Fitted(lambda y: ours.novelty(y.h), ours.bytes),
        "HDFF": Fitted(lambda y: bundled(y.flat), 4 * k * dimensions),
        "concatenation": Fitted(lambda y: side_by_side(y.taps), 4 * k * joined),
        "cosine NCM": sphere(single, means),
        "KNN": last(nearest_neighbours(x, NEIGHBOURS), 4 * n * width, True),
        "Mahalanobis": last(plain, means + square),
        "MDS++": sphere(round_, means + square),
        "RMD": last(relative_mahalanobis(plain, x), means + 2 * square),
        "RMD++": sphere(relative_mahalanobis(round_, unit(x)), means + 2 * square),
        "ViM": last(vim(head, x), linear + 4 * width * (width - min(512, width // 2))),
        "SHE": last(she(head, x, labels), means + linear),
        "MSP": last(msp(head), linear),
        "energy": last(energy(head), linear),
        "ReAct": last(react(head, x), linear),
        "ASH-S": last(ash(head), linear),
    }


SOURCES = {
    "edgeear": "this project",
    "HDFF": "Wilson et al., WACV 2023, without its centring of maps, structured projections",
    "concatenation": "control: all taps side by side, each at length one, cosine to the nearest class mean",
    "cosine NCM": "cosine to the nearest class mean of the last tap",
    "KNN": f"Sun et al., ICML 2022, k = {NEIGHBOURS}",
    "Mahalanobis": "Lee et al., NeurIPS 2018, class means, shared covariance",
    "MDS++": "Mueller & Hein, 2025: Mahalanobis on L2-normalised features",
    "RMD": "Ren et al., 2021",
    "RMD++": "Mueller & Hein, 2025: RMD on L2-normalised features",
    "ViM": "Wang et al., CVPR 2022",
    "SHE": "Zhang et al., ICLR 2023, inner product",
    "MSP": "Hendrycks & Gimpel, ICLR 2017",
    "energy": "Liu et al., NeurIPS 2020",
    "ReAct": "Sun et al., NeurIPS 2021, 90th percentile",
    "ASH-S": "Djurisic et al., ICLR 2023, 65th percentile, on the pooled features",
}
