"""What the protocols of `edgeear eval` share: options, the result of learning, and predictions.

Rules of this file:

1. A prediction is routed by the router and named by the classes of the one or two heads that answer, as on a board. An
   input that no head serves counts as wrong.
2. Times come from the clock argument. A phase ends when the adaptation's progress names a new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from adaptors.latency import LatencyModel
from adaptors.progress import Progress
from adaptors.search_space import BUDGETS
from device.encoder.engine import OrtEngine
from device.evaluation.data import I64, DataOptions, DomainData, EvalData
from device.evaluation.result import GrowthFigures, Rejection
from edgeear.errors import UsageError
from edgeear.flow import judge
from edgeear.mixture import answer
from edgeear.system import HYPERVECTOR, Domain, System, SystemPolicy
from edgeear.types import F32, Encoder

Clock = Callable[[], float]
CHUNK = 256
"""How many samples a head scores at once, which bounds its scratch memory."""
WITNESSES = 32
"""How many test images of a domain must keep their scores bit for bit while others are learned."""


@dataclass(frozen=True)
class EvalOptions(DataOptions):
    """Options of `edgeear eval`, beside those of the images.

    `budget` names one of `adaptors.search_space.BUDGETS`. `specs` is how many heads a search scores.
    `classes_per_step` runs the class-incremental protocol on the one domain of `order`, with a second-order memory of
    `step_dimensions`. `latency` is the model of a profiled board. `prefer` names one of
    `adaptors.search.PREFERENCES`. `halving` heads of a search are trained for a few steps before one is chosen.
    """

    budget: str = "medium"
    specs: int = 1000
    classes_per_step: int | None = None
    step_dimensions: int = 1024
    policy: SystemPolicy = field(default_factory=SystemPolicy)
    date: str | None = None
    latency: LatencyModel | None = None
    prefer: str = "best"
    halving: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget not in BUDGETS:
            raise UsageError(f"budget {self.budget!r} is unknown: choose one of {', '.join(BUDGETS)}")
        if self.specs < 1:
            raise UsageError(f"specs is {self.specs}: a search scores at least 1 head")
        if self.classes_per_step is not None and self.classes_per_step < 1:
            raise UsageError(f"classes per step is {self.classes_per_step}: at least 1 is needed")


@dataclass(frozen=True, eq=False)
class Run:
    """The result of learning: `systems[i]` after domain i, its `predictions[i][j]` and the final `routes[j]` on the
    test images of domain j, and the figures measured meanwhile."""

    data: EvalData
    encoder: Encoder
    systems: tuple[System, ...]
    predictions: tuple[tuple[I64, ...], ...]
    oracle: tuple[I64, ...]
    routes: tuple[I64, ...]
    growth: tuple[GrowthFigures, ...]
    rejected: tuple[Rejection, ...]
    bit_identical: bool


class Laps:
    """Seconds of every phase of an adaptation. A phase begins when the progress first names it."""

    def __init__(self, clock: Clock, domain: str, on_progress: Progress, phase: str) -> None:
        self._clock, self._domain, self._on_progress = clock, domain, on_progress
        self._phase, self._since = phase, clock()
        self.seconds: dict[str, float] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase:
            self.finish()
            self._phase = phase
        self._on_progress(f"{self._domain}: {phase}", done, total)

    def finish(self) -> None:
        """End the current phase."""
        now = self._clock()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + max(0.0, now - self._since)
        self._since = now


def growth_figures(grown: Domain, domain: DomainData, seconds: Mapping[str, float]) -> GrowthFigures:
    """The figures of one grown head, without the candidates of its search."""
    facts = {k: v for k, v in grown.growth.items() if k != "candidates"}
    return GrowthFigures.model_validate(
        {
            **facts,
            "domain": grown.name,
            "search_s": seconds.get("search", 0.0),
            "train_s": seconds.get("train", 0.0),
            "memory_s": seconds.get("memory", 0.0),
            "domain_bytes": grown.bytes,
            "training_samples": len(domain.train_labels),
        }
    )


def predict(system: System, engine: OrtEngine, classes: Sequence[str], domain: DomainData) -> tuple[I64, I64]:
    """Predicted classes and routes `(samples,)` of the test images of `domain`; -1 where no head serves."""
    labels = np.full(len(domain.test_labels), -1, np.int64)
    if not system.domains:
        return labels, labels.copy()
    verdict = judge(system, domain.test_h)
    route = np.where(verdict.p < system.policy.abstain_below, -1, verdict.route)
    for first, second in np.unique(np.stack([route, verdict.second], axis=1)[route >= 0], axis=0):
        rows = np.flatnonzero((route == first) & (verdict.second == second))
        for part in np.split(rows, range(CHUNK, len(rows), CHUNK)):
            found, scores = answer(system, engine, _features(system, domain, part), int(first), int(second))
            labels[part] = np.array([classes.index(c) for c in found])[scores.argmax(axis=1)]
    return labels, route


def named(classes: Sequence[str], served: Domain) -> I64:
    """The data set's index of each class of a head."""
    return np.array([classes.index(c) for c in served.head.classes], np.int64)


def _features(system: System, domain: DomainData, rows: I64) -> dict[str, F32]:
    """The features of some test images of `domain` that any head of the system may need."""
    features = {t: domain.test[t][rows] for t in system.wanted_taps}
    return {**features, HYPERVECTOR: domain.test_h[rows, : system.policy.memory_dimensions]}


def head_scores(system: System, engine: OrtEngine, served: Domain, domain: DomainData, rows: I64) -> F32:
    """Scores `(len(rows), classes)` of a head for test images of `domain`, a bounded number at once."""
    pieces = [np.zeros((0, len(served.head.classes)), np.float32)]
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        features = {t: domain.test[t][part] for t in system.taps_for(served)}
        features[HYPERVECTOR] = domain.test_h[part, : system.policy.memory_dimensions]
        pieces.append(engine.scores(served.head, features))
    return np.concatenate(pieces)


def fingerprint(system: System, engine: OrtEngine, served: Domain, domain: DomainData) -> str:
    """SHA-256 of a head's bytes and of its scores for the first test images of `domain`."""
    rows = np.arange(min(WITNESSES, len(domain.test_labels)))
    scores = head_scores(system, engine, served, domain, rows)
    return hashlib.sha256(served.head.onnx + scores.tobytes()).hexdigest()
