"""Scores of a head as probabilities: softmax(scores / T), with the one T that fits scores of held-out samples best.

Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017) never changes which class is first.
Its log loss is taken against Platt's (1999) softened targets, so that a few samples, all right, do not make it certain.
On PACS the expected calibration error falls from 57.7 to 1.8 % with 20 images a class, from 65.4 to 1.4 % with all
(make bench-calibration).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
RANGE = (1e-3, 1e3)
"""Least and largest temperature."""
STEPS = 200


def fit_temperature(scores: F32, labels: NDArray[np.int64]) -> float | None:
    """The T of least log loss for `scores (samples, classes)` that a head gave to samples it was not fitted to; None
    where there is no sample, or one class."""
    n, classes = scores.shape
    if n == 0 or classes < 2:
        return None
    wrong = 1 / (n + 2)  # Platt's target for the other class, here shared by all others
    targets = np.full((n, classes), wrong / (classes - 1))
    targets[np.arange(n), labels] = 1 - wrong
    apart = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    grid = np.geomspace(*RANGE, STEPS)
    losses = [float(np.mean(np.log(np.exp(apart / t).sum(axis=1)) - (targets * apart).sum(axis=1) / t)) for t in grid]
    return float(grid[int(np.argmin(losses))])


def probabilities(scores: F32, temperature: float | F32) -> F32:
    """Probabilities `(samples, classes)` of `scores (samples, classes)`; equal scores give equal shares.

    `temperature` is a number, or one a sample `(samples, 1)`."""
    raised = np.exp((scores - scores.max(axis=1, keepdims=True)) / temperature)
    out: F32 = (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)
    return out
