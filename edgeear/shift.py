"""When has the stream left all known domains? A sequential test with a bound on false alarms for the stream's life.

Rules of this file:

1. The input is one p-value per sample: the largest *conditional* p-value over the known domains. While the stream is in
   any of them, that p-value is at least a valid one.
2. A p-value is turned into an e-value by Vovk's power calibrators, e(p) = eps * p**(eps - 1) averaged over eps, whose
   mean is at most 1 for valid p. The Shiryaev-Roberts e-detector S_t = (1 + S_{t-1}) * e_t (Shin, Ramdas, Rinaldo,
   "E-detectors", 2022) alarms when S_t >= 1 / rate: the mean time between false alarms is then at least 1 / rate.
3. State is a value. Evidence is kept as log(1 + S), so nothing overflows and the empty state is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgeear.errors import UsageError


@dataclass(frozen=True)
class ShiftPolicy:
    """Rules of the test: at most `false_alarm_rate` false alarms a sample on average, in (0, 1).

    `exponents` of the calibrators, each in (0, 1): small ones win on extreme p-values, large ones on mild shifts.
    Conditional p-values of a small calibration set are never extreme, so 0.5 alone beats mixtures with 0.25.
    `floor` is the S below which the stream counts as quiet: the onset is the last quiet sample.
    """

    false_alarm_rate: float = 1e-6
    exponents: tuple[float, ...] = (0.5,)
    floor: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.false_alarm_rate < 1:
            raise UsageError(f"false_alarm_rate is {self.false_alarm_rate}: it must lie in (0, 1)")
        if not self.exponents or not all(0 < eps < 1 for eps in self.exponents):
            raise UsageError(f"exponents are {self.exponents}: give at least one, each in (0, 1)")
        if not 0 < self.floor < 1 / self.false_alarm_rate:
            raise UsageError(f"floor is {self.floor}: it must lie between 0 and {1 / self.false_alarm_rate:g}")


@dataclass(frozen=True)
class ShiftState:
    """Evidence `log(1 + S)` (>= 0), samples seen, and the count of samples when the stream was last quiet."""

    evidence: float = 0.0
    samples: int = 0
    onset: int = 0

    def restart(self) -> ShiftState:
        """The state after a shift was dealt with: no evidence, the sample count goes on."""
        return ShiftState(0.0, self.samples, self.samples)


@dataclass(frozen=True)
class Shift:
    """The stream has left all known domains: declared at sample `at` (from 1), begun after sample `onset`.

    `evidence` is log S; 1 / exp(evidence) is the false-alarm rate at which this shift would just have been declared.
    """

    at: int
    onset: int
    evidence: float


def observe(state: ShiftState, p: float, policy: ShiftPolicy) -> tuple[ShiftState, Shift | None]:
    """The state after one more sample of p-value `p` in (0, 1], and the shift when there is one.

    A shift is repeated at every sample until the caller restarts the state. Raises `UsageError` for any other p.
    """
    log_s = state.evidence + log_e_value(p, policy)
    samples = state.samples + 1
    onset = samples if log_s < math.log(policy.floor) else state.onset
    after = ShiftState(_log_sum(0.0, log_s), samples, onset)
    if log_s < -math.log(policy.false_alarm_rate):
        return after, None
    return after, Shift(samples, onset, log_s)


def log_e_value(p: float, policy: ShiftPolicy) -> float:
    """Log of the mean of eps * p**(eps - 1); falls as p rises. Raises `UsageError` unless 0 < p <= 1."""
    if not 0 < p <= 1:
        raise UsageError(f"p-value {p} is outside (0, 1]: use conditional p-values of a calibration")
    terms = [math.log(eps) + (eps - 1) * math.log(p) for eps in policy.exponents]
    total = terms[0]
    for term in terms[1:]:
        total = _log_sum(total, term)
    return total - math.log(len(terms))


def _log_sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b)) without overflow."""
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))
