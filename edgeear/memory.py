"""What is kept of a domain: plain sums, so that learning is order-free, mergeable and subtractable.

Rules of this file:

1. A memory is bounded by classes, D and m, never by the number of samples, and holds no exemplar.
2. `merge` of two memories is the memory of the union; `subtract` undoes it. Sums are float64 so that both hold exactly
   enough; arrays are read-only and never alias the caller's.
3. Second-order memory covers the first m coordinates: the level part of a hypervector (levels.py), and then as many of
   its bundle, each a seeded random projection of the whole code, as m reaches beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeear.errors import DataError, UsageError
from edgeear.types import F32

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
ROUNDING = 2.0**-24
"""Largest relative error of a number that is rounded to float32."""


@dataclass(frozen=True, eq=False)
class DomainMemory:
    """Sums over the hypervectors of one domain.

    `classes` names; `counts (classes,)` samples of each; `class_sums (classes, D)`; `gram (m, m)` the sum of outer
    products of the first m coordinates. A class may have no samples.
    """

    classes: tuple[str, ...]
    counts: I64
    class_sums: F64
    gram: F64

    def __post_init__(self) -> None:
        k, d, m = len(self.classes), self.class_sums.shape[-1], len(self.gram)
        if len(set(self.classes)) < k or k == 0:
            raise UsageError(f"classes must be distinct and at least one: got {list(self.classes)}")
        shapes = (self.counts.shape, self.class_sums.shape, self.gram.shape)
        if shapes != ((k,), (k, d), (m, m)) or not 1 <= m <= d:
            raise UsageError(f"shapes {shapes} do not fit {k} classes: expected (k,), (k, D), (m, m), 1 <= m <= D")
        if (self.counts < 0).any():
            raise UsageError(f"counts {self.counts.tolist()} are negative: more was subtracted than learned")
        for name, dtype in (("counts", np.int64), ("class_sums", np.float64), ("gram", np.float64)):
            copy = np.array(getattr(self, name), dtype=dtype)
            copy.setflags(write=False)
            object.__setattr__(self, name, copy)

    @property
    def n(self) -> int:
        """Samples in the memory."""
        return int(self.counts.sum())

    @property
    def dimensions(self) -> int:
        """D, the length of a hypervector."""
        return int(self.class_sums.shape[1])

    @property
    def m(self) -> int:
        """Coordinates with second-order memory."""
        return len(self.gram)

    @property
    def mean(self) -> F64:
        """Mean of the first m coordinates, `(m,)`; zero when nothing was learned."""
        mean: F64 = self.class_sums[:, : self.m].sum(axis=0) / max(self.n, 1)
        return mean

    @property
    def covariance(self) -> F64:
        """Covariance (divisor n) of the first m coordinates, `(m, m)`; zero when nothing was learned."""
        return self.gram / max(self.n, 1) - np.outer(self.mean, self.mean)

    @property
    def prototypes(self) -> F32:
        """Unit class sums `(classes, D)`; all zero for a class without samples, which has no prototype."""
        norms = np.linalg.norm(self.class_sums, axis=1, keepdims=True)
        present = (self.counts > 0)[:, None] & (norms > 0)
        unit = np.divide(self.class_sums, norms, out=np.zeros_like(self.class_sums), where=present)
        prototypes: F32 = unit.astype(np.float32)
        return prototypes


def learn(h: F32, labels: I64, classes: Sequence[str], m: int) -> DomainMemory:
    """The memory of hypervectors `h (samples, D)` with `labels (samples,)`, indices into `classes`.

    Raises `UsageError` for labels that do not fit, `DataError` for NaN or infinite hypervectors.
    """
    labels = np.asarray(labels)
    if h.ndim != 2 or labels.shape != (len(h),) or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"{h.shape} hypervectors with {labels.dtype} labels {labels.shape}: one integer per sample")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UsageError(f"labels from {labels.min()} to {labels.max()}: the {len(classes)} classes start at 0")
    if not 1 <= m <= h.shape[1]:
        raise UsageError(f"m is {m}: it must be from 1 to the {h.shape[1]} dimensions")
    if not np.isfinite(h).all():
        raise DataError("hypervectors hold NaN or infinity: check the features that they were encoded from")
    onehot = (labels[None, :] == np.arange(len(classes))[:, None]).astype(np.float64)
    h64 = h.astype(np.float64)
    counts = np.bincount(labels, minlength=len(classes))
    return DomainMemory(tuple(classes), counts, onehot @ h64, h64[:, :m].T @ h64[:, :m])


def merge(a: DomainMemory, b: DomainMemory) -> DomainMemory:
    """The memory of all samples of both; classes are matched by name, new ones of `b` come last."""
    _check_sizes(a, b)
    classes = a.classes + tuple(name for name in b.classes if name not in a.classes)
    ca, sa = _aligned(a, classes)
    cb, sb = _aligned(b, classes)
    return DomainMemory(classes, ca + cb, sa + sb, a.gram + b.gram)


def subtract(a: DomainMemory, b: DomainMemory) -> DomainMemory:
    """`a` as if the samples of `b` had never been learned; keeps the classes of `a`.

    Raises `UsageError` when `b` holds a class or more samples than `a` does.
    """
    _check_sizes(a, b)
    extra = [n for n, count in zip(b.classes, b.counts, strict=True) if n not in a.classes and count]
    if extra:
        raise UsageError(f"classes {extra} are not in this memory: only what was learned can be subtracted")
    counts, sums = _aligned(b, a.classes)
    return DomainMemory(a.classes, a.counts - counts, a.class_sums - sums, a.gram - b.gram)


def _check_sizes(a: DomainMemory, b: DomainMemory) -> None:
    if (a.dimensions, a.m) != (b.dimensions, b.m):
        raise UsageError(f"memories of (D, m) {(a.dimensions, a.m)} and {(b.dimensions, b.m)}: use one space and one m")


def _aligned(memory: DomainMemory, classes: tuple[str, ...]) -> tuple[I64, F64]:
    """Counts and sums in the order of `classes`, zero where the memory has none."""
    counts = np.zeros(len(classes), np.int64)
    sums = np.zeros((len(classes), memory.dimensions))
    for i, name in enumerate(memory.classes):
        if name in classes:
            counts[classes.index(name)] = memory.counts[i]
            sums[classes.index(name)] = memory.class_sums[i]
    return counts, sums


def rounded(memory: DomainMemory) -> DomainMemory:
    """The memory as float32 stores it: what serves after learning equals what serves after a restart."""
    sums, gram = memory.class_sums.astype(np.float32), memory.gram.astype(np.float32)
    return DomainMemory(memory.classes, memory.counts, sums.astype(np.float64), gram.astype(np.float64))
