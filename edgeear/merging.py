"""Two domains that turn out to be one are merged, on request; the result passes admission like any other.

Rules of this file:

1. Memories add up: what the merged domain knows is what one domain would have learned from the samples of both.
2. No sample is at hand, so the head is refitted from the merged sums, or on request kept from one of the two, if it
   knows every class of both.
3. Calibration values stay valid because they only move up: in the common units each value is at least what its sample
   would have scored, so p-values can only grow. With more samples a detector finds its own domain less novel, not more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeear.admission import admit
from edgeear.errors import UsageError
from edgeear.incremental import refit
from edgeear.memory import merge, rounded
from edgeear.novelty import Calibration
from edgeear.system import Candidate, Domain, Rejected, System
from edgeear.types import F32

HeadChoice = Literal["refit", "first", "second"]


def merge_domains(system: System, first: str, second: str, head: HeadChoice = "refit") -> Candidate | Rejected:
    """The system in which `first` also is what `second` was, under the name `first`.

    `head`: "refit" fits one to the merged sums, which needs onnx (the `learn` extra); "first" or "second" keeps that
    domain's. Raises UsageError for unknown or equal names.
    """
    a, b = system.domain(first), system.domain(second)
    if a is b:
        raise UsageError(f"{first!r} cannot be merged with itself: name two domains of {', '.join(system.names)}")
    memory = rounded(merge(a.memory, b.memory))
    source = b if head == "second" else a
    if head == "refit":
        served, growth = refit(memory)
    elif missing := set(memory.classes).difference(source.head.classes):
        return Rejected(first, (f"the head of {source.name!r} does not know {', '.join(sorted(missing))}: refit one",))
    else:
        served, growth = source.head, dict(source.growth)
    if seen := {label: a.seen.get(label, "") + b.seen.get(label, "") for label in {**a.seen, **b.seen}}:
        growth["seen"] = seen
    codes = _shared(a, b, system.policy.codes)
    calibration, alike = merge_calibrations(a.calibration, b.calibration), max(a.likeness, b.likeness)
    merged = Domain(first, served, memory, calibration, codes, growth, alike)
    return admit(system, merged, absorbed=second)


def _shared(a: Domain, b: Domain, limit: int) -> NDArray[np.float16]:
    """Codes of both in proportion to their samples, at most `limit`; each keeps them in random order already."""
    if len(a.codes) + len(b.codes) <= limit:
        return np.concatenate([a.codes, b.codes])
    mine = round(limit * a.memory.n / max(a.memory.n + b.memory.n, 1))
    mine = min(max(mine, limit - len(b.codes)), len(a.codes))
    return np.concatenate([a.codes[:mine], b.codes[: limit - mine]])


def merge_calibrations(a: Calibration, b: Calibration) -> Calibration:
    """The calibration of both sets of values, in the units of all their samples together; commutes.

    A value is the larger of two standardised statistics, so neither statistic exceeds it. Each is taken back to its raw
    scale and into the common units, and the larger of the two bounds the sample's novelty from above.
    """
    share = len(a.values) / (len(a.values) + len(b.values))
    angle = _pooled(share, (a.angle_mean, a.angle_deviation), (b.angle_mean, b.angle_deviation))
    leverage = _pooled(share, (a.leverage_mean, a.leverage_deviation), (b.leverage_mean, b.leverage_deviation))
    common = replace(a, angle_mean=angle[0], angle_deviation=angle[1])
    common = replace(common, leverage_mean=leverage[0], leverage_deviation=leverage[1], delta=max(a.delta, b.delta))
    return replace(common, values=np.concatenate([_moved(a, common), _moved(b, common)]))


def _moved(given: Calibration, common: Calibration) -> F32:
    """Upper bounds of the values of `given` in the units of `common`, rounded up."""
    values = given.values.astype(np.float64)
    angle = values * given.angle_deviation + given.angle_mean
    leverage = values * given.leverage_deviation + given.leverage_mean
    moved = common.combine(angle.astype(np.float32), leverage.astype(np.float32))
    up: F32 = np.nextafter(moved, np.float32(np.inf))
    return up


def _pooled(share: float, a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """Mean and deviation of a mixture of `share` of `a` and the rest of `b`."""
    mean = share * a[0] + (1 - share) * b[0]
    square = share * (a[1] ** 2 + (a[0] - mean) ** 2) + (1 - share) * (b[1] ** 2 + (b[0] - mean) ** 2)
    return mean, float(np.sqrt(square))
