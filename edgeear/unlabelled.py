"""Adaptation without labels: the board labels a new domain itself, and uses the result only if it passes a test.

    adapt_unlabelled(system, engine, frames)   teachers -> self-labels -> gate -> grow a head as with labels -> admit

1. Of a known domain only its memory and codes are used. Two teachers come from each memory: the angle to its class
   prototypes (first order, all D coordinates) and the ridge readout (second order, first m). Both see hypervectors
   moved from the new frames' mean to the domain's, which is the alignment. The heads that serve are the third teacher.
2. The teachers' scores seed label propagation among the new frames (adaptors/selftrain.py).
3. The gate knows no label. It asks: are the frames out of distribution; do the two kinds of teachers, propagated apart,
   agree; does a readout fitted to the self-labels alone still classify the *known* domains (reverse validation: Zhong,
   Fan, Yang, Verscheure and Ren, "Cross Validation Framework to Choose amongst Models and Datasets for Transfer
   Learning", ECML 2010); do the frames show enough of the classes; do neighbours get the same class from the teachers
   more often than among Gaussian frames of the same mean and covariance, which have no classes (parametric bootstrap).
   If one answer is no, nothing is changed.
4. What passes is grown, learned and admitted exactly like a labelled domain; its growth record says "label_free".
5. The thresholds were chosen on PACS (docs/decisions/label-free.md), not derived: the gate is a test, not a proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from adaptors.progress import Progress
from adaptors.selftrain import (
    SelfTrainPolicy,
    chance_corrected,
    class_diversity,
    neighbour_graph,
    propagate,
    self_label,
    standardised,
)
from adaptors.temperature import probabilities
from edgeear.admission import admit
from edgeear.errors import UsageError
from edgeear.flow import judge
from edgeear.incremental import readout
from edgeear.learned import learned
from edgeear.memory import I64, DomainMemory, learn
from edgeear.samples import AdaptPolicy, Samples
from edgeear.system import HYPERVECTOR, Candidate, Domain, Engine, Rejected, System
from edgeear.types import F32, Features

SHARPNESS = np.float32(0.8)
"""On the sum of 2.5 standardised teachers; together with the softmax's temperature."""


@dataclass(frozen=True)
class UnlabelledPolicy:
    """The gate and the self-labelling.

    `frames`, `limit`: fewest and most frames (the graph takes 4 bytes times their square). `foreign`: least share of
    them that the system calls out of distribution. `agreement`: least chance-corrected agreement of the two kinds of
    teachers. `confidence`: least mean of that and of the chance-corrected reverse accuracy. `diversity`: least share of
    the classes that the frames effectively show. `structure`: least rise of the neighbours' agreement over that of
    Gaussian frames, as a share of the rise to full agreement."""

    frames: int = 100
    limit: int = 4096
    foreign: float = 0.10
    agreement: float = 0.25
    confidence: float = 0.52
    diversity: float = 0.4
    structure: float = 0.08
    labelling: SelfTrainPolicy = field(default_factory=SelfTrainPolicy)

    def __post_init__(self) -> None:
        if not 20 <= self.frames <= self.limit:
            raise UsageError(f"frames is {self.frames}: it must be from 20 to the limit of {self.limit}")


@dataclass(frozen=True)
class Trust:
    """What the gate measured, all without labels; see `UnlabelledPolicy`. `changed`: share of the frames whose
    self-label is not what the system answers today."""

    sources: tuple[str, ...]
    frames: int
    foreign: float
    agreement: float
    reverse: float
    diversity: float
    structure: float
    changed: float

    @property
    def confidence(self) -> float:
        return (self.agreement + self.reverse) / 2

    def doubts(self, policy: UnlabelledPolicy) -> tuple[str, ...]:
        """Every reason against committing; empty when there is none."""
        asked = (
            ("share of foreign frames", self.foreign, policy.foreign),
            ("agreement of the teachers", self.agreement, policy.agreement),
            ("confidence of the self-labels", self.confidence, policy.confidence),
            ("share of the classes in the frames", self.diversity, policy.diversity),
            ("class structure of the frames", self.structure, policy.structure),
        )
        return tuple(
            f"{what} is {found:.2f}, at least {least:.2f} needed" for what, found, least in asked if found < least
        )


@dataclass(frozen=True, eq=False)
class SelfLabels:
    """`labels (frames,)` index `classes`, judged by `trust`; `today (frames,)` are the serving system's answers."""

    labels: I64
    classes: tuple[str, ...]
    today: I64
    trust: Trust


def adapt_unlabelled(
    system: System,
    engine: Engine,
    name: str,
    views: Sequence[Features],
    policy: UnlabelledPolicy,
    adapt: AdaptPolicy,
    seed: int,
    on_progress: Progress = lambda *_: None,
) -> Candidate | Rejected:
    """Grow a head for unlabelled frames of a new domain `name`; `views` as in `Samples`, the first with every tap that
    the serving heads read. Needs torch. Rejected names what the gate doubts; raises as `flow.adapt` does."""
    n = len(next(iter(views[0].values())))
    if not system.domains:
        return Rejected(name, ("nothing is learned yet: the first domain needs labels",))
    if not policy.frames <= n <= policy.limit:
        return Rejected(name, (f"{n} unlabelled frames: from {policy.frames} to {policy.limit} are needed",))
    on_progress("self-labelling", 0, 1)
    h = system.space.encode(views[0])
    found = label_frames(system, engine, views[0], h, policy, seed)
    on_progress("self-labelling", 1, 1)
    if doubts := found.trust.doubts(policy):
        return Rejected(name, tuple(f"label-free: {doubt}" for doubt in doubts))
    from edgeear.growth import check, grow_head

    samples = Samples(name, views, found.labels, found.classes)
    check(samples)
    head, growth = grow_head(samples, adapt, seed, on_progress)
    growth["explanation"] = f"label-free (confidence {found.trust.confidence:.2f}): {growth['explanation']}"
    growth["validation_accuracy"] = None  # accuracy against self-labels means nothing
    growth["label_free"] = {**asdict(found.trust), "confidence": found.trust.confidence}
    return admit(system, learned(system, name, h, samples.labels, samples.classes, head, growth, seed))


def label_frames(
    system: System, engine: Engine, features: Features, h: F32, policy: UnlabelledPolicy, seed: int
) -> SelfLabels:
    """Self-labels of frames with `features` and hypervectors `h (frames, D)`, and how far they can be trusted."""
    verdict = judge(system, h)
    nearest = system.domains[int(np.bincount(verdict.route).argmax())]
    classes = nearest.memory.classes
    sources = [d for d in system.domains if set(d.memory.classes) == set(classes)]
    served = _served(system, engine, features, h, verdict.route, classes)
    angle, ridge = _teachers(sources, classes, h)
    graph, how = neighbour_graph(h, policy.labelling.neighbours), policy.labelling
    # The live heads count half as much as either kind of memory: the shift made them worse, not useless.
    today = np.float32(0.5) * standardised(served)
    angle_only, ridge_only = standardised(angle), standardised(ridge)
    labels = self_label(graph, SHARPNESS * (angle_only + ridge_only + today), how)
    apart = [self_label(graph, SHARPNESS * (np.float32(2) * kind + today), how) for kind in (angle_only, ridge_only)]
    k, shown = len(classes), probabilities(_uncentred(angle, ridge), how.temperature)
    trust = Trust(
        tuple(d.name for d in sources),
        len(h),
        float(verdict.ood.mean()),
        chance_corrected(float((apart[0] == apart[1]).mean()), k),
        chance_corrected(float(np.mean([_reverse(d, classes, h, labels) for d in sources])), k),
        class_diversity(propagate(graph, shown, how).argmax(axis=1), k),
        _structure(sources, classes, h, graph, how.neighbours, seed),
        float((labels != served.argmax(axis=1)).mean()),
    )
    return SelfLabels(labels, classes, served.argmax(axis=1).astype(np.int64), trust)


def _teachers(sources: Sequence[Domain], classes: Sequence[str], h: F32) -> tuple[F32, F32]:
    """Mean scores `(frames, classes)` of the two kinds of teachers over the known domains."""
    pairs = [_taught(d.memory, classes, h) for d in sources]
    return np.mean([p[0] for p in pairs], axis=0), np.mean([p[1] for p in pairs], axis=0)


def _structure(sources: Sequence[Domain], classes: Sequence[str], h: F32, graph: F32, k: int, seed: int) -> float:
    """How much more often neighbours get the same class from the teachers than among Gaussian frames like them.

    Mixtures of all centred frames with Gaussian weights have the frames' covariance and no classes."""
    n, mean = len(h), h.mean(axis=0)
    weights = np.random.default_rng(seed).standard_normal((n, n), np.float32) / np.float32(np.sqrt(n))
    gaussian = weights @ (h - mean) + mean
    found, null = (
        _homophily(g, (standardised(angle) + standardised(ridge)).argmax(axis=1), len(classes))
        for g, (angle, ridge) in (
            (graph, _teachers(sources, classes, h)),
            (neighbour_graph(gaussian, k), _teachers(sources, classes, gaussian)),
        )
    )
    return (found - null) / max(1 - null, 1e-6)


def _homophily(graph: F32, labels: I64, classes: int) -> float:
    """Share of the graph's weight between frames of one label, on a scale where chance is 0."""
    same = float((graph * (labels[:, None] == labels)).sum() / max(float(graph.sum()), 1e-12))
    chance = float(np.square(np.bincount(labels, minlength=classes) / len(labels)).sum())
    return (same - chance) / max(1 - chance, 1e-6)


def _taught(memory: DomainMemory, classes: Sequence[str], h: F32) -> tuple[F32, F32]:
    """Scores `(frames, classes)` of the two teachers in a memory, for hypervectors moved to the memory's mean.

    Each is brought to deviation 1, so that domains count equally."""
    order = [memory.classes.index(c) for c in classes]
    centre = memory.class_sums.sum(axis=0) / memory.n
    offsets = memory.class_sums / np.maximum(memory.counts, 1)[:, None] - centre
    offsets[memory.counts == 0] = 0
    offsets /= np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-12)
    moved = h - h.mean(axis=0)
    unit = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
    angle = unit @ offsets.T.astype(np.float32)
    ridge = readout(memory).scores(moved[:, : memory.m] + memory.mean.astype(np.float32))
    return _spread(angle)[:, order], _spread(ridge)[:, order]


def _spread(scores: F32) -> F32:
    out: F32 = scores / max(float((scores - scores.mean(axis=0)).std()), 1e-12)
    return out


def _uncentred(angle: F32, ridge: F32) -> F32:
    """Both teachers with their preferences among the classes left in: centring would hide that classes are missing."""
    out: F32 = angle + ridge - ridge.mean()
    return out


def _reverse(domain: Domain, classes: Sequence[str], h: F32, labels: I64) -> float:
    """Share of the known domain's codes that a readout fitted to the self-labels puts where the domain's own does."""
    m, own = domain.memory.m, readout(domain.memory)
    codes = domain.codes.astype(np.float32)
    back = readout(learn(h, labels, classes, m))
    shifted = codes - domain.memory.mean.astype(np.float32) + h[:, :m].mean(axis=0)
    theirs = np.array(domain.memory.classes)[own.scores(codes).argmax(axis=1)]
    return float((np.array(classes)[back.scores(shifted).argmax(axis=1)] == theirs).mean())


def _served(
    system: System, engine: Engine, features: Features, h: F32, route: NDArray[np.int64], classes: Sequence[str]
) -> F32:
    """What the serving system answers today, `(frames, classes)`: every head's scores on the frames routed to it,
    brought to a common scale; a class that a head does not know gets its lowest score."""
    given = {**features, HYPERVECTOR: h[:, : system.policy.memory_dimensions]}
    out = np.zeros((len(h), len(classes)), np.float32)
    for k in np.unique(route):
        head, rows = system.domains[int(k)].head, np.flatnonzero(route == k)
        scores = engine.scores(head, {t: given[t][rows] for t in head.spec.inputs})
        scores = scores - scores.mean(axis=1, keepdims=True)
        scores = scores / max(float(scores.std()), 1e-12)
        for c, name in enumerate(classes):
            out[rows, c] = scores[:, head.classes.index(name)] if name in head.classes else scores.min(axis=1)
    return out
