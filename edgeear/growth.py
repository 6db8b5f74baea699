"""Search and training of one head, on the learning side only: this file imports torch through `adaptors`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from adaptors.archive import HeadArchive, pack
from adaptors.latency import DEFAULT
from adaptors.modules import Weights
from adaptors.progress import Progress
from adaptors.search import Scored, SearchPolicy, SearchResult, search
from adaptors.search_space import BUDGETS, Budget, SearchSpace
from adaptors.spec import HeadSpec
from adaptors.train import TrainPolicy, accuracy, train
from edgeear.errors import DataError, UsageError
from edgeear.novelty import MINIMUM
from edgeear.samples import AdaptPolicy, Samples

QUANTISATION_LOSS = 0.005
"""Accuracy on the labelled samples, fraction of one, that int8 weights may lose; a head that loses more stays fp32."""
PICTURE_POINTS = 400
"""Specifications kept of a search for the report's picture, beside the Pareto front."""


def check(samples: Samples) -> None:
    """Check samples before a search spends minutes on them. Raises `DataError` for fewer samples than can be calibrated
    and for NaN or infinite features, `UsageError` for labels, classes and views that do not fit each other."""
    n, labels, classes = len(samples.labels), samples.labels, samples.classes
    if n < MINIMUM:
        raise DataError(f"domain {samples.name!r} has {n} labelled samples, at least {MINIMUM} are needed: label more")
    if not np.issubdtype(labels.dtype, np.integer) or not 0 <= labels.min() <= labels.max() < len(classes):
        span = f"{labels.dtype} labels from {labels.min()} to {labels.max()}"
        raise UsageError(f"{span}: they must be integers that index the {len(classes)} classes")
    if len(set(classes)) < len(classes):
        raise UsageError(f"classes must be distinct: got {list(classes)}")
    shapes = [{t: x.shape for t, x in view.items()} for view in samples.views]
    if not shapes or any(s != shapes[0] for s in shapes) or any(s[0] != n for s in shapes[0].values()):
        raise UsageError(f"views of shapes {shapes}: give at least one, all alike, with {n} samples like the labels")
    for view in samples.views:
        for tap, x in view.items():
            bad = n - int(np.isfinite(x.reshape(n, -1)).all(axis=1).sum())
            if bad:
                raise DataError(f"tap {tap} has NaN or infinite features in {bad} of {n} samples: check the encoder")


def grow_head(
    samples: Samples, policy: AdaptPolicy, seed: int, on_progress: Progress
) -> tuple[HeadArchive, dict[str, object]]:
    """The head that search picked, fitted, and the JSON-able record of how it was made."""
    budget = policy.budget or BUDGETS["medium"]
    plain = samples.views[0]
    shapes = {t: tuple(x.shape[1:]) for t, x in plain.items() if policy.spatial or x.ndim == 2}
    space = SearchSpace(shapes, len(samples.classes), policy.latency or DEFAULT)
    found = search(
        space,
        budget,
        plain,
        samples.labels,
        replace(policy.search or SearchPolicy(), seed=seed),
        on_progress,
    )
    picked = found.best.spec
    on_progress("train", 0, 1)
    fitted = train(
        replace(picked, bits=32),  # training ignores bits: they round its result
        shapes,
        samples.views,
        samples.labels,
        len(samples.classes),
        replace(policy.train or TrainPolicy(), seed=seed),
        on_progress,
    )
    on_progress("train", 1, 1)
    spec, quantised = _quantised(picked, fitted.weights, samples, space, budget, seed)
    price = space.cost(spec)
    head = pack(spec, {t: shapes[t] for t in spec.inputs}, samples.classes, fitted.weights, seed)
    growth: dict[str, object] = {
        "spec": spec.to_dict(),
        "explanation": found.explanation,
        "parameters": price.parameters,
        "bytes": len(head.onnx),
        "macs": price.macs,
        "latency_ms_predicted": price.latency_ms,
        "quantised": quantised,
        "specs_scored": len(found.ranking),
        "validation_accuracy": None if np.isnan(fitted.validation_accuracy) else fitted.validation_accuracy,
        "validated_on": fitted.validated,
        "temperature": fitted.temperature,
        "chosen_by": fitted.chosen,
        "candidates": [_point(s, found) for s in _shown(found)],
    }
    return head, growth


def _quantised(
    spec: HeadSpec, weights: Weights, samples: Samples, space: SearchSpace, budget: Budget, seed: int
) -> tuple[HeadSpec, str | None]:
    """The specification to store a fitted head by, and what was found: a head of int8 whose answers suffer stays fp32,
    if the budget has room for it. The same samples, plain, go through both."""
    if spec.bits == 32:
        return spec, None
    full = replace(spec, bits=32)
    both = [
        accuracy(s, space.shapes, weights, samples.views[0], samples.labels, space.classes, seed) for s in (full, spec)
    ]
    loss = both[0] - both[1]
    if loss <= QUANTISATION_LOSS:
        return spec, f"int8: loses {max(0.0, 100 * loss):.1f} points"
    if not budget.admits(space.cost(full)):
        return spec, f"kept int8: loses {100 * loss:.1f} points, but fp32 exceeds the budget"
    return full, f"kept fp32: int8 loses {100 * loss:.1f} points"


def _shown(found: SearchResult) -> list[Scored]:
    """The chosen head, the Pareto front, and every so many of the others, best first."""
    step = max(1, -(-len(found.ranking) // PICTURE_POINTS))
    wanted = {id(s) for s in (found.best, *found.front, *found.ranking[::step])}
    return [s for s in found.ranking if id(s) in wanted]


def _point(s: Scored, found: SearchResult) -> dict[str, object]:
    return {
        "parameters": s.cost.parameters,
        "bytes": s.cost.bytes,
        "latency_ms": s.cost.latency_ms,
        "score": s.score,
        "chosen": s is found.best,
        "front": any(s is f for f in found.front),
        "operator": s.spec.operator,
    }
