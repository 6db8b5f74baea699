"""Which domain an input belongs to, among those that were learned.

Linear discriminant analysis between domains on the first m coordinates of the hypervector, solved from the domains'
memories alone: means and the average within-domain covariance are all it needs. One matrix product routes an input,
so time grows by m multiply-accumulates a domain, and learning a domain never needs another domain's samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeear.memory import I64, DomainMemory
from edgeear.types import F32

SHRINKAGE = (0.03, 0.5)
"""(a, b): the diagonal's weight in the within-domain covariance is a + b m / (m + n), n the samples of all domains,
each counted as the smallest: 0.19 for 140 images in each of 4 domains, 0.05 for 1,300. Both were picked on PACS."""
FLOOR = 1e-3
"""Ridge on the diagonal relative to the mean variance, against dead coordinates."""


@dataclass(frozen=True, eq=False)
class Router:
    """`weights (m, domains)` and `bias (domains,)`: discriminant scores of hypervectors."""

    weights: F32
    bias: F32

    def scores(self, h: F32) -> F32:
        """Discriminant scores `(samples, domains)` of hypervectors `(samples, D)` (or their first m coordinates)."""
        out: F32 = h[:, : len(self.weights)] @ self.weights + self.bias
        return out

    def route(self, h: F32) -> NDArray[np.int64]:
        """Index of the most likely domain `(samples,)`."""
        best: NDArray[np.int64] = self.scores(h).argmax(axis=1).astype(np.int64)
        return best


def by_domain(contenders: I64) -> Iterator[tuple[int, tuple[I64 | slice, I64 | int]]]:
    """Each domain in `contenders (samples, k)` once, and where it stands: an index of rows and one of places."""
    if len(contenders) == 1:  # the usual case: no search
        yield from ((k, (slice(None), place)) for place, k in enumerate(contenders[0].tolist()))
        return
    for k in set(contenders.ravel().tolist()):
        rows, places = (contenders == k).nonzero()
        yield k, (rows, places)


def router(memories: Sequence[DomainMemory]) -> Router:
    """The router between one or more domains; domains count equally, however many samples each has."""
    m = memories[0].m
    within = np.mean([d.covariance for d in memories], axis=0)
    variance = np.diag(within)
    level = max(float(variance.mean()), 1e-12)
    n = len(memories) * min(d.n for d in memories)  # what each adds counts equally
    ratio = SHRINKAGE[0] + SHRINKAGE[1] * m / (m + n)
    shrunk = (1 - ratio) * within + np.diag(ratio * variance + FLOOR * level)
    means = np.stack([d.mean for d in memories], axis=1)
    weights = np.linalg.solve(shrunk, means).reshape(m, len(memories))
    bias = -0.5 * (weights * means).sum(axis=0)
    return Router(weights.astype(np.float32), bias.astype(np.float32))
