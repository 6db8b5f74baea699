"""Successive halving (Jamieson & Talwalkar, AISTATS 2016): a few steps of training for the last candidates.

Each round trains every head that is left, keeps the better half by its accuracy on samples that it was not fitted to,
and doubles samples and epochs. With n heads that is log2(n) rounds of about n * `SAMPLES` * `EPOCHS` sample-epochs
each: for 8 heads some seconds, against the milliseconds of a proxy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from adaptors.spec import HeadSpec
from adaptors.train import TrainPolicy, train

SAMPLES = 200
EPOCHS = 3


def halve(
    specs: Sequence[HeadSpec],
    taps: Mapping[str, NDArray[np.float32]],
    labels: NDArray[np.int64],
    classes: int,
    seed: int,
) -> list[int]:
    """Indices of all `specs`, the winner first; ties go to the earlier one."""
    shapes = {t: tuple(x.shape[1:]) for t, x in taps.items()}
    order = np.random.default_rng(seed).permutation(len(labels))
    left, lost, scale = list(range(len(specs))), list[int](), 1
    while len(left) > 1:
        chosen = order[: SAMPLES * scale]
        views, y = [{t: x[chosen] for t, x in taps.items()}], labels[chosen]
        policy = TrainPolicy(seed=seed, epochs=EPOCHS * scale)
        scores = [train(specs[i], shapes, views, y, classes, policy).validation_accuracy for i in left]
        ranked = [left[j] for j in np.argsort(-np.nan_to_num(scores), kind="stable")]
        left, lost, scale = ranked[: len(ranked) // 2], [*ranked[len(ranked) // 2 :], *lost], 2 * scale
    return [*left, *lost]
