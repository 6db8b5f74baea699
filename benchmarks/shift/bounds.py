"""Stated bounds against measured rates: verdicts on held-out images, the band of conditional p-values, and a million
in-distribution samples through the sequential test."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.shift.streams import _picked, judged, known_system
from device.evaluation.data import EvalData
from edgeear.memory import learn
from edgeear.novelty import Calibration, calibrate, conditional_bounds, detector
from edgeear.shift import LEVELS, ShiftPolicy

ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2)
RATES = (1e-6, 1e-4, 1e-3)
STREAMS, STEPS = 10, 100_000
"""A million samples a seed: ten streams of a hundred thousand."""
F64 = NDArray[np.float64]


def false_ood(data: EvalData, shots: int | None, seeds: int) -> list[dict[str, Any]]:
    """Rate of OOD verdicts on held-out images of the domain itself, over random splits: a fifth is held out, `shots`
    images a class of the rest (None: all) are learned. `error` is the standard error of the mean over seeds."""
    rows = []
    for domain in data.domains:
        h, y = (
            np.concatenate([domain.train_h, domain.test_h]),
            np.concatenate([domain.train_labels, domain.test_labels]),
        )
        p = [_held_out_p(h, y, data.classes, shots, seed) for seed in range(seeds)]
        for alpha in ALPHAS:
            rates = np.array([(x <= np.float32(alpha)).mean() for x in p])
            error = float(rates.std(ddof=1) / np.sqrt(seeds))
            within = bool(rates.mean() <= alpha + 2 * error)
            rows.append(
                {"domain": domain.name, "shots": shots, "alpha": alpha, "rate": float(rates.mean()), "error": error}
                | {"deviation": float(rates.std(ddof=1)), "within_two_errors": within}
            )
    return rows


def _held_out_p(h: Any, y: Any, classes: tuple[str, ...], shots: int | None, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(h))
    held, rest = order[: len(h) // 5], order[len(h) // 5 :]
    known = rest[_picked(y[rest], shots, rng)]
    calibration = calibrate(h[known], y[known], classes, 512, seed=seed)
    return calibration.p_values(calibration.novelty(detector(learn(h[known], y[known], classes, 512)), h[held]))[0]


def band(trials: int = 20_000) -> list[dict[str, Any]]:
    """Share of calibration sets for which a conditional p-value is not valid, against delta: uniform scores, exact."""
    rows = []
    for n in (20, 140, 1000):
        for delta in (0.01, 0.1):
            rng, bounds = np.random.default_rng(0), conditional_bounds(n, delta)[:n]
            failed = 0
            for _ in range(trials // 500):
                scores = np.sort(rng.random((500, n)), axis=1)[:, ::-1]
                failed += int((1 - scores > bounds).any(axis=1).sum())
            rows.append({"calibration": n, "delta": delta, "failed": failed / trials, "sets": trials})
    return rows


def million(data: EvalData, seeds: int) -> list[dict[str, Any]]:
    """False alarms in a million in-distribution samples, restarted at each, against the bound `rate * samples`."""
    rows = []
    for source, p_of in (
        ("uniform p-values, the worst case", lambda seed: 1 - np.random.default_rng(seed).random((STREAMS, STEPS))),
        ("calibrations of 140 scores, one a stream", _calibrated),
        ("held-out PACS images, four domains known from 20 images a class, with replacement", _held_out(data)),
    ):
        p = np.concatenate([p_of(seed) for seed in range(seeds)]).astype(np.float64)
        for rate in RATES:
            counts = count_alarms(p, ShiftPolicy(false_alarm_rate=rate)).reshape(seeds, STREAMS).sum(axis=1)
            rows.append(
                {"source": source, "rate": rate, "samples_a_seed": STREAMS * STEPS, "bound": rate * STREAMS * STEPS}
                | {"alarms": [int(c) for c in counts], "within": bool(counts.mean() <= rate * STREAMS * STEPS + 1e-9)}
            )
    return rows


def _calibrated(seed: int) -> F64:
    rng, out = np.random.default_rng(seed), []
    for _ in range(STREAMS):
        held = Calibration(0.0, 1.0, 0.0, 1.0, rng.normal(size=140).astype(np.float32))
        out.append(held.p_values(rng.normal(size=STEPS).astype(np.float32))[1])
    return np.stack(out)


def _held_out(data: EvalData) -> Any:
    def p_of(seed: int) -> F64:
        system = known_system(data, [d.name for d in data.domains], 20, seed)
        pools = [judged(system, d.test_h, foreign=False).p for d in data.domains]
        rng = np.random.default_rng(seed)
        return np.stack([rng.choice(pools[i % len(pools)], STEPS) for i in range(STREAMS)])

    return p_of


def count_alarms(p: F64, policy: ShiftPolicy) -> NDArray[np.int64]:
    """How often `observe` alarms in each row of `p (streams, steps)`, restarted each time: the same, on arrays."""
    levels = np.repeat(LEVELS, len(policy.stakes))
    stakes = np.tile(policy.stakes, len(LEVELS))
    won, lost = 1 - stakes + stakes / levels, 1 - stakes
    s = np.zeros((len(p), len(levels)))
    alarms = np.zeros(len(p), np.int64)
    for step in p.T:
        s = (1 + s) * np.where(step[:, None] <= levels, won, lost)
        fired = s.mean(axis=1) >= 1 / policy.false_alarm_rate
        if fired.any():
            alarms += fired
            s[fired] = 0
    return alarms
