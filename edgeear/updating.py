"""More samples of a known domain: its sums grow by theirs, exactly, and its head follows.

Rules of this file:

1. The memory is that of having learned all samples at once.
2. The head that serves stays unless one that is refitted from the sums does better. Both are measured on the new
   samples, which neither was fitted to: the refitted one leaves each out in turn. New classes always refit.
3. Calibration values of older samples stay: a detector of more samples finds its own domain less novel, not more, so
   p-values can only grow. New scenes are scored by a detector without them, by their first frames, and join.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adaptors.archive import HeadArchive
from adaptors.hadamard import permutation
from adaptors.temperature import fit_temperature
from edgeear.admission import admit
from edgeear.incremental import left_out, readout, refit
from edgeear.memory import I64, DomainMemory, learn, merge, rounded, subtract
from edgeear.novelty import LIMIT, Calibration, detector
from edgeear.scenes import likeness, scene_code, scenes_of
from edgeear.system import HYPERVECTOR, Candidate, Domain, Engine, Rejected, System
from edgeear.types import F32, Features

FOLDS = 10


def update_domain(
    system: System, engine: Engine, name: str, features: Features, labels: I64, classes: Sequence[str], seed: int
) -> Candidate | Rejected:
    """The system whose domain `name` also knows these samples: `features` hold `system.wanted_taps` of each, `labels
    (samples,)` index `classes`, which may be new. Needs onnx (the `learn` extra). Raises `UsageError` for an unknown
    domain.
    """
    domain = system.domain(name)
    h = system.space.encode(features)
    memory = merge(domain.memory, learn(h, labels, classes, domain.memory.m))
    names = np.array([memory.classes.index(c) for c in classes])[labels]
    order = permutation(seed, "update", len(h))
    scene = scenes_of(scene_code(h), names, system.policy.shift.alike)
    calibration = _joined(domain, memory, h, names, scene, seed)
    codes = _codes(domain, h[order, : memory.m].astype(np.float16), system.policy.codes)
    some = order[: system.policy.codes]
    alike = max(domain.likeness, likeness(scene_code(h[some]), scene[some]))
    head, growth = _head(domain, engine, rounded(memory), features, h, names)
    updated = Domain(name, head, rounded(memory), calibration, codes, growth, alike)
    return admit(system, updated)


def _head(
    domain: Domain, engine: Engine, memory: DomainMemory, features: Features, h: F32, labels: I64
) -> tuple[HeadArchive, dict[str, object]]:
    """The head that serves from now on, and its record; `labels` index the memory's classes."""
    fitted = left_out(memory, readout(memory), h, labels)
    refitted = float((fitted.argmax(axis=1) == labels).mean())
    if set(memory.classes) == set(domain.head.classes):
        own = engine.scores(domain.head, {**features, HYPERVECTOR: np.ascontiguousarray(h[:, : memory.m])})
        index = np.array([memory.classes.index(c) for c in domain.head.classes])
        kept = float((index[own.argmax(axis=1)] == labels).mean())
        if kept >= refitted:
            return domain.head, {**domain.growth, "validation_accuracy": kept, "validated_on": len(h)}
    head, growth = refit(memory)
    found = {"validation_accuracy": refitted, "validated_on": len(h), "temperature": fit_temperature(fitted, labels)}
    return head, {**growth, **found}


def _joined(domain: Domain, memory: DomainMemory, h: F32, labels: I64, scene: I64, seed: int) -> Calibration:
    """The domain's calibration with the novelties of the scenes of `h`, each scored by a detector without its fold."""
    old, first = domain.calibration, np.unique(scene, return_index=True)[1]
    novelty = np.empty(len(first), np.float32)
    for fold in np.array_split(permutation(seed, "update", len(first)), min(FOLDS, len(first))):
        held = np.isin(scene, fold)
        rest = detector(rounded(subtract(memory, learn(h[held], labels[held], memory.classes, memory.m))))
        novelty[fold] = old.novelty(rest, h[first[fold]])
    values = np.concatenate([old.values, novelty])
    return replace(old, values=values[permutation(seed, "calibration", len(values))[:LIMIT]])


def _codes(
    domain: Domain, new: np.ndarray[tuple[int, ...], np.dtype[np.float16]], limit: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """Codes of older and new samples in proportion to their numbers, at most `limit`; both come in random order."""
    share = round(limit * domain.memory.n / (domain.memory.n + len(new)))
    mine = min(len(domain.codes), max(share, limit - len(new)))
    return np.concatenate([domain.codes[:mine], new[: limit - mine]])
