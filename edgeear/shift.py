"""A sequential test for a stream that has left all known domains; it bounds false alarms over the whole stream.

Rules of this file:

1. The input is one p-value per frame: the largest *conditional* p-value over the known domains. While the stream is in
   any of them, P(p <= level) <= level for each of the `LEVELS`, whatever came before. That is all the test relies on.
2. A bet on a level wins where p <= level: its e-value is 1 - stake + stake / level there and 1 - stake elsewhere, so
   its mean is at most 1. Each pair of a level and a stake runs its own Shiryaev-Roberts e-detector
   S_t = (1 + S_{t-1}) e_t, and S, their mean, is one as well (Shin, Ramdas, Rinaldo, "E-detectors", 2022, mixtures):
   E[S_t - t] never rises, so an alarm at S >= 1 / rate comes after 1 / rate samples or later, on average.
3. A scene is one sample, however many frames show it: a frame that looks like a scene seen a moment ago (scenes.py)
   changes nothing, so the bound counts scenes, and holds if rule 1 holds for the *first* frame of each scene. A camera
   that points at one foreign scene for an hour gives one sample: no shift, although every frame's verdict is OOD.
4. State is a value. Evidence is kept as log(1 + S), so nothing overflows, and no evidence is the empty state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from edgeear.errors import UsageError
from edgeear.scenes import ALIKE, remember, repeats
from edgeear.types import F32

LEVELS = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)
"""Where bets are laid, exact in float32. `conditional_bounds` gives p-values at these levels and nowhere between."""


@dataclass(frozen=True)
class ShiftPolicy:
    """Rules of the test: at most `false_alarm_rate` false alarms a sample on average, in (0, 1).

    `stakes` of the bets, each in (0, 1): high ones win early when nearly all frames are novel, low ones when some
    are. `floor`: the S below which the stream counts as quiet: the onset is the last quiet sample. `alike`, in (0, 1]:
    the cosine of two hypervectors from which they show one scene. `scenes`: how many of the latest are remembered
    (0: every frame is a sample).
    """

    false_alarm_rate: float = 1e-6
    stakes: tuple[float, ...] = (0.5, 0.9)
    floor: float = 10.0
    alike: float = ALIKE
    scenes: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.false_alarm_rate < 1:
            raise UsageError(f"false_alarm_rate is {self.false_alarm_rate}: it must lie in (0, 1)")
        if not self.stakes or not all(0 < stake < 1 for stake in self.stakes):
            raise UsageError(f"stakes are {self.stakes}: give at least one, each in (0, 1)")
        if not 0 < self.floor < 1 / self.false_alarm_rate:
            raise UsageError(f"floor is {self.floor}: it must lie between 0 and {1 / self.false_alarm_rate:g}")
        if not 0 < self.alike <= 1 or self.scenes < 0:
            raise UsageError(f"alike {self.alike} must lie in (0, 1] and scenes {self.scenes} must not be negative")


@dataclass(frozen=True)
class ShiftState:
    """`log(1 + S)` of every bet (() before the first sample), frames seen, the count of frames when the stream was last
    quiet, and the latest scenes, newest last."""

    evidence: tuple[float, ...] = ()
    samples: int = 0
    onset: int = 0
    scenes: tuple[F32, ...] = field(default=(), compare=False, repr=False)

    def restart(self) -> ShiftState:
        """The state after a shift was dealt with: no evidence, while the frame count and the scenes go on."""
        return ShiftState((), self.samples, self.samples, self.scenes)


@dataclass(frozen=True)
class Shift:
    """The stream has left all known domains: declared at sample `at` (from 1), begun after sample `onset`.

    `evidence` is log S; 1 / exp(evidence) is the false-alarm rate at which this shift would just have been declared.
    """

    at: int
    onset: int
    evidence: float


def observe(
    state: ShiftState, p: float, policy: ShiftPolicy, code: F32 | None = None, alike: float = 0.0
) -> tuple[ShiftState, Shift | None]:
    """The state after one more frame of p-value `p` in (0, 1], and the shift when a sample declares one.

    `code (m,)` are coordinates of its hypervector, None for a frame that shows a scene of its own. `alike` raises the
    policy's, for domains whose different frames look alike. A shift is repeated at every sample until the caller
    restarts the state. Raises `UsageError` for any other p.
    """
    won = log_bets(p, policy)
    samples = state.samples + 1
    if code is not None and repeats(code, state.scenes, max(alike, policy.alike)):
        return ShiftState(state.evidence, samples, state.onset, state.scenes), None
    scenes = state.scenes if code is None else remember(code, state.scenes, policy.scenes)
    each = [before + log_e for before, log_e in zip(state.evidence or (0.0,) * len(won), won, strict=True)]
    log_s = _log_mean(each)
    onset = samples if log_s < math.log(policy.floor) else state.onset
    after = ShiftState(tuple(_log_one_plus(s) for s in each), samples, onset, scenes)
    if log_s < -math.log(policy.false_alarm_rate):
        return after, None
    return after, Shift(samples, onset, log_s)


def likely_onset(shift: Shift, recent: Sequence[tuple[int, float]], policy: ShiftPolicy) -> int:
    """The sample after which the evidence for `shift` is largest; `recent` are sample numbers, rising, and p-values.

    The shift's own onset is a lower bound: its evidence wanders above the floor for hundreds of samples while nothing
    happens."""
    best, evidence, onset = -math.inf, 0.0, shift.onset
    for number, p in reversed(recent):
        if number <= shift.onset:
            break
        evidence += log_e_value(p, policy)
        if evidence > best:
            best, onset = evidence, number - 1
    return onset


def log_bets(p: float, policy: ShiftPolicy) -> tuple[float, ...]:
    """Log e-value of each bet, level by level; each falls as p rises. Raises `UsageError` unless 0 < p <= 1."""
    if not 0 < p <= 1:
        raise UsageError(f"p-value {p} is outside (0, 1]: use conditional p-values of a calibration")
    return tuple(won if p <= level else lost for level, won, lost in _bets(policy.stakes))


def log_e_value(p: float, policy: ShiftPolicy) -> float:
    """Log of the mean e-value of the bets: what one frame says by itself. Raises `UsageError` unless 0 < p <= 1."""
    return _log_mean(log_bets(p, policy))


@lru_cache(maxsize=16)
def _bets(stakes: tuple[float, ...]) -> tuple[tuple[float, float, float], ...]:
    """Level, log e-value of a win and of a loss, of every bet."""
    return tuple((u, math.log1p(stake / u - stake), math.log1p(-stake)) for u in LEVELS for stake in stakes)


def _log_mean(logs: list[float] | tuple[float, ...]) -> float:
    """Log of the mean of exp(logs) without overflow."""
    most = max(logs)
    return most + math.log(sum(math.exp(x - most) for x in logs) / len(logs))


def _log_one_plus(log_s: float) -> float:
    """log(1 + exp(log_s)) without overflow."""
    return max(0.0, log_s) + math.log1p(math.exp(-abs(log_s)))
