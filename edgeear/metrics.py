"""Figures of a continual-learning run, from plain arrays. Fractions of one throughout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def bwt(accuracy: Matrix) -> float:
    """Backward transfer of `accuracy (T, T)`, R[i, j] on domain j after learning domain i: mean over j < T of
    R[T, j] - R[j, j] (Lopez-Paz & Ranzato, 2017, eq. 3); 0 for one domain."""
    t = len(accuracy)
    return float(np.mean([accuracy[t - 1, j] - accuracy[j, j] for j in range(t - 1)])) if t > 1 else 0.0


def forgetting(accuracy: Matrix) -> list[float]:
    """Per domain: the best accuracy it ever had minus the last one (Chaudhry et al., 2018)."""
    t = len(accuracy)
    return [float(np.max(accuracy[j:, j]) - accuracy[t - 1, j]) for j in range(t)]


def confusion(routes: Sequence[NDArray[np.int64]], domains: int) -> Matrix:
    """Rows = true domain, columns = route; each row sums to one. `routes[i]` holds the routes of inputs of domain i."""
    return np.stack([np.bincount(r, minlength=domains)[:domains] / max(len(r), 1) for r in routes])


def auroc(known: NDArray[np.float32], unknown: NDArray[np.float32]) -> float:
    """Area under the ROC curve with unknown as the positive class and larger scores = more unknown; ties count half.

    >>> auroc(np.array([0.0, 1.0], np.float32), np.array([2.0, 3.0], np.float32))
    1.0
    """
    ordered = np.sort(known)
    below = np.searchsorted(ordered, unknown, side="left")
    equal = np.searchsorted(ordered, unknown, side="right") - below
    return float((below + 0.5 * equal).mean() / len(known))


def fpr95(known: NDArray[np.float32], unknown: NDArray[np.float32]) -> float:
    """Share of known inputs called unknown at the largest threshold that finds at least 95 % of the unknown ones."""
    return float((known >= np.sort(unknown)[len(unknown) // 20]).mean())
