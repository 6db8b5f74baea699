"""The test images of every domain, encoded once, and what a system makes of them.

Rules of this file:

1. An answer is what a board would give, by the head that the router picks. Only `oracle` takes the head of the true
   domain.
2. What was not measured is None: a domain without test images, an oracle for a domain that was not learned, and all
   while no domain is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptors.progress import Progress
from device.encoder.session import pooled_taps
from device.images.dataset import FolderData, Item, split
from device.images.featurise import featurise_items
from device.simulation.record import OodPair
from edgeear import metrics
from edgeear.flow import judge
from edgeear.mixture import answer
from edgeear.space import HypervectorSpace
from edgeear.system import HYPERVECTOR, Engine, System
from edgeear.types import F32, Encoder

Truths = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TestSet:
    """One domain's test images: pooled features, hypervectors `(samples, D)` and class names."""

    __test__ = False  # pytest must not collect it

    features: dict[str, F32]
    h: F32
    labels: NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class Answers:
    """A system's answers for one test set: `correct (samples,)`, and `route (samples,)` as indices of the system's
    domains, -1 if no head served."""

    correct: Truths
    route: NDArray[np.int64]


class Exam:
    """The test sets of a data set, at most `limit` images each, picked by `seed`."""

    def __init__(
        self, data: FolderData, encoder: Encoder, space: HypervectorSpace, limit: int, seed: int, progress: Progress
    ) -> None:
        self.domains, self.warnings = data.domains, list[str]()
        taps = [tap.name for tap in pooled_taps(encoder)]
        picked = {name: _pick(split(data.items[name])[1], limit, seed) for name in data.domains}
        found = featurise_items(
            [item for items in picked.values() for item in items],
            encoder,
            taps,
            on_bad="skip",
            on_progress=lambda _, *at: progress("test images", *at),
        )
        self.warnings += [str(bad) for bad in found.bad]
        h = space.encode(found.features)
        self.sets = {}
        for name, items in picked.items():
            wanted = set(items)
            rows = [row for row, item in enumerate(found.items) if item in wanted]
            labels = np.array([data.classes[found.items[row].label] for row in rows], np.str_)
            self.sets[name] = TestSet({t: x[rows] for t, x in found.features.items()}, h[rows], labels)

    def answers(self, system: System, engine: Engine, name: str) -> Answers:
        """The system's routes and labels for the test set of domain `name`."""
        test = self.sets[name]
        correct, route = np.zeros(len(test.h), np.bool_), np.full(len(test.h), -1, np.int64)
        if not system.domains or len(test.h) == 0:
            return Answers(correct, route)
        verdict = judge(system, test.h)
        serving = verdict.p >= system.policy.abstain_below
        for first, second in np.unique(np.stack([verdict.route, verdict.second], axis=1)[serving], axis=0):
            rows = np.flatnonzero(serving & (verdict.route == first) & (verdict.second == second))
            route[rows] = first
            correct[rows] = _correct(system, engine, int(first), int(second), test, rows)
        return Answers(correct, route)

    def accuracies(self, system: System, engine: Engine) -> tuple[float | None, ...]:
        """Accuracy on every domain, routed: one row of the accuracy matrix."""
        if not system.domains:
            return (None,) * len(self.domains)
        return tuple(_share(self.answers(system, engine, name).correct) for name in self.domains)

    def oracle(self, system: System, engine: Engine) -> float | None:
        """Mean accuracy if every input gets the head of its own domain."""
        found = []
        for name, test in self.sets.items():
            if name not in system.names or len(test.h) == 0:
                return None
            own = system.names.index(name)
            found.append(_correct(system, engine, own, -1, test, np.arange(len(test.h))).mean())
        return float(np.mean(found))

    def routing(self, system: System, engine: Engine) -> list[list[float | None]]:
        """`(domains, domains + 1)`: shares of routes, rows true domains, the last column "abstain"."""
        columns = [self.domains.index(name) for name in system.names]
        matrix: list[list[float | None]] = []
        for name in self.domains:
            route = self.answers(system, engine, name).route
            if len(route) == 0 or not system.domains:
                matrix.append([None] * (len(self.domains) + 1))
                continue
            placed = np.array([*columns, len(self.domains)])[route]
            matrix.append([float(x) for x in np.bincount(placed, minlength=len(self.domains) + 1) / len(route)])
        return matrix

    def ood(self, system: System) -> list[OodPair]:
        """Every learned domain alone against every other test set."""
        pairs = []
        for known in system.domains:
            scores = {
                name: known.calibration.novelty(known.detector, test.h)
                for name, test in self.sets.items()
                if len(test.h)
            }
            for unknown in scores:
                if unknown != known.name and known.name in scores:
                    a, b = scores[known.name], scores[unknown]
                    pairs.append(
                        OodPair(known=known.name, unknown=unknown, auroc=metrics.auroc(a, b), fpr95=metrics.fpr95(a, b))
                    )
        return pairs


def _correct(system: System, engine: Engine, first: int, second: int, test: TestSet, rows: NDArray[np.int64]) -> Truths:
    """Whether the heads of the domains `first` and, unless -1, `second` are right about `rows` of a test set."""
    if len(rows) == 0:
        return np.zeros(0, np.bool_)
    features = {tap: x[rows] for tap, x in test.features.items()}
    features[HYPERVECTOR] = test.h[rows, : system.policy.memory_dimensions]
    classes, scores = answer(system, engine, features, first, second)
    right: Truths = np.array(classes)[scores.argmax(axis=1)] == test.labels[rows]
    return right


def _share(truths: Truths) -> float | None:
    return float(truths.mean()) if len(truths) else None


def _pick(items: tuple[Item, ...], limit: int, seed: int) -> tuple[Item, ...]:
    kept = sorted(np.random.default_rng(seed).permutation(len(items))[:limit])
    return tuple(items[int(place)] for place in kept)
