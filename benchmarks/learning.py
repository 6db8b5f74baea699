"""Learners side by side on PACS: domains in turn, and new classes in turn, without being told the domain; and routers.

A job is one protocol and one seed; it gives a row for each learner: the accuracy after each step, bytes and times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.anchor_learners import Learner, RanPAC, Standardised, learners
from benchmarks.anchor_routers import fit_all
from benchmarks.data import Inputs, seeded
from benchmarks.detection import Row, microseconds
from benchmarks.ours import Incremental
from device.evaluation.data import I64
from edgeear.metrics import bwt
from edgeear.types import F32

STEPS = (2, 2, 3)
SAME_BYTES = 2000
"""Random features at which RanPAC keeps about what ours keeps at m = 2048."""


def learn_domains(shots: int | None, seed: int) -> list[Row]:
    """Final accuracy over the domains of PACS in order, and backward transfer."""
    data = seeded("pacs", seed, shots)
    rows = []
    for name, (reads, make) in learners(len(data.classes), seed).items():
        learner, matrix = make(), []
        for domain in data.domains:
            learner.learn(_read(domain.train, reads), domain.train_labels)
            tests = [learner.predict(_read(d.test, reads)) == d.test_labels for d in data.domains]
            matrix.append([float(t.mean()) for t in tests])
        row: Row = {"learner": name, "shots": shots, "seed": seed, "final": float(np.mean(matrix[-1]))}
        row |= {"domains": matrix[-1], "bwt": bwt(np.array(matrix))}
        rows.append(row | _price(learner, data.domains[0].test, reads, len(data.domains)))
    return rows


def _read(images: Inputs, reads: str) -> F32:
    return {"taps": images.taps, "last": images.last}[reads] if reads != "h" else images.h


def _price(learner: Learner, images: Inputs, reads: str, domains: int) -> Row:
    spent = microseconds(lambda x: learner.predict(_read(x, reads)), images)
    return {"bytes": round(learner.bytes / domains), "exemplars": learner.exemplars, "us": spent}


def learn_classes(seed: int) -> list[Row]:
    """PACS joined over its domains, 2 + 2 + 3 classes in a seeded order: accuracy over all classes at the end."""
    data = seeded("pacs", seed)
    train, labels = _joined([(d.train, d.train_labels) for d in data.domains])
    test, truth = _joined([(d.test, d.test_labels) for d in data.domains])
    order = np.split(np.random.default_rng(seed).permutation(len(data.classes)), np.cumsum(STEPS)[:-1])
    rows = []
    for name, (reads, learner) in _incremental(len(data.classes), seed).items():
        steps = []
        for classes in order:
            new = np.isin(labels, classes)
            learner.learn(_read(train, reads)[new], labels[new])
            steps.append(
                float((learner.predict(_read(test, reads)) == truth)[np.isin(truth, _until(order, classes))].mean())
            )
        row: Row = {"learner": name, "seed": seed, "final": steps[-1], "steps": steps}
        rows.append(row | _price(learner, test, reads, 1))
    return rows


def _until(order: Sequence[I64], classes: I64) -> I64:
    seen: list[int] = []
    for step in order:
        seen += step.tolist()
        if step is classes:
            break
    return np.array(seen)


def _incremental(classes: int, seed: int) -> dict[str, tuple[str, Learner]]:
    wanted = ("NCM", "Deep SLDA", "FeCAM", "RanPAC", "joint ridge (ceiling)")
    found = {name: (reads, make()) for name, (reads, make) in learners(classes, seed).items() if name in wanted}
    found[f"RanPAC, {SAME_BYTES} features"] = ("taps", Standardised(RanPAC(classes, seed, SAME_BYTES)))
    found |= {f"edgeear, m = {m}": ("h", Incremental(m)) for m in (1024, 2048)}
    return found


def _joined(parts: Sequence[tuple[Inputs, I64]]) -> tuple[Inputs, I64]:
    taps = parts[0][0].features
    features = {t: np.concatenate([x.features[t] for x, _ in parts]) for t in taps}
    return Inputs(features, parts[0][0].space), np.concatenate([y for _, y in parts])


def route(name: str, seed: int) -> list[Row]:
    """Share of test images that each router sends to their own domain, domains counting equally."""
    data = seeded(name, seed)
    rows: list[Row] = []
    for label, router in fit_all(data.domains, seed).items():
        own = [float((router.route(d.test) == i).mean()) for i, d in enumerate(data.domains)]
        row: Row = {"data": name, "router": label, "seed": seed, "accuracy": float(np.mean(own)), "domains": own}
        rows.append(
            row | {"bytes": router.bytes, "joint": router.joint, "us": microseconds(router.route, data.domains[0].test)}
        )
    return rows
