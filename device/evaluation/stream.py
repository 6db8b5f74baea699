"""The evaluation on streams: the delay of declared shifts, and the number of false alarms.

Streams are drawn in a seeded order from test images, and for a new domain from its training images, too. The shift test
takes the conditional p-values of the verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from adaptors.progress import Progress
from device.evaluation.data import DomainData
from device.evaluation.result import ShiftFigures
from edgeear.flow import judge
from edgeear.shift import ShiftPolicy, ShiftState, observe
from edgeear.system import System
from edgeear.types import F32

WARMUP = 300
"""Samples of the known domains before the new domain begins."""
QUIET = 10_000
"""Samples of a known domain; every alarm in them is false."""


def shifts(
    systems: Sequence[System], domains: Sequence[DomainData], seed: int, on_progress: Progress
) -> tuple[ShiftFigures, ...]:
    """Every step of the order: the system after `domains[:i]` meets domain i."""
    found = []
    for i in range(1, len(domains)):
        on_progress("shift", i - 1, len(domains) - 1)
        found.append(_shift(systems[i - 1], domains[:i], domains[i], seed))
    return tuple(found)


def _shift(system: System, old: Sequence[DomainData], new: DomainData, seed: int) -> ShiftFigures:
    names = {"from": old[-1].name, "to": new.name}
    if not system.domains:  # nothing was learned, so there is no known domain to leave
        return ShiftFigures.model_validate(
            {**names, "detected": False, "delay_samples": None, "warmup": 0, "early_alarms": 0}
        )
    rng = np.random.default_rng([seed, len(old)])
    seen = _p_values(system, [d.test_h for d in old])
    before = seen[rng.integers(len(seen), size=WARMUP)]
    test, train = (_p_values(system, [h]) for h in (new.test_h, new.train_h))
    after = np.concatenate([rng.permutation(test), rng.permutation(train)])
    state, early = _alarms(before, system.policy.shift)
    delay = _first(state, after, system.policy.shift)
    figures = {"detected": delay is not None, "delay_samples": delay, "warmup": WARMUP, "early_alarms": early}
    return ShiftFigures.model_validate({**names, **figures})


def false_alarms(system: System, domains: Sequence[DomainData], seed: int, on_progress: Progress) -> float:
    """Alarms in 10,000 test images of each known domain, drawn with replacement; the mean over domains."""
    counts = []
    for k, domain in enumerate(domains):
        on_progress("false alarms", k, len(domains))
        p = _p_values(system, [domain.test_h])
        drawn = np.random.default_rng([seed, k]).integers(len(p), size=QUIET)
        counts.append(_alarms(p[drawn], system.policy.shift)[1])
    return float(np.mean(counts)) if counts else 0.0


def _p_values(system: System, hypervectors: Iterable[F32]) -> F32:
    return np.concatenate([judge(system, h).conditional_p for h in hypervectors])


def _alarms(p: F32, policy: ShiftPolicy) -> tuple[ShiftState, int]:
    """The state after the samples, restarted at every alarm, and how many alarms there were."""
    state, count = ShiftState(), 0
    for value in p:
        state, shift = observe(state, float(value), policy)
        if shift is not None:
            state, count = state.restart(), count + 1
    return state, count


def _first(state: ShiftState, p: F32, policy: ShiftPolicy) -> int | None:
    """The number of the sample, from 1, at which the shift is declared. None if it never is."""
    for at, value in enumerate(p, start=1):
        state, shift = observe(state, float(value), policy)
        if shift is not None:
            return at
    return None
