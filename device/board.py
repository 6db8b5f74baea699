"""One board's life, one frame at a time: the step function that the daemon and the simulation share.

    serving --(shift, or nothing learned)--> collecting --(enough labels)--> adapt --admitted--> probation --> serving

1. Every frame gets its prediction first, from the serving generation, whatever else is going on.
2. What was seen since the onset of a shift is collected, up to a bound, and labelled within a budget. Where a known
   domain explains all of it together, that domain is back: no label is asked for and no search is spent.
3. A committed generation is on probation: if the stream looks foreign to it too, it is rolled back, else confirmed.
4. Each change of generation is in the store before it serves.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, assert_never

import numpy as np

from device.codec import to_files
from device.engine import OrtEngine
from device.folder import view
from device.store import Store
from edgeear.attribution import Attribution, attribute
from edgeear.flow import AdaptPolicy, Prediction, Progress, Samples, adapt, infer
from edgeear.novelty import MINIMUM
from edgeear.recognition import recognise
from edgeear.shift import Shift, ShiftState, log_e_value
from edgeear.system import Candidate, Live, Rejected, System, commit, confirm, rollback
from edgeear.types import F32, U8, Encoder, Features
from edgeear.unlabelled import UnlabelledPolicy, adapt_unlabelled

Phase = Literal["serving", "collecting", "probation"]
ATTRIBUTED = 32
"""Frames since the onset of a shift that say what it is about."""


class Labeller(Protocol):
    """Who knows the truth: a person, a slower model, or the ground truth in a simulation."""

    def label(self, at: Sequence[int]) -> Sequence[str | None]:
        """Class names for the frames seen at these sample numbers; None where the labeller does not know."""

    def domain(self, at: Sequence[int]) -> str:
        """What to call the domain that these frames are from."""


class Clock(Protocol):
    def __call__(self) -> float:
        """Seconds."""


@dataclass(frozen=True)
class BoardPolicy:
    """`labels`: asked for per shift; `memory`: frames kept before a shift is declared; `probation`: samples served on
    probation; `foreign`: share of out-of-distribution verdicts on probation that means rollback; `views`: how each
    labelled frame is shown to training; `unlabelled`: how to adapt when no labels come, None for not at all."""

    labels: int = 140
    memory: int = 256
    probation: int = 40
    foreign: float = 0.5
    views: tuple[str, ...] = ("plain", "flip")
    adapt: AdaptPolicy = field(default_factory=AdaptPolicy)
    unlabelled: UnlabelledPolicy | None = None


@dataclass(frozen=True)
class Event:
    """Something an operator wants to know, at a sample number and a time (seconds)."""

    at: int
    time: float
    kind: str
    text: str


@dataclass(frozen=True, eq=False)
class Step:
    """What one frame led to."""

    prediction: Prediction
    events: tuple[Event, ...]


class Board:
    """A board: a live system, a detector state and a buffer. `step` is the only way anything happens."""

    def __init__(
        self,
        live: Live,
        encoder: Encoder,
        labeller: Labeller,
        clock: Clock,
        policy: BoardPolicy | None = None,
        *,
        store: Store | None = None,
        seed: int = 0,
        on_progress: Progress = lambda *_: None,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self.live, self.encoder, self.engine = live, encoder, OrtEngine(encoder)
        self.policy = policy or BoardPolicy()
        self.phase: Phase = "serving"
        self.shift: Shift | None = None
        self.attribution: Attribution | None = None
        self._labeller, self._clock, self._store, self._seed = labeller, clock, store, seed
        self._on_progress, self._on_event = on_progress, on_event
        self._state = ShiftState()
        self._recent: deque[tuple[int, U8, float]] = deque(maxlen=max(self.policy.memory, self.policy.labels))
        self._probation: list[bool] = []
        self._at = 0
        self._events: list[Event] = []
        if store is not None and store.confirmed is None:
            self._write(live.confirmed, "before anything was learned")
            self._persist_confirmation()

    @property
    def system(self) -> System:
        """The serving generation."""
        return self.live.serving

    def step(self, frame: U8) -> Step:
        """Predict for one `frame (height, width, 3)`, then learn from the stream what it shows."""
        self._at += 1
        self._events = []
        prediction, self._state, shift = infer(self.system, self.engine, self._state, frame)
        self._recent.append((self._at, frame, prediction.p))
        if self.phase == "probation":
            self._watch(prediction)
        elif self.phase == "serving" and (shift or not self.system.domains):
            self._declare(shift)
        if self.phase == "collecting":
            self._collect()
        return Step(prediction, tuple(self._events))

    def _declare(self, shift: Shift | None) -> None:
        self.phase, self.shift = "collecting", shift
        onset = self._onset(shift) if shift else self._at - 1
        self._recent = deque((r for r in self._recent if r[0] > onset), maxlen=self._recent.maxlen)
        if shift:
            self.attribution = self._attribute()
            left = f"the stream left all known domains after sample {onset} (declared at {self._at})"
            self._tell("shift", f"{left}; by the taps that moved: {self.attribution.kind}")
        else:
            self._tell("start", "nothing is learned yet: collecting the first domain")

    def _attribute(self) -> Attribution:
        """Which taps moved since the onset, against the domain that most of these frames are routed to."""
        taps = [t.name for t in self.system.space.taps]
        seen = [self.encoder.encode(frame[None], taps) for _, frame, _ in list(self._recent)[-ATTRIBUTED:]]
        h = self.system.space.encode({t: np.concatenate([features[t] for features in seen]) for t in taps})
        nearest = int(np.bincount(self.system.router.route(h)).argmax())
        return attribute(self.system.space, self.system.domains[nearest].memory, h)

    def _onset(self, shift: Shift) -> int:
        """The sample after which the evidence for `shift` is largest. The test's own onset is a lower bound: its
        evidence wanders above the floor for hundreds of samples while nothing happens."""
        best, evidence, onset = -math.inf, 0.0, shift.onset
        for number, _, p in reversed(self._recent):
            if number <= shift.onset:
                break
            evidence += log_e_value(p, self.system.policy.shift)
            if evidence > best:
                best, onset = evidence, number - 1
        return onset

    def _collect(self) -> None:
        if len(self._recent) < self.policy.labels:
            return
        back = recognise(self.system, self._codes())
        if back is not None:
            self.phase = "serving"
            self._tell("recognised", f"{back.domain} is back: it explains the {len(self._recent)} frames, none is new")
        else:
            self._learn()
        self._recent.clear()
        self._state = self._state.restart()

    def _codes(self) -> F32:
        """Hypervectors of the collected frames `(frames, D)`."""
        taps = [t.name for t in self.system.space.taps]
        seen = [self.system.space.encode(self.encoder.encode(frame[None], taps)) for _, frame, _ in self._recent]
        return np.concatenate(seen)

    def _learn(self) -> None:
        numbers = [n for n, _, _ in self._recent]
        labels = self._labeller.label(numbers)
        known = [(frame, label) for (_, frame, _), label in zip(self._recent, labels, strict=True) if label is not None]
        if len(known) < MINIMUM and self.policy.unlabelled and self.system.domains:
            self._adapt_unlabelled(self._labeller.domain(numbers), self.policy.unlabelled)
        elif len(known) < MINIMUM:
            self._tell(
                "refused", f"{len(known)} labels for {len(numbers)} frames, {MINIMUM} needed: nothing was learned"
            )
        else:
            self._adapt(self._samples(self._labeller.domain(numbers), known))

    def _samples(self, name: str, known: Sequence[tuple[U8, str]]) -> Samples:
        classes = tuple(sorted({label for _, label in known}))
        labels = np.array([classes.index(label) for _, label in known], np.int64)
        views = self._views([frame for frame, _ in known], [t.name for t in self.system.space.taps])
        return Samples(name, views, labels, classes)

    def _views(self, frames: Sequence[U8], taps: Sequence[str]) -> list[Features]:
        views: list[Features] = []
        for k, how in enumerate(self.policy.views):
            done = []
            for i, frame in enumerate(frames):
                done.append(self.encoder.encode(view(frame, how)[None], taps))
                self._on_progress("encode", k * len(frames) + i + 1, len(frames) * len(self.policy.views))
            views.append({t: np.concatenate([d[t] for d in done]) for t in taps})
        return views

    def _adapt(self, samples: Samples) -> None:
        self._tell("search", f"{samples.name}: searching a head with {len(samples.labels)} labelled frames")
        outcome = adapt(self.system, samples, self.policy.adapt, self._seed, self._on_progress)
        self._decide(outcome, samples.name)

    def _adapt_unlabelled(self, name: str, policy: UnlabelledPolicy) -> None:
        self._tell("search", f"{name}: no labels came, adapting without from {len(self._recent)} frames")
        views = self._views([frame for _, frame, _ in self._recent], self.system.wanted_taps)
        outcome = adapt_unlabelled(
            self.system, self.engine, name, views, policy, self.policy.adapt, self._seed, self._on_progress
        )
        self._decide(outcome, name)

    def _decide(self, outcome: Candidate | Rejected, name: str) -> None:
        if isinstance(outcome, Rejected):
            self.phase = "serving"
            self._tell("rejected", f"{outcome.domain}: " + "; ".join(outcome.reasons))
        elif isinstance(outcome, Candidate):
            self._commit(outcome, name)
        else:
            assert_never(outcome)

    def _commit(self, candidate: Candidate, name: str) -> None:
        self._write(candidate.system, f"grew {name}")
        self.live, self.phase, self._probation = commit(self.live, candidate), "probation", []
        growth = candidate.system.domain(name).growth
        self._tell("grown", f"{name}: {growth['explanation']}; generation {self.system.generation} is on probation")

    def _write(self, system: System, note: str) -> None:
        if self._store is not None:
            self._store.commit(self._store.write(to_files(system), created=self._clock(), note=note))

    def _watch(self, prediction: Prediction) -> None:
        self._probation.append(prediction.ood)
        if len(self._probation) < self.policy.probation:
            return
        share = sum(self._probation) / len(self._probation)
        self.phase, self._state = "serving", self._state.restart()
        if share > self.policy.foreign:
            self.live = rollback(self.live)
            if self._store is not None:
                self._store.rollback()
            self._tell(
                "rolled back", f"{share:.0%} of {len(self._probation)} frames were foreign to the new generation"
            )
        else:
            self.live = confirm(self.live)
            self._persist_confirmation()
            self._tell("confirmed", f"generation {self.system.generation} is permanent ({share:.0%} foreign frames)")

    def _persist_confirmation(self) -> None:
        if self._store is not None and self._store.live is not None:
            self._store.confirm(self._store.live)

    def _tell(self, kind: str, text: str) -> None:
        event = Event(self._at, self._clock(), kind, text)
        self._events.append(event)
        self._on_event(event)
