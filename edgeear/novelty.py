"""How far an input is from one domain, and how improbable that is. Larger novelty = more out of distribution.

Rules of this file:

1. Novelty is the larger of two standardised statistics on different coordinates: the angle to the nearest class
   prototype (those after the first m) and the log Mahalanobis distance to the nearest class mean (the first m, with the
   shrunk covariance within classes). The larger, not the sum: an input may be novel by one statistic alone.
2. Calibration scores are out-of-fold: no sample is scored by a memory that holds it or a near-copy of it. So all frames
   of a scene (scenes.py) are in one fold, and the scene counts once, by its first frame, as it does in a stream. A fold
   is *subtracted* from the full memory, which costs no second pass over the data.
3. What is calibrated is what serves: each fold's sums are rounded as the store rounds them. Differences that float32
   cannot tell are none (`SAME`, `NEAR`), or an exact copy of a calibrated sample could count as more novel than it.
4. A conformal p-value (Vovk, Gammerman, Shafer, 2005) is valid on average over calibration sets. A conditional
   p-value is valid for *this* calibration set with probability 1 - delta; only it may be multiplied over
   time, so the shift test takes only it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from adaptors.hadamard import permutation
from edgeear.errors import DataError, UsageError
from edgeear.memory import I64, ROUNDING, DomainMemory, learn, rounded, subtract
from edgeear.scenes import ALIKE, scene_code, scenes_of
from edgeear.shift import LEVELS
from edgeear.types import F32

MINIMUM = 5
"""Fewest samples that can be calibrated."""
LIMIT = 2048
"""Most calibration values kept of a domain (8 KiB); a random subset of more keeps p-values valid."""
TINY = 1e-6
SAME = np.float32(1e-5)
"""Angle below which float32 cannot tell two directions of thousands of coordinates apart."""
NEAR = np.float32(1e-4)
"""Squared Mahalanobis distance below which it cannot tell a code from a mean, where all variance is rounding error."""


@dataclass(frozen=True, eq=False)
class Detector:
    """The two statistics of one domain, ready for single inputs; built by `detector`.

    `prototypes (classes, D - m)` unit rows, `whitener (m, m)` W with W W' = inverse covariance, `means (classes, m)`
    whitened; of the classes that have samples. Where D = m, prototypes have all D coordinates.
    """

    prototypes: F32
    means: F32
    whitener: F32
    repaired: bool = False
    """Whether the sums cannot be those of samples (a damaged file, a class forgotten without its samples): variance was
    added until they could."""

    def angle(self, h: F32) -> F32:
        """`1 - max cos(h, prototype)` of `h (samples, D)`, in [`SAME`, 2]; a zero hypervector has angle 1."""
        bundle = h[:, h.shape[1] - self.prototypes.shape[1] :]
        norms = np.maximum(np.sqrt(np.vecdot(bundle, bundle)), TINY)
        out: F32 = np.maximum(1 - np.maximum.reduce(bundle @ self.prototypes.T, axis=1) / norms, SAME)
        return out

    def leverage(self, h: F32) -> F32:
        """Log of the squared Mahalanobis distance of `h (samples, D)` from the nearest class mean, no less than
        that of `NEAR`."""
        white = h[:, : len(self.whitener)] @ self.whitener
        apart = white[:, None] - self.means
        out: F32 = np.log(np.maximum(np.minimum.reduce(np.vecdot(apart, apart), axis=1), NEAR))
        return out


def detector(memory: DomainMemory) -> Detector:
    """The detector of a memory. Covariance C is shrunk to its diagonal by r = 0.02 + 0.3 m / (m + n).

    No variance is below a thousandth of their mean, nor below the rounding error of the stored sums: equal samples have
    no other. Raises `DataError` when the memory holds no sample, or NaN or infinite sums.
    """
    if memory.n == 0:
        raise DataError("the memory holds 0 samples: learn at least 1 before detecting")
    if not (np.isfinite(memory.class_sums).all() and np.isfinite(memory.gram).all()):
        raise DataError("the memory holds NaN or infinity: learn the domain again")
    m, present = memory.m, memory.counts > 0
    sums, counts = memory.class_sums[present], memory.counts[present, None]
    means = sums[:, :m] / counts
    covariance = memory.gram / memory.n - (means * counts).T @ means / memory.n
    ratio, variance = 0.02 + 0.3 * m / (m + memory.n), np.diag(covariance)
    rounding = 2 * ROUNDING * float(np.trace(memory.gram)) / memory.n
    floor = max(1e-3 * float(variance.mean()), rounding, TINY**2)
    shrunk = (1 - ratio) * covariance + np.diag(ratio * np.maximum(variance, 0) + floor)
    repaired = False
    try:
        lower = np.linalg.cholesky(shrunk)
    except np.linalg.LinAlgError:
        least = float(np.linalg.eigvalsh(shrunk)[0])
        lower, repaired = np.linalg.cholesky(shrunk + (floor - 2 * least) * np.eye(m)), True
    whitener = np.linalg.inv(lower).T
    directions = sums[:, m if m < memory.dimensions else 0 :]
    prototypes = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), TINY)
    return Detector(
        prototypes.astype(np.float32),
        (means @ whitener).astype(np.float32),
        whitener.astype(np.float32),
        repaired,
    )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Means and deviations of the two statistics, and the sorted out-of-fold novelty `values (n,)` of a domain."""

    angle_mean: float
    angle_deviation: float
    leverage_mean: float
    leverage_deviation: float
    values: F32
    delta: float = 0.01
    """Probability that conditional p-values are not valid for a calibration set."""

    def __post_init__(self) -> None:
        values = np.sort(np.asarray(self.values, np.float32))
        if values.ndim != 1 or len(values) < MINIMUM or not np.isfinite(values).all():
            raise DataError(f"{values.shape} calibration values: at least {MINIMUM} finite ones are needed")
        if not 0 < self.delta < 1 or min(self.angle_deviation, self.leverage_deviation) <= 0:
            raise UsageError(f"delta {self.delta} must lie in (0, 1) and both deviations above 0")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)
        for name in ("angle_mean", "angle_deviation", "leverage_mean", "leverage_deviation"):
            object.__setattr__(self, name, float(getattr(self, name)))  # a numpy scalar would widen float32 arrays

    def combine(self, angle: F32, leverage: F32) -> F32:
        """Novelty `(samples,)` of the two statistics."""
        a = (angle - self.angle_mean) / self.angle_deviation
        out: F32 = np.maximum(a, (leverage - self.leverage_mean) / self.leverage_deviation)
        return out

    def novelty(self, detector: Detector, h: F32) -> F32:
        """Novelty `(samples,)` of hypervectors `(samples, D)` under the domain's detector."""
        return self.combine(detector.angle(h), detector.leverage(h))

    def p_values(self, novelty: F32) -> tuple[F32, F32]:
        """Conformal and conditional p-values (rule 3) of `novelty (samples,)`; NaN counts as more novel than all.

        Conformal ones lie in [1 / (n + 1), 1], and the rate of p <= a over inputs of the domain is at most a. The
        conditional ones are explained at `conditional_bounds`."""
        conformal, conditional = _p_tables(len(self.values), self.delta)
        below = self.values.searchsorted(novelty)
        return conformal[below], conditional[below]


def calibrate(
    h: F32, labels: I64, classes: Sequence[str], m: int, folds: int = 10, *, seed: int, alike: float = ALIKE
) -> Calibration:
    """Calibration of a domain from hypervectors `h (samples, D)` in the order in which they were taken, by `folds`-fold
    subtraction, stratified by class. `alike`: see `scenes_of`.

    Fewer than `MINIMUM` scenes say next to nothing: the largest value stands for those that are missing, so that no p
    falls below 1 / (MINIMUM + 1). Raises `DataError` below `MINIMUM` samples, `UsageError` below 2 folds.
    """
    if len(h) < MINIMUM:
        raise DataError(f"{len(h)} samples cannot be calibrated: at least {MINIMUM} are needed, collect more")
    if folds < 2:
        raise UsageError(f"folds is {folds}: at least 2 are needed")
    labels = np.asarray(labels)
    full, scene = learn(h, labels, classes, m), scenes_of(scene_code(h), labels, alike)
    first = np.unique(scene, return_index=True)[1]
    fold = _folds(labels[first], min(folds, len(first)), seed)
    angle, leverage = np.empty(len(first), np.float32), np.empty(len(first), np.float32)
    for k in range(min(folds, len(first))):
        held, shown = fold[scene] == k, first[fold == k]
        rest = subtract(full, learn(h[held], labels[held], classes, m)) if len(first) > 1 else full
        served = detector(rounded(rest))
        angle[fold == k], leverage[fold == k] = served.angle(h[shown]), served.leverage(h[shown])
    spread = (max(float(angle.std()), TINY), max(float(leverage.std()), TINY))
    scale = (float(angle.mean()), spread[0], float(leverage.mean()), spread[1])
    values = Calibration(*scale, np.zeros(MINIMUM, np.float32)).combine(angle, leverage)
    values = values[permutation(seed, "calibration", len(values))[:LIMIT]]
    return Calibration(*scale, np.concatenate([values, np.full(max(0, MINIMUM - len(values)), values.max())]))


def _folds(labels: I64, folds: int, seed: int) -> I64:
    """Fold of each sample `(samples,)`: shuffled by the seed, dealt out class by class, sizes differ by at most 1."""
    shuffled = permutation(seed, "folds", len(labels))
    dealt = shuffled[np.argsort(labels[shuffled], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[dealt] = np.arange(len(labels)) % folds
    return fold


@lru_cache(maxsize=256)
def _p_tables(n: int, delta: float) -> tuple[F32, F32]:
    """Conformal and conditional p-values `(n + 1,)`, indexed by how many of n calibration values lie below."""
    conformal = (np.arange(n + 1, 0, -1) / (n + 1)).astype(np.float32)
    return conformal, np.ascontiguousarray(conditional_bounds(n, delta)[::-1])


@lru_cache(maxsize=256)
def conditional_bounds(n: int, delta: float) -> F32:
    """Bounds `(n + 1,)` on P(S >= s), indexed by j = #{calibration >= s}; all hold at once w.p. 1 - delta.

    They take the values `LEVELS` of the shift test and 1, so that all of delta is spent where it bets. The K levels
    share it: u is the bound of every j <= j_u, the largest with P(Binomial(n, u) <= j_u) <= delta / K. Proof: let s* be
    the largest threshold with P(S >= s*) >= u. A threshold with P(S >= s) > u lies at or below s*, so its count is at
    least that of s*, which is stochastically at least Binomial(n, u), with or without ties. Hence u fails for some
    threshold with probability at most delta / K. With delta 0.01 and fewer than 10 scores all bounds are 1.
    """
    bounds = np.ones(n + 1, np.float32)
    for level in sorted(LEVELS, reverse=True):
        bounds[: _covered(n, level, delta / len(LEVELS))] = level
    bounds.setflags(write=False)
    return bounds


def _covered(n: int, u: float, delta: float) -> int:
    """How many of j = 0, 1, ... have P(Binomial(n, u) <= j) <= delta."""
    i = np.arange(n)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((n - i) / (i + 1)))])
    tails = np.cumsum(np.exp(log_choose + np.arange(n + 1) * np.log(u) + np.arange(n, -1, -1) * np.log1p(-u)))
    return int((tails[:n] <= delta).sum())
