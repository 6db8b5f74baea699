"""Detectors side by side: unseen domain (covariate), unseen class (near), textures (far), apart.

A job is one data set and one seed; it gives rows {data, setting, known, unknown, detector, auroc,
fpr95} and, for the first seed, what the detectors cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.anchor_detectors import Fitted, fit_all
from benchmarks.data import DataSet, Inputs, Split, seeded, whole
from edgeear.metrics import auroc, fpr95

Row = dict[str, object]
TIMED, REPEATS = 256, 3
NEAR_SPLITS = {"pacs": 2, "digits": 1, "cwru": 1}
"""Draws of held-out classes for each domain and seed."""


def detect(name: str, seed: int) -> list[Row]:
    """All settings for every domain of a data set as the known one."""
    data = seeded(name, seed)
    return [{**row, "seed": seed} for domain in data.domains for row in _known(data, domain, seed)]


def _known(data: DataSet, domain: Split, seed: int) -> list[Row]:
    fitted = fit_all(domain.train, domain.train_labels, seed)
    rows = [*_against(data, domain, fitted, _strangers(data, domain))]
    if seed == 0:
        rows += [_cost(data.name, domain, label, found) for label, found in fitted.items()]
    for part in range(NEAR_SPLITS[data.name]):
        rows += _near(data, domain, seed, part)
    return rows


def _strangers(data: DataSet, domain: Split) -> Iterable[tuple[str, str, Inputs]]:
    """(setting, name, images) that are foreign to `domain`."""
    for other in data.domains:
        if other is not domain:
            yield _setting(data.name, domain.name, other.name), other.name, other.test
    if data.name == "pacs":
        for d in whole("textures").domains:
            for part in (d.train, d.test):
                space = domain.test.space
                yield "far", "textures (train)" if part is d.train else "textures (test)", Inputs(part.features, space)


def _setting(name: str, known: str, unknown: str) -> str:
    if name != "cwru":
        return "covariate"
    return "covariate, speed" if known[:2] == unknown[:2] else "covariate, bearing end"


def _against(
    data: DataSet, domain: Split, fitted: dict[str, Fitted], strangers: Iterable[tuple[str, str, Inputs]]
) -> list[Row]:
    inside = {label: found.score(domain.test) for label, found in fitted.items()}
    rows = []
    for setting, unknown, images in strangers:
        for label, found in fitted.items():
            outside = found.score(images)
            where: Row = {"data": data.name, "setting": setting, "known": domain.name, "unknown": unknown}
            figures: Row = {"auroc": auroc(inside[label], outside), "fpr95": fpr95(inside[label], outside)}
            rows.append({**where, "detector": label, **figures})
    return rows


def _near(data: DataSet, domain: Split, seed: int, part: int) -> list[Row]:
    """Some classes are never shown: their test images against those of the others."""
    present = np.unique(domain.train_labels)
    held = np.random.default_rng([seed, part, 7]).permutation(present)[: max(1, len(present) // 3)]
    train, test = ~np.isin(domain.train_labels, held), ~np.isin(domain.test_labels, held)
    space = domain.train.space
    seen = Split(
        domain.name,
        domain.train.take(train),
        domain.train_labels[train],
        domain.test.take(test),
        domain.test_labels[test],
    )
    strangers = Inputs({t: x[~test] for t, x in domain.test.features.items()}, space)
    fitted = fit_all(seen.train, seen.train_labels, seed)
    return _against(data, seen, fitted, [("near", f"unseen classes {part + 1}", strangers)])


def _cost(name: str, domain: Split, label: str, found: Fitted) -> Row:
    return {
        "data": name,
        "known": domain.name,
        "detector": label,
        "bytes": found.bytes,
        "exemplars": found.exemplars,
        "us": microseconds(found.score, domain.test),
    }


def microseconds(score: Callable[[Inputs], object], images: Inputs) -> float:
    """A sample of a batch, from the features on, codes included: the best of some repeats."""
    some = images.take(np.arange(min(TIMED, len(images))))
    score(some.fresh())
    spent = []
    for _ in range(REPEATS):
        fresh = some.fresh()
        start = time.perf_counter()
        score(fresh)
        spent.append(time.perf_counter() - start)
    return 1e6 * min(spent) / len(some)
