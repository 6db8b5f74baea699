"""`edgeear bench ood`: our novelty score and published ones, on the same features.

Rules of this file:

1. Every score is fitted on the known domain's training images alone and scored on both test splits; larger = more
   novel. No score sees the unknown domain before it is measured.
2. The anchors are published scores; their docstrings say what differs. `concatenated` is the control that any bundling
   of taps must beat: the same taps without a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from adaptors.progress import Progress
from device.evaluation.data import I64, DataOptions, DomainData, EvalData, open_encoder, read_domains
from device.evaluation.result import OodResult, PairScores, Separation
from device.provenance import machine
from device.provenance import versions as installed_versions
from edgeear.errors import UsageError
from edgeear.memory import learn
from edgeear.metrics import auroc, fpr95
from edgeear.novelty import calibrate, detector
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.system import SystemPolicy
from edgeear.types import F32, Encoder, Features

NEIGHBOURS = 50
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Scores = Callable[[DomainData], F32]
"""Novelty `(samples,)` of a domain's test images."""


@dataclass(frozen=True)
class OodOptions(DataOptions):
    """Options of `edgeear bench ood`, beside those of the images."""

    policy: SystemPolicy = field(default_factory=SystemPolicy)
    date: str | None = None


def bench_ood(
    options: OodOptions, on_progress: Progress = lambda *_: None, *, encoder: Encoder | None = None
) -> OodResult:
    """Every score on every ordered pair of domains, and the mean of each.

    Raises `UsageError` for fewer than two domains, and what reading the images raises.
    """
    if encoder is None:
        encoder, _ = open_encoder(options)
    data = read_domains(options, encoder, on_progress, views=("plain",))
    if len(data.domains) < 2:
        raise UsageError(f"{len(data.domains)} domain: at least 2 are needed, a known and an unknown one")
    pairs: list[PairScores] = []
    for done, known in enumerate(data.domains):
        on_progress(f"{known.name}: scores", done, len(data.domains))
        pairs += _pairs(data, known, options)
    return OodResult(
        pairs=tuple(pairs),
        mean={name: _mean([p.scores[name] for p in pairs]) for name in pairs[0].scores},
        domains=tuple(d.name for d in data.domains),
        seed=options.seed,
        shots=options.shots,
        encoder_digest=encoder.digest,
        warnings=data.warnings,
        date=options.date,
        machine=machine(),
        versions=installed_versions(),
    )


def _pairs(data: EvalData, known: DomainData, options: OodOptions) -> list[PairScores]:
    scores = fitted(data, known, options.policy.memory_dimensions, options.seed)
    inside = {name: score(known) for name, score in scores.items()}
    found = []
    for unknown in data.domains:
        if unknown is not known:
            figures = {name: _separation(inside[name], score(unknown)) for name, score in scores.items()}
            found.append(PairScores(known=known.name, unknown=unknown.name, scores=figures))
    return found


def _separation(inside: F32, outside: F32) -> Separation:
    return Separation(auroc=auroc(inside, outside), fpr95=fpr95(inside, outside))


def _mean(figures: list[Separation]) -> Separation:
    return Separation(
        auroc=float(np.mean([f.auroc for f in figures])), fpr95=float(np.mean([f.fpr95 for f in figures]))
    )


def fitted(data: EvalData, known: DomainData, m: int, seed: int) -> dict[str, Scores]:
    """All scores, fitted on the training images of `known`."""
    x, last = known.train[0], last_tap(data.space)
    own = known.samples(data.classes)
    labels, classes = own.labels, own.classes
    calibration = calibrate(known.train_h, labels, classes, m, seed=seed)
    detect = detector(learn(known.train_h, labels, classes, m))
    flat = HypervectorSpace(data.space.taps, SpacePolicy(magnitude_scale=0.0, shallow_weight=1.0))
    bundled = nearest_mean(flat.encode(x), labels)
    single = nearest_mean(unit(x[last]), labels)
    joined = nearest_mean(concatenated(data.space, x), labels)
    distance = mahalanobis(x[last])
    neighbours = nearest_neighbours(x[last], NEIGHBOURS)
    softmax = maximum_softmax(x[last], labels, seed)
    return {
        "edgeear": lambda d: calibration.novelty(detect, d.test_h),
        "angle": lambda d: detect.angle(d.test_h),
        "leverage": lambda d: detect.leverage(d.test_h),
        "hdff": lambda d: bundled(flat.encode(d.test)),
        "concatenated": lambda d: joined(concatenated(data.space, d.test)),
        "nearest_class_mean": lambda d: single(unit(d.test[last])),
        "mahalanobis": lambda d: distance(d.test[last]),
        "knn": lambda d: neighbours(d.test[last]),
        "msp_ridge": lambda d: softmax(d.test[last]),
    }


def last_tap(space: HypervectorSpace) -> str:
    """The deepest mean of a feature map, as published scores use it; without one, the last tap."""
    means = [t.name for t in space.taps if t.name.endswith(".mean")]
    return means[-1] if means else space.taps[-1].name


def unit(x: F32) -> F32:
    """Rows of `x (samples, channels)` scaled to length one. A zero row stays zero."""
    out: F32 = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))
    return out


def concatenated(space: HypervectorSpace, features: Features) -> F32:
    """All taps concatenated, each scaled to length one: `(samples, sum of channels)`."""
    return np.concatenate([unit(features[t.name]) for t in space.taps], axis=1)


# ----------------------------------------------------------------------------------------------- the anchors


def nearest_mean(x: F32, labels: I64) -> Callable[[F32], F32]:
    """One minus the cosine to the nearest class mean. After a bundling projection this is HDFF (Wilson et al., WACV
    2023), here without its centring of maps and with seeded, structured projections."""
    means = unit(np.stack([x[labels == c].mean(axis=0) for c in np.unique(labels)]))
    return lambda y: 1 - (unit(y) @ means.T).max(axis=1)


def mahalanobis(x: F32) -> Callable[[F32], F32]:
    """Squared Mahalanobis distance from the one mean of all classes, covariance shrunk as in our own detector."""
    n, width = x.shape
    mean, centred = x.mean(axis=0), (x - x.mean(axis=0)).astype(np.float64)
    ratio = 0.02 + 0.3 * width / (width + n)
    covariance = centred.T @ centred / n
    level = max(float(np.trace(covariance)) / width, 1e-12)
    lower = np.linalg.cholesky((1 - ratio) * covariance + ratio * level * np.eye(width))
    whitener = np.linalg.inv(lower).T.astype(np.float32)
    return lambda y: np.square((y - mean) @ whitener).sum(axis=1)


def nearest_neighbours(x: F32, k: int) -> Callable[[F32], F32]:
    """Distance to the k-th nearest training image on the unit sphere (Sun et al., ICML 2022)."""
    stored, k = unit(x), min(k, len(x))

    def score(y: F32) -> F32:
        similarity = unit(y) @ stored.T
        kth = np.partition(similarity, len(stored) - k, axis=1)[:, len(stored) - k]
        out: F32 = np.sqrt(np.maximum(2 - 2 * kth, 0))
        return out

    return score


def maximum_softmax(x: F32, labels: I64, seed: int) -> Callable[[F32], F32]:
    """One minus the largest softmax probability (Hendrycks & Gimpel, ICLR 2017) of a ridge classifier, whose
    temperature is the likeliest on a fifth of the training images that the classifier did not see."""
    order = np.random.default_rng(seed).permutation(len(x))
    held, kept = order[: len(x) // 5], order[len(x) // 5 :]
    classes = int(labels.max()) + 1
    trial = _ridge(x[kept], labels[kept], classes)(x[held])
    losses = [-_log_softmax(trial / t)[np.arange(len(held)), labels[held]].mean() for t in TEMPERATURES]
    temperature = TEMPERATURES[int(np.argmin(losses))] if len(held) else 0.1
    classify = _ridge(x, labels, classes)
    return lambda y: 1 - np.exp(_log_softmax(classify(y) / temperature)).max(axis=1)


def _ridge(x: F32, labels: I64, classes: int) -> Callable[[F32], F32]:
    """Class scores of ridge regression onto one-hot labels, of standardised features, strength 0.1."""
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    scale = 1 / (deviation + 1e-2 * deviation.mean() + 1e-6)
    z = ((x - mean) * scale).astype(np.float64)
    targets = np.eye(classes)[labels]
    share = targets.mean(axis=0)
    system = z.T @ z + 0.1 * float(np.square(z).sum() / len(z)) * np.eye(z.shape[1])
    weight = np.linalg.solve(system, z.T @ (targets - share)).astype(np.float32)
    offset = share.astype(np.float32)
    return lambda y: ((y - mean) * scale) @ weight + offset


def _log_softmax(scores: F32) -> F32:
    shifted = scores - scores.max(axis=1, keepdims=True)
    out: F32 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return out
