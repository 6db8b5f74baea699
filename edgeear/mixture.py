"""Where two domains explain an input, both heads answer.

Rules of this file:

1. Two heads answer only where the router's margin between its two best domains is below `SystemPolicy.mixture` and both
   domains' verdicts are "in distribution". One head serves everything else.
2. Scores of different heads are on different scales. So they are standardised over the classes of the head, and then go
   through a softmax of temperature `TEMPERATURE`. Classes are matched by name; both heads count equally.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptors.temperature import probabilities
from edgeear.system import Engine, System
from edgeear.types import F32, Features

TEMPERATURE = 0.5


def second_route(contenders: NDArray[np.int64], scores: F32, p: F32, system: System) -> NDArray[np.int64]:
    """The domain that answers beside the first contender, `(samples,)`, -1 for none. `contenders (samples, k)` are the
    router's best domains, best first, `p` their p-values, `scores (samples, domains)` the router's."""
    if contenders.shape[1] < 2:
        return np.full(len(contenders), -1, np.int64)
    rows, first, second = np.arange(len(contenders)), contenders[:, 0], contenders[:, 1]
    close = scores[rows, first] - scores[rows, second] < system.policy.mixture
    explained = p[:, :2].min(axis=1) > system.policy.alpha
    return np.where(close & explained, second, -1)


def answer(
    system: System, engine: Engine, features: Features, first: int, second: int = -1
) -> tuple[tuple[str, ...], F32]:
    """Classes and their scores `(samples, classes)` from the heads of the domains `first` and, unless -1, `second`.

    The classes of `first` come first. Scores of one head are its own; of two, shares that add up to one."""
    head = system.domains[first].head
    scores = engine.scores(head, features)
    if second < 0:
        return head.classes, scores
    other = system.domains[second].head
    classes = head.classes + tuple(c for c in other.classes if c not in head.classes)
    shares = np.zeros((len(scores), len(classes)), np.float32)
    for names, given in ((head.classes, scores), (other.classes, engine.scores(other, features))):
        shares[:, [classes.index(c) for c in names]] += _shares(given) / 2
    return classes, shares


def _shares(scores: F32) -> F32:
    """Softmax of standardised scores `(samples, classes)`; equal scores give equal shares."""
    return probabilities(scores, TEMPERATURE * np.maximum(scores.std(axis=1, keepdims=True), 1e-9))
