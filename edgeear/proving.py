"""Proof that domains can answer: the last check before a system is stored and serves, and the first at a start.

Rules of this file:

1. A domain is asked as the stream will ask it, through route, verdict and head, on features made up for every tap. It
   is asked alone, and no encoder runs, so a fault found here is the domain's.
2. A head or memory from elsewhere may fail in any way. Whatever it raises is a reason, never an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from edgeear.flow import infer_features, judge
from edgeear.shift import ShiftState
from edgeear.system import Candidate, Domain, Engine, Rejected, System
from edgeear.types import F32, Tap

LIMIT_S = 1.0
"""Most seconds that route, verdict and head of one input may take."""


def prove(
    candidate: Candidate, engine: Engine, taps: Sequence[Tap], clock: Callable[[], float]
) -> Candidate | Rejected:
    """`candidate`, or why a domain that it changes cannot serve. `taps` are the encoder's, `clock` gives seconds."""
    new = [d for d in candidate.system.domains if all(d is not old for old in candidate.base.domains)]
    for domain in new:
        reason = fault(candidate.system, domain, engine, taps, clock)
        if reason is None:
            reason = _caught(lambda: _route_fault(candidate.system, taps))
        if reason is not None:
            return Rejected(domain.name, (reason,))
    return candidate


def fault(
    system: System, domain: Domain, engine: Engine, taps: Sequence[Tap], clock: Callable[[], float]
) -> str | None:
    """Why a domain of `system` cannot serve, asked alone; None where it can."""
    return _caught(lambda: _fault(system, domain, engine, taps, clock))


def _caught(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:
        return f"cannot answer ({type(error).__name__}: {error}): learn it again, or restore a backup"


def _fault(
    system: System, domain: Domain, engine: Engine, taps: Sequence[Tap], clock: Callable[[], float]
) -> str | None:
    shapes = {t.name: t.shape for t in taps}
    for tap in system.taps_for(domain):
        if shapes.get(tap) != domain.head.shapes[tap]:
            return f"head reads {tap} {domain.head.shapes[tap]}, the encoder gives {shapes.get(tap, 'no such tap')}"
    alone = replace(system, domains=(domain,), policy=replace(system.policy, abstain_below=0.0))
    features = _features(alone, taps)
    infer_features(alone, engine, ShiftState(), dict(features))  # opens the head's session, which takes longer
    started = clock()
    answer = infer_features(alone, engine, ShiftState(), dict(features))[0]
    took, classes = clock() - started, len(domain.head.classes)
    if took > LIMIT_S:
        return f"takes {took:.1f} s for one input, at most {LIMIT_S:g} s allowed: learn it with a smaller budget"
    if answer.scores.shape != (classes,):
        return f"head gives {answer.scores.shape} scores for {classes} classes"
    if not (np.isfinite(answer.scores).all() and np.isfinite(answer.novelty)):
        return "head or verdict gives NaN or infinity for finite features"
    if not abs(sum(answer.probabilities.values()) - 1) < 1e-3:
        return f"probabilities add up to {sum(answer.probabilities.values()):g}, not to 1"
    return None


def _route_fault(system: System, taps: Sequence[Tap]) -> str | None:
    h = system.space.encode(_features(system, taps))
    verdict, scores = judge(system, h), system.router.scores(h)
    finite = np.isfinite(verdict.novelty).all() and np.isfinite(scores).all()
    return None if finite else "route or verdict gives NaN or infinity for finite features"


def _features(system: System, taps: Sequence[Tap]) -> dict[str, F32]:
    """One made-up sample of every tap that `system` reads."""
    rng, wanted = np.random.default_rng(0), system.wanted_taps
    return {t.name: np.abs(rng.standard_normal((1, *t.shape), np.float32)) for t in taps if t.name in wanted}
