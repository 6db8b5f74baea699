"""Ours, published change detectors, and two controls, behind one function: stream -> the frames at which it alarms.

Every detector reads the same judged frames: ours the conditional p-values (and codes, to tell scenes), ADWIN,
Page-Hinkley and KSWIN of river the novelty, MMD (our own implementation) the codes. All restart after an alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from river import drift

from benchmarks.shift.streams import Stream
from edgeear.shift import ShiftPolicy, ShiftState, observe
from edgeear.system import System
from edgeear.types import F32

Alarms = Iterator[int]
Run = Callable[[Stream, System], Alarms]
"""Yields the frames of a stream, from 0, at which a shift is declared; stop reading and it stops working."""


@dataclass(frozen=True)
class Method:
    """`run(strictness)` of rising strictness; `strictness[default]` is the published default."""

    name: str
    run: Callable[[float], Run]
    strictness: tuple[float, ...] = (0.0,)
    default: int = 0


def ours(stream: Stream, system: System, scenes: bool = True, rate: float = 1e-6) -> Alarms:
    state, policy, alike = ShiftState(), ShiftPolicy(false_alarm_rate=rate), system.likeness
    for i, p in enumerate(stream.p.tolist()):
        state, shift = observe(state, p, policy, stream.codes[i] if scenes else None, alike)
        if shift is not None:
            state = state.restart()
            yield i


def _river(make: Callable[[float], object]) -> Callable[[float], Run]:
    def run(strictness: float) -> Run:
        def alarms(stream: Stream, _: System) -> Alarms:
            detector = make(strictness)
            for i, value in enumerate(stream.novelty.tolist()):
                detector.update(value)  # type: ignore[attr-defined]
                if detector.drift_detected:  # type: ignore[attr-defined]
                    detector = make(strictness)
                    yield i

        return alarms

    return run


WINDOW, REFERENCE, EVERY = 50, 100, 10


def _mmd(strictness: float) -> Run:
    """Maximum mean discrepancy (Gretton et al., JMLR 2012), our own implementation: the last 50 codes against 100 codes
    of the known domains, every 10 frames, Gaussian kernel of median width. Unbiased statistic; the threshold is the
    largest of 10 ** strictness windows of known codes, the width of 99 % at strictness 2."""

    def alarms(stream: Stream, system: System) -> Alarms:
        codes = np.concatenate([d.codes for d in system.domains]).astype(np.float32)
        rng = np.random.default_rng(0)
        reference = codes[rng.permutation(len(codes))[:REFERENCE]]
        width = float(np.median(_squared(reference, reference)))
        within = _mean_apart(np.exp(-_squared(reference, reference) / width))

        def statistic(window: F32) -> float:
            own = _mean_apart(np.exp(-_squared(window, window) / width))
            return own + within - 2 * float(np.exp(-_squared(window, reference) / width).mean())

        count = round(10 ** min(strictness, 3))
        null = [statistic(codes[rng.choice(len(codes), WINDOW, replace=False)]) for _ in range(count)]
        threshold = max(null) * 1.5 ** max(strictness - 3, 0)
        start = 0
        for i in range(len(stream)):
            due = i - start >= WINDOW and (i - start) % EVERY == 0
            if due and statistic(stream.codes[i - WINDOW : i]) > threshold:
                start = i
                yield i

    return alarms


def _squared(a: F32, b: F32) -> F32:
    out: F32 = np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T, 0)
    return out


def _mean_apart(kernel: F32) -> float:
    n = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))


METHODS = (
    Method("ours", lambda _: ours),
    Method("ours, rate 1e-4", lambda _: lambda stream, system: ours(stream, system, rate=1e-4)),
    Method("ours, every frame a sample", lambda _: lambda stream, system: ours(stream, system, scenes=False)),
    Method("ADWIN", _river(lambda s: drift.ADWIN(delta=10**-s)), (2.7, 4.0, 6.0, 9.0, 12.0), 0),
    Method("Page-Hinkley", _river(lambda s: drift.PageHinkley(threshold=s, mode="up")), (50.0, 75.0, 100.0, 200.0), 0),
    Method("KSWIN", _river(lambda s: drift.KSWIN(alpha=10**-s, seed=0)), (2.3, 4.0, 5.5, 7.0), 0),
    Method("MMD", _mmd, (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0), 0),
    Method("always", lambda _: lambda stream, __: iter(range(len(stream)))),
    Method("never", lambda _: lambda _, __: iter(())),
)
"""Defaults: ADWIN delta 0.002, Page-Hinkley threshold 50 (watching rises only, which helps it), KSWIN alpha 0.005."""
