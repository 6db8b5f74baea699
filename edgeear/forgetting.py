"""Forgetting on request, and which parts of a system are then as if the data had never been learned.

| what is forgotten | exact | not exact |
|---|---|---|
| a domain | router, verdicts, heads: the others are shared object for object | nothing |
| a class, its samples at hand | memory, codes, router, detector, the refitted head | calibration |
| a class, from sums alone | counts, class sums, prototypes, domain mean | covariance, codes, head, calibration |

Rules of this file:

1. Sums are subtracted. The Gram matrix is kept for a domain, not for each class (seven times the bytes for seven
   classes), so only the class's own samples can be subtracted exactly. They are checked against the class's sum.
2. Without them the class's part of the Gram matrix is taken to be its exact mean with the covariance that all classes
   share, as in linear discriminant analysis. The class keeps its weight in that covariance.
3. A trained head cannot unlearn a class. It is refitted in closed form from the remaining sums: the new head is one
   that never saw the class, but it reads the hypervector only.
4. Calibration values are scores without a class, and stay, as does the likeness: false verdicts stay bounded as far as
   the other classes are no more novel to the new detector than all were to the old one.
5. A request to forget is never refused for its cost at the router: the candidate's replay reports that cost.
6. "Exact" is to 1e-5 for sums in memory. Sums that were stored carry the rounding of float32, which a head of weak
   ridge may show in the fourth digit of its scores.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeear.admission import replay
from edgeear.errors import UsageError
from edgeear.incremental import readout, refit
from edgeear.memory import F64, DomainMemory, learn, rounded, subtract
from edgeear.system import Candidate, Domain, Rejected, System
from edgeear.types import F32

RESIDUE = 1e-3
"""Largest length of what is left of a class's sum after its samples were subtracted, relative to the sum: float32."""


def forget_domain(system: System, name: str) -> Candidate:
    """The system without the domain: it answers as one that never learned it. Raises UsageError for an unknown name."""
    after = system.without(name)
    return Candidate(system, after, replay(system, after) if after.domains else {})


def forget_class(system: System, name: str, label: str, seen: F32 | None = None) -> Candidate | Rejected:
    """The system whose domain `name` never answers with the class `label` again; see the table for what is exact.

    `seen (samples, D)` are the hypervectors of all samples of the class that were learned, None when they are gone. A
    domain that has no other class is forgotten whole. Needs onnx (the `learn` extra). Raises UsageError for an unknown
    domain or class, and for samples that are not those that were learned.
    """
    domain = system.domain(name)
    if label not in domain.memory.classes:
        raise UsageError(f"domain {name!r} has no class {label!r}: it knows {', '.join(domain.memory.classes)}")
    if len(domain.memory.classes) == 1:
        return forget_domain(system, name)
    if seen is None:
        memory, codes = without_class(domain.memory, label), domain.codes[~_looks_like(domain, label)]
    else:
        memory = without_samples(domain.memory, label, seen)
        theirs = {code.tobytes() for code in seen[:, : memory.m].astype(np.float16)}
        codes = domain.codes[np.array([code.tobytes() not in theirs for code in domain.codes], bool)]
    memory = rounded(memory)
    if memory.n < 2 or not len(codes):
        return Rejected(name, (f"only {memory.n} samples and {len(codes)} codes are left: forget the whole domain",))
    head, growth = refit(memory)
    growth["seen"] = {name: digests for name, digests in domain.seen.items() if name != label}
    after = system.grown(replace(domain, head=head, memory=memory, codes=codes, growth=growth))
    # Only what stays is replayed: where inputs of the forgotten class go no longer matters.
    return Candidate(system, after, replay(_with(system, replace(domain, codes=codes)), after))


def without_samples(memory: DomainMemory, label: str, seen: F32) -> DomainMemory:
    """`memory` as if the class and its samples `seen (samples, D)` had never been learned, exactly.

    Raises UsageError unless they are all samples of the class, up to the rounding of stored sums."""
    row = memory.classes.index(label)
    if len(seen) != memory.counts[row]:
        raise UsageError(f"{len(seen)} samples of {label!r} given, {memory.counts[row]} were learned: give all of them")
    left = subtract(memory, learn(seen, np.zeros(len(seen), np.int64), (label,), memory.m))
    residue, whole = (float(np.linalg.norm(x.class_sums[row])) for x in (left, memory))
    if residue > RESIDUE * max(whole, 1e-12):
        raise UsageError(
            f"what was given as {label!r} leaves {residue / whole:.2%} of the class's sum: "
            "give the samples that were learned, encoded by the same encoder"
        )
    return _dropped(left, row, left.gram)


def without_class(memory: DomainMemory, label: str) -> DomainMemory:
    """`memory` without the class, from its sums alone: exact but for the covariance within classes (rule 2)."""
    row, m, n = memory.classes.index(label), memory.m, memory.n
    between = np.zeros((m, m))
    for k, count in enumerate(memory.counts):
        if count:
            between += _outer(memory, k)
    share = memory.counts[row] / max(n, 1)
    gone = (_outer(memory, row) if memory.counts[row] else 0) + share * (memory.gram - between)
    return _dropped(memory, row, memory.gram - gone)


def _outer(memory: DomainMemory, row: int) -> F64:
    """The Gram matrix `(m, m)` of a class whose samples all equal its mean."""
    total = memory.class_sums[row, : memory.m]
    outer: F64 = np.outer(total, total) / memory.counts[row]
    return outer


def _dropped(memory: DomainMemory, row: int, gram: F64) -> DomainMemory:
    classes = tuple(c for k, c in enumerate(memory.classes) if k != row)
    return DomainMemory(classes, np.delete(memory.counts, row), np.delete(memory.class_sums, row, axis=0), gram)


def _looks_like(domain: Domain, label: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which codes a readout of the sums assigns to the class, `(codes,)`: codes are kept without a label."""
    if domain.memory.n < 2:
        return np.zeros(len(domain.codes), bool)
    taken = readout(domain.memory).scores(domain.codes.astype(np.float32)).argmax(axis=1)
    found: np.ndarray[tuple[int], np.dtype[np.bool_]] = taken == domain.memory.classes.index(label)
    return found


def _with(system: System, domain: Domain) -> System:
    """The same generation with `domain` in the place of the one with its name."""
    return replace(system, domains=tuple(domain if d.name == domain.name else d for d in system.domains))
