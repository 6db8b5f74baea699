"""Search and training of one head, on the learning side only: this file imports torch through `adaptors`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from adaptors.archive import HeadArchive, pack

from adaptors.search import Scored, SearchPolicy, search
from adaptors.search_space import BUDGETS, SearchSpace
from adaptors.train import TrainPolicy, train

if TYPE_CHECKING:
    from edgeear.flow import AdaptPolicy, Progress, Samples

PICTURE_POINTS = 400
"""Specifications kept of a search for the report's picture."""


def grow_head(
    samples: Samples, policy: AdaptPolicy, seed: int, on_progress: Progress
) -> tuple[HeadArchive, dict[str, object]]:
    """The head that search picked, fitted, and the JSON-able record of how it came about."""
    budget = policy.budget or BUDGETS["medium"]
    plain = samples.views[0]
    shapes = {t: tuple(x.shape[1:]) for t, x in plain.items() if policy.spatial or x.ndim == 2}
    space = SearchSpace(shapes, len(samples.classes))
    found = search(
        space,
        budget,
        plain,
        samples.labels,
        policy.search or SearchPolicy(seed=seed),
        lambda i, n: on_progress("search", i, n),
    )
    spec = found.best.spec
    on_progress("train", 0, 1)
    fitted = train(
        spec,
        shapes,
        samples.views,
        samples.labels,
        len(samples.classes),
        policy.train or TrainPolicy(seed=seed),
        lambda i, n: on_progress("train", i, n),
    )
    on_progress("train", 1, 1)
    head = pack(spec, {t: shapes[t] for t in spec.inputs}, samples.classes, fitted.weights, seed)
    growth: dict[str, object] = {
        "spec": spec.to_dict(),
        "explanation": found.explanation,
        "parameters": found.best.cost.parameters,
        "bytes": len(head.onnx),
        "macs": found.best.cost.macs,
        "latency_ms_predicted": found.best.cost.latency_ms,
        "specs_scored": len(found.ranking),
        "validation_accuracy": None if np.isnan(fitted.validation_accuracy) else fitted.validation_accuracy,
        "chosen_by": fitted.chosen,
        "candidates": [_point(s, s is found.best) for s in _thinned(found.ranking)],
    }
    return head, growth


def _thinned(ranking: tuple[Scored, ...]) -> tuple[Scored, ...]:
    step = max(1, -(-len(ranking) // PICTURE_POINTS))
    return ranking[::step]


def _point(s: Scored, chosen: bool) -> dict[str, object]:
    return {"parameters": s.cost.parameters, "score": s.score, "chosen": chosen, "operator": s.spec.operator}
