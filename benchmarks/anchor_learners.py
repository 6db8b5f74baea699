"""Published continual learners on frozen features, beside naive fine-tuning and joint training.

Rules of this file:

1. Every learner here is our own re-implementation of the named paper's rule. All read the same input: all taps side by
   side, each at length one, because ours reads all taps too; FeCAM reads the last tap, whose covariances it can hold.
   Where it does better, the input is standardised by the first step's means and deviations (`Standardised`).
2. `learn(x, labels)` is called once a step and sees that step's samples alone; only joint training keeps them.
3. `bytes` is what a learner keeps to go on learning, float32, halves of symmetric matrices counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from device.evaluation.data import I64
from device.evaluation.ood import unit
from edgeear.types import F32

RANPAC, STRENGTHS = 5000, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Random features of RanPAC (the paper takes 10,000, whose Gram matrix takes 200 MB) and its ridge strengths."""
EXEMPLARS = 20
EPOCHS, BATCH, RATE = 15, 64, 3e-3


class Learner(Protocol):
    """What the protocol needs of a learner."""

    exemplars: bool

    def learn(self, x: F32, labels: I64) -> None: ...

    def predict(self, x: F32) -> I64: ...

    @property
    def bytes(self) -> int: ...


class FineTuning:
    """Softmax regression by Adam on the newest step, from the weights of the last one.

    `kept` features a class are stored and replayed (0: none; None: all, which is joint training from scratch)."""

    def __init__(self, classes: int, seed: int, kept: int | None = 0) -> None:
        self.classes, self.kept, self.rng = classes, kept, np.random.default_rng(seed)
        self.exemplars = kept != 0
        self.weight: F32 | None = None
        self.bias = np.zeros(classes, np.float32)
        self.store: list[tuple[F32, I64]] = []

    def learn(self, x: F32, labels: I64) -> None:
        if self.weight is None or self.kept is None:
            self.weight, self.bias = np.zeros((self.classes, x.shape[1]), np.float32), np.zeros_like(self.bias)
        seen = [*self.store, (x, labels)]
        self._descend(np.concatenate([s for s, _ in seen]), np.concatenate([y for _, y in seen]))
        if self.exemplars:
            self.store.append(self._exemplars(x, labels))

    def _exemplars(self, x: F32, labels: I64) -> tuple[F32, I64]:
        if self.kept is None:
            return x, labels
        picked = [self.rng.permutation(np.flatnonzero(labels == c))[: self.kept] for c in np.unique(labels)]
        rows = np.concatenate(picked)
        return x[rows], labels[rows]

    def _descend(self, x: F32, labels: I64) -> None:
        assert self.weight is not None
        parameters = [self.weight, self.bias]
        first, second = [np.zeros_like(p) for p in parameters], [np.zeros_like(p) for p in parameters]
        step = 0
        for _ in range(EPOCHS):
            order = self.rng.permutation(len(x))
            for start in range(0, len(x), BATCH):
                rows, step = order[start : start + BATCH], step + 1
                error = softmax(x[rows] @ self.weight.T + self.bias)
                error[np.arange(len(rows)), labels[rows]] -= 1
                error /= len(rows)
                for p, g, m, v in zip(parameters, (error.T @ x[rows], error.sum(axis=0)), first, second, strict=True):
                    m += 0.1 * (g - m)
                    v += 0.001 * (g * g - v)
                    p -= RATE * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)

    def predict(self, x: F32) -> I64:
        assert self.weight is not None
        found: I64 = (x @ self.weight.T + self.bias).argmax(axis=1).astype(np.int64)
        return found

    @property
    def bytes(self) -> int:
        assert self.weight is not None
        return self.weight.nbytes + self.bias.nbytes + sum(x.nbytes for x, _ in self.store)


class NearestClassMean:
    """Cosine to the running mean of each class (iCaRL's rule without exemplars)."""

    exemplars = False

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.sums: F32 | None = None

    def learn(self, x: F32, labels: I64) -> None:
        new = onehot(labels, self.classes).T @ x
        self.sums = new if self.sums is None else self.sums + new

    def predict(self, x: F32) -> I64:
        assert self.sums is not None
        found: I64 = (x @ unit(self.sums).T).argmax(axis=1).astype(np.int64)
        return found

    @property
    def bytes(self) -> int:
        return 0 if self.sums is None else self.sums.nbytes


class DeepSLDA:
    """Linear discriminant analysis from class means and one covariance, both running (Hayes & Kanan, CVPR 2020
    workshops). The paper's shrinkage of 1e-4 is for a million images; here it is larger, which does better."""

    exemplars = False

    def __init__(self, classes: int, shrinkage: float = 0.1) -> None:
        self.classes, self.shrinkage = classes, shrinkage
        self.counts = np.zeros(classes, np.float32)
        self.sums: F32 = np.zeros((0, 0), np.float32)
        self.moment: F32 = np.zeros((0, 0), np.float32)
        self._solved: tuple[F32, F32] | None = None

    def learn(self, x: F32, labels: I64) -> None:
        targets, first = onehot(labels, self.classes), not self.counts.any()
        self.moment = x.T @ x if first else self.moment + x.T @ x
        self.sums = targets.T @ x if first else self.sums + targets.T @ x
        self.counts += targets.sum(axis=0)
        self._solved = None

    def _solve(self) -> tuple[F32, F32]:
        if self._solved is None:
            means = (self.sums / np.maximum(self.counts, 1)[:, None]).astype(np.float32)
            covariance = (self.moment - self.sums.T @ means) / self.counts.sum()
            level = float(np.trace(covariance)) / len(covariance)
            covariance *= 1 - self.shrinkage
            covariance.flat[:: len(covariance) + 1] += self.shrinkage * level
            weight = solved(covariance, means.T).T
            bias = np.where(self.counts > 0, -0.5 * (weight * means).sum(axis=1), -np.inf)
            self._solved = weight, bias.astype(np.float32)
        return self._solved

    def predict(self, x: F32) -> I64:
        weight, bias = self._solve()
        found: I64 = (x @ weight.T + bias).argmax(axis=1).astype(np.int64)
        return found

    @property
    def bytes(self) -> int:
        return self.sums.nbytes + self.moment.nbytes // 2


class RanPAC:
    """Ridge regression on ReLU of a fixed random projection, Gram matrix and class sums accumulated (McDonnell et al.,
    NeurIPS 2023); the strength has the least squared error on a fifth of the newest step, held out."""

    exemplars = False

    def __init__(self, classes: int, seed: int, width: int = RANPAC) -> None:
        self.classes, self.width, self.rng = classes, width, np.random.default_rng(seed)
        self.projection: F32 | None = None
        self.gram = np.zeros((width, width), np.float32)
        self.sums = np.zeros((width, classes), np.float32)
        self.count, self.strength = 0, 0.0
        self._weight: F32 | None = None

    def _code(self, x: F32) -> F32:
        if self.projection is None:
            self.projection = self.rng.standard_normal((x.shape[1], self.width)).astype(np.float32)
        code: F32 = np.maximum(x @ self.projection, 0)
        return code

    def learn(self, x: F32, labels: I64) -> None:
        code = self._code(x)
        self.strength = self._choose(code, labels)
        self.gram += code.T @ code
        self.sums += code.T @ onehot(labels, self.classes)
        self.count += len(x)
        self._weight = None

    def _choose(self, code: F32, labels: I64) -> float:
        order = self.rng.permutation(len(code))
        held, rows = order[: len(code) // 5], order[len(code) // 5 :]
        fit, targets = code[rows], onehot(labels[rows], self.classes)
        kernel, level = fit @ fit.T, float(np.square(fit).sum()) / len(fit)
        errors = []
        for strength in STRENGTHS:  # the dual system, the smaller one here
            alpha = solved(kernel + strength * level * np.eye(len(fit), dtype=np.float32), targets)
            wrong = (code[held] @ fit.T) @ alpha - onehot(labels[held], self.classes)
            errors.append(float(np.square(wrong).mean()))
        return STRENGTHS[int(np.argmin(errors))]

    def predict(self, x: F32) -> I64:
        if self._weight is None:
            system = self.gram.copy()
            system.flat[:: self.width + 1] += self.strength * float(np.trace(self.gram)) / self.count
            self._weight = solved(system, self.sums)
        found: I64 = (self._code(x) @ self._weight).argmax(axis=1).astype(np.int64)
        return found

    @property
    def bytes(self) -> int:
        """The projection follows from the seed and is not stored."""
        return self.gram.nbytes // 2 + self.sums.nbytes


class FeCAM:
    """Mahalanobis distance to class means with a covariance for each class of each step, features under Tukey's square
    root, covariance shrunk and normalised to a correlation matrix (Goswami et al., NeurIPS 2023)."""

    exemplars = False

    def __init__(self, shrinkage: float = 1.0) -> None:
        self.shrinkage = shrinkage
        self.known: list[tuple[int, F32, F32]] = []

    def learn(self, x: F32, labels: I64) -> None:
        x = np.sqrt(np.maximum(x, 0))
        for c in np.unique(labels):
            own = x[labels == c]
            mean = own.mean(axis=0)
            covariance = np.cov(own.T).astype(np.float32)
            covariance.flat[:: len(mean) + 1] += self.shrinkage * float(np.trace(covariance)) / len(mean)
            deviation = np.sqrt(np.diag(covariance))
            lower = np.linalg.cholesky(covariance / np.outer(deviation, deviation))
            self.known.append((int(c), mean, np.linalg.inv(lower).T.astype(np.float32)))

    def predict(self, x: F32) -> I64:
        x = np.sqrt(np.maximum(x, 0))
        distance = np.stack([np.square((x - mean) @ white).sum(axis=1) for _, mean, white in self.known], axis=1)
        found: I64 = np.array([c for c, _, _ in self.known], np.int64)[distance.argmin(axis=1)]
        return found

    @property
    def bytes(self) -> int:
        return sum(mean.nbytes + white.nbytes // 2 for _, mean, white in self.known)


class JointRidge:
    """Ceiling: ridge regression on the samples of all steps at once."""

    exemplars = True

    def __init__(self, classes: int, strength: float = 1e-2) -> None:
        self.classes, self.strength = classes, strength
        self.gram, self.sums, self.count, self.kept = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32), 0, 0
        self._weight: F32 | None = None

    def learn(self, x: F32, labels: I64) -> None:
        first = self.count == 0
        self.gram = x.T @ x if first else self.gram + x.T @ x
        sums = (x.T @ onehot(labels, self.classes)).astype(np.float32)
        self.sums = sums if first else self.sums + sums
        self.count, self.kept = self.count + len(x), self.kept + x.nbytes
        self._weight = None

    def predict(self, x: F32) -> I64:
        if self._weight is None:
            system = self.gram.copy()
            system.flat[:: len(system) + 1] += self.strength * float(np.trace(system)) / self.count
            self._weight = solved(system, self.sums)
        found: I64 = (x @ self._weight).argmax(axis=1).astype(np.int64)
        return found

    @property
    def bytes(self) -> int:
        return self.kept


def solved(system: F32, right: F32) -> F32:
    """`system @ x = right` for a positive definite system, in float64: weak ridges are near singular in float32."""
    from scipy.linalg import solve

    out: F32 = solve(system.astype(np.float64), right, assume_a="pos", overwrite_a=True).astype(np.float32)
    return out


def onehot(labels: I64, classes: int) -> F32:
    """`(samples, classes)`."""
    return np.eye(classes, dtype=np.float32)[labels]


def softmax(logits: F32) -> F32:
    """Rows of `logits` as probabilities."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    out: F32 = shifted / shifted.sum(axis=1, keepdims=True)
    return out


class Standardised:
    """A learner whose input is shifted and scaled by the first step's means and deviations, channel by channel."""

    def __init__(self, inner: Learner) -> None:
        self.inner, self.exemplars = inner, inner.exemplars
        self.shift: F32 | None = None
        self.scale: F32 = np.ones(1, np.float32)

    def _read(self, x: F32) -> F32:
        if self.shift is None:
            deviation = x.std(axis=0)
            self.shift, self.scale = x.mean(axis=0), 1 / (deviation + 0.1 * deviation.mean())
        return (x - self.shift) * self.scale

    def learn(self, x: F32, labels: I64) -> None:
        self.inner.learn(self._read(x), labels)

    def predict(self, x: F32) -> I64:
        return self.inner.predict(self._read(x))

    @property
    def bytes(self) -> int:
        return self.inner.bytes + 2 * self.scale.nbytes


def learners(classes: int, seed: int) -> dict[str, tuple[str, Callable[[], Learner]]]:
    """Name -> (what it reads: `taps` or `last`, its maker)."""
    return {
        "fine-tuning": ("taps", lambda: FineTuning(classes, seed)),
        "replay fine-tuning": ("taps", lambda: FineTuning(classes, seed, EXEMPLARS)),
        "NCM": ("taps", lambda: Standardised(NearestClassMean(classes))),
        "Deep SLDA": ("taps", lambda: Standardised(DeepSLDA(classes))),
        "RanPAC": ("taps", lambda: Standardised(RanPAC(classes, seed))),
        "FeCAM": ("last", lambda: FeCAM()),
        "joint linear (ceiling)": ("taps", lambda: Standardised(FineTuning(classes, seed, None))),
        "joint ridge (ceiling)": ("taps", lambda: JointRidge(classes)),
    }


SOURCES = {
    "fine-tuning": "one linear head on all taps, trained on each domain in turn",
    "replay fine-tuning": f"the same with {EXEMPLARS} stored features a class and domain",
    "NCM": "cosine to running class means",
    "Deep SLDA": "Hayes & Kanan, 2020, all taps",
    "RanPAC": f"McDonnell et al., NeurIPS 2023, {RANPAC} random features of all taps",
    "FeCAM": "Goswami et al., NeurIPS 2023, last tap, one covariance for each class and step",
    "joint linear (ceiling)": "one linear head, all domains at once",
    "joint ridge (ceiling)": "one ridge regression, all domains at once",
}
