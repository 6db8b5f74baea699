"""A board, one frame at a time: the step function that the daemon and the simulation share.

Rules of this file (phases.py has the table of phases):

1. Every frame gets its prediction first, from the serving generation, whatever else is going on.
2. The board collects frames from the onset of a shift on, up to a bound, and asks for labels within a budget. Where a
   known domain explains all of them together, that domain is back: the board asks for no labels and learns nothing.
3. The board waits `patience` seconds for labels, then learns from those that came. A learner works at its own pace;
   `poll` and every step ask for its outcome. An outcome for a generation that no longer serves is refused.
4. A new generation is on probation, whether it was learned here or offered: if the stream looks foreign to it, too, it
   is rolled back, else confirmed.
5. Each change of generation is in the store before it serves; where the store fails, nothing changes.
6. The encoder sees each frame once: hypervectors are kept with the frames. At most twice the larger of `memory` and
   `labels` frames are held, beside those of a job.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal, Protocol, assert_never

import numpy as np

from adaptors.progress import Progress
from device.board import events
from device.board.events import BoardEvent
from device.board.learner import Failed, InlineLearner, Job, LabelledJob, Learner, Outcome, UnlabelledJob
from device.board.phases import Signal, after
from device.encoder.engine import OrtEngine
from device.mqtt.messages import Phase
from device.mqtt.settings import LiveSettings
from device.state import generations
from device.state.store import Store
from edgeear.attribution import attribute
from edgeear.errors import DeviceError, UsageError
from edgeear.flow import Prediction, infer
from edgeear.novelty import MINIMUM
from edgeear.recognition import recognise
from edgeear.samples import AdaptPolicy
from edgeear.shift import Shift, ShiftState, likely_onset
from edgeear.system import Candidate, Live, Rejected, System, commit, confirm, rollback
from edgeear.types import F32, U8, Encoder
from edgeear.unlabelled import UnlabelledPolicy

ATTRIBUTED = 32
"""The latest frames since the onset of a shift, used for its attribution."""


class Labeller(Protocol):
    """Who knows the truth: a person, a slower model, or the ground truth in a simulation."""

    def label(self, at: Sequence[int]) -> Sequence[str | None]:
        """Class names for the frames with these sample numbers; None where the labeller does not know one (yet).

        The board asks for the same numbers again and again until its patience ends. Never waits."""

    def domain(self, at: Sequence[int]) -> str | None:
        """The name of the domain of these frames; None where the labeller has none: the first free `domain-N`."""


@dataclass(frozen=True)
class BoardPolicy:
    """`labels`: most labels for a shift; `memory`: frames kept before a shift is declared; `probation`: frames that
    probation lasts; `foreign`: share of out-of-distribution frames on probation above which the board rolls back;
    `patience`: seconds to wait for labels, 0 to take those that are there at once; `views`: how each frame is shown to
    training; `adapt`: for the built-in learner; `unlabelled`: how to adapt when no labels come, None for not at all."""

    labels: int = 140
    memory: int = 256
    probation: int = 40
    foreign: float = 0.5
    patience: float = 0.0
    views: tuple[str, ...] = ("plain", "flip")
    adapt: AdaptPolicy = field(default_factory=AdaptPolicy)
    unlabelled: UnlabelledPolicy | None = None

    def with_live(self, live: LiveSettings) -> BoardPolicy:
        """This policy with the settings that an operator can change."""
        return replace(
            self,
            labels=live.labels,
            probation=live.probation,
            foreign=live.foreign,
            patience=live.label_wait_s,
            unlabelled=(self.unlabelled or UnlabelledPolicy()) if live.label_free else None,
        )


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame, its sample number and what the board predicted for it."""

    number: int
    frame: U8
    prediction: Prediction


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Frames that wait for labels since `since` (seconds), and the operator's name for their domain."""

    seen: tuple[Seen, ...]
    since: float
    name: str | None = None

    @property
    def numbers(self) -> list[int]:
        return [s.number for s in self.seen]


class Board:
    """A board: a live system, a detector state and a buffer. Only `step`, `poll` and an operator's verbs change it.
    Call them from one thread. The verbs raise UsageError where the phase does not allow them.

    `clock` gives seconds. `learner` None learns inside `step` with `policy.adapt`; `on_progress` is that learner's.
    `store` None keeps nothing on disk."""

    def __init__(
        self,
        live: Live,
        encoder: Encoder,
        labeller: Labeller,
        clock: Callable[[], float],
        policy: BoardPolicy | None = None,
        *,
        store: Store | None = None,
        seed: int = 0,
        on_progress: Progress = lambda *_: None,
        on_event: Callable[[BoardEvent], None] = lambda _: None,
        learner: Learner | None = None,
    ) -> None:
        self.live, self.engine = live, OrtEngine(encoder)
        self.policy = policy or BoardPolicy()
        self.phase: Phase = "serving"
        self.paused = False
        self.at = 0
        """The sample number of the latest frame, from 1."""
        self._labeller, self._clock, self._store, self._seed = labeller, clock, store, seed
        self._learner = learner or InlineLearner(encoder, self.engine, self.policy.adapt, on_progress)
        self._on_event = on_event
        self._state = ShiftState()
        self._recent: deque[Seen] = deque(maxlen=max(self.policy.memory, self.policy.labels))
        self._waiting: _Waiting | None = None
        self._job: Job | None = None
        self._probation: list[bool] = []
        self._events: list[BoardEvent] = []
        if store is not None and store.confirmed is None:
            first = generations.publish_confirmed(store, live.confirmed, clock(), "before anything was learned")
            self.live = Live(live.serving if live.probation else first, first)

    @property
    def system(self) -> System:
        """The serving generation."""
        return self.live.serving

    @property
    def moment(self) -> tuple[int, float]:
        """Sample number and time, with which every event begins."""
        return self.at, self._clock()

    @property
    def waiting(self) -> bool:
        """Whether the board waits for labels or a learner: call `poll`."""
        return self._waiting is not None or self._job is not None

    def wanted(self) -> tuple[Seen, ...]:
        """The frames whose labels the board waits for."""
        return () if self._waiting is None else self._waiting.seen

    @property
    def wanted_until(self) -> float | None:
        """When the board stops waiting for labels, in seconds; None where it waits for none."""
        return None if self._waiting is None else self._waiting.since + self.policy.patience

    def step(self, frame: U8) -> tuple[Prediction, tuple[BoardEvent, ...]]:
        """Predict for one `frame (height, width, 3)`, then do what the stream asks for."""
        self.at += 1
        prediction, self._state, shift = infer(self.system, self.engine, self._state, frame)
        self._recent.append(Seen(self.at, frame, prediction))
        if self.phase == "probation":
            self._watch(prediction)
        elif self.phase == "serving" and not self.paused and (shift or not self.system.domains):
            self._declare(shift)
        if self.phase == "collecting":
            self._collect()
        self._advance()
        return prediction, self._told()

    def poll(self) -> tuple[BoardEvent, ...]:
        """Do what needs no frame: take labels that came, end the wait for labels, take the learner's outcome."""
        self._advance()
        return self._told()

    def adapt_now(self, name: str | None = None) -> tuple[BoardEvent, ...]:
        """Learn now from the collected frames, of a known domain or not, as `name` if given. While the board waits for
        labels, it uses those that came. Also raises UsageError while paused and for too few frames."""
        if self.paused:
            raise UsageError("learning is paused: resume it first")
        phase = after(self.phase, "adapt")
        held = len(self.wanted() or self._recent)
        if held < MINIMUM:
            raise UsageError(f"{held} frames collected, at least {MINIMUM} needed: show the board more")
        if self._waiting is None:
            self._await("adapt", name)
        else:
            self.phase = phase
            self._waiting = replace(self._waiting, name=name or self._waiting.name, since=-math.inf)
        self._advance()
        return self._told()

    def rollback(self) -> tuple[BoardEvent, ...]:
        """Undo the generation on probation."""
        self._settle("foreign", None)
        return self._told()

    def confirm(self) -> tuple[BoardEvent, ...]:
        """Make the generation on probation permanent now."""
        self._settle("good", None)
        return self._told()

    def pause(self, paused: bool) -> tuple[BoardEvent, ...]:
        """Stop learning, or resume. Predictions and probation go on. Pausing ends a wait for labels and a running job.
        A shift that still holds at the end of the pause is declared then."""
        if paused and not self.paused:
            self.phase = after(self.phase, "pause")
            self._drop_work()
            self._tell(events.Paused(*self.moment))
        elif self.paused and not paused:
            self._tell(events.Resumed(*self.moment))
        self.paused = paused
        return self._told()

    def offer(self, candidate: Candidate, note: str) -> tuple[BoardEvent, ...]:
        """Serve an admitted candidate from anywhere on probation; `note` is kept with its generation. Collected frames
        are dropped.

        Raises UsageError for another generation's candidate or one without a new or changed domain, DeviceError where
        it cannot be stored; what served before serves then."""
        self._enter("offer", candidate, note)
        return self._told()

    def replace(self, candidate: Candidate, note: str) -> tuple[BoardEvent, ...]:
        """Serve an operator's admitted change for good, without a way back: a domain or class forgotten, or domains
        merged. A running job is started again over it; no older generation is kept. Raises UsageError for another
        generation's candidate."""
        phase, live = after(self.phase, "replace"), confirm(commit(self.live, candidate))
        if self._store is not None:
            alone, _ = generations.publish_alone(self._store, candidate.system, self._clock(), note)
            live = Live(alone, alone)
        self.phase, self.live, job = phase, live, self._job
        self._drop_work()
        self._start_afresh()
        self._tell(events.Forgotten(*self.moment, note, self.system.generation))
        if job is not None:
            self._start(replace(job, system=self.system))
        return self._told()

    def close(self) -> None:
        """End the learner's job, if any. Do not use the board after this."""
        self._learner.cancel()

    def _declare(self, shift: Shift | None) -> None:
        self.phase = after(self.phase, "shift")
        if shift is None:
            self._recent = deque([self._recent[-1]], maxlen=self._recent.maxlen)
            self._tell(events.Started(*self.moment))
            return
        onset = likely_onset(shift, [(s.number, s.prediction.p) for s in self._recent], self.system.policy.shift)
        self._recent = deque((s for s in self._recent if s.number > onset), maxlen=self._recent.maxlen)
        h = _codes(list(self._recent)[-ATTRIBUTED:])
        nearest = int(np.bincount(self.system.router.route(h)).argmax())
        moved = attribute(self.system.space, self.system.domains[nearest].memory, h)
        self._tell(events.Shifted(*self.moment, onset, moved))

    def _collect(self) -> None:
        if len(self._recent) < self.policy.labels:
            return
        back = recognise(self.system, _codes(self._recent)) if self.system.domains else None
        if back is None:
            self._await("enough", None)
            return
        self.phase = after(self.phase, "known")
        self._tell(events.Recognised(*self.moment, back.domain, len(self._recent)))
        self._start_afresh()

    def _await(self, signal: Signal, name: str | None) -> None:
        """Wait for labels of the collected frames."""
        self.phase = after(self.phase, signal)
        self._waiting = _Waiting(tuple(self._recent), self._clock(), name)
        self._start_afresh()
        if self.policy.patience > 0:
            numbers = self._waiting.numbers
            self._tell(events.LabelsWanted(*self.moment, numbers[0], numbers[-1], self.policy.patience))

    def _start_afresh(self) -> None:
        self._recent.clear()
        self._state = self._state.restart()

    def _drop_work(self) -> None:
        self._waiting = self._job = None
        self._learner.cancel()

    def _advance(self) -> None:
        if self._waiting is not None:
            self._take_labels(self._waiting)
        if self._job is not None and (outcome := self._learner.poll()) is not None:
            self._decide(outcome, self._job)

    def _take_labels(self, waiting: _Waiting) -> None:
        labels, now = self._labeller.label(waiting.numbers), self._clock()
        known = [(s.frame, label) for s, label in zip(waiting.seen, labels, strict=True) if label is not None]
        if now < waiting.since:  # the clock was set back: the wait starts again
            self._waiting = replace(waiting, since=now)
        if len(known) >= min(self.policy.labels, len(waiting.seen)) or now - waiting.since >= self.policy.patience:
            self._waiting = None
            self._learn(waiting, known)

    def _learn(self, waiting: _Waiting, known: Sequence[tuple[U8, str]]) -> None:
        blind = self.policy.unlabelled if self.system.domains else None
        if len(known) < MINIMUM and blind is None:
            self.phase = after(self.phase, "too few")
            self._tell(events.TooFewLabels(*self.moment, len(known), len(waiting.seen), MINIMUM))
            return
        self.phase = after(self.phase, "labels")
        name = waiting.name or self._labeller.domain(waiting.numbers)
        name = name or next(free for n in count(1) if (free := f"domain-{n}") not in self.system.names)
        job: Job
        views = self.policy.views
        if blind is not None and len(known) < MINIMUM:
            frames = tuple(s.frame for s in waiting.seen)
            job = UnlabelledJob(self.system, name, frames, blind, views=views, seed=self._seed)
        else:
            frames, labels = tuple(frame for frame, _ in known), tuple(label for _, label in known)
            job = LabelledJob(self.system, name, frames, labels, views=views, seed=self._seed)
        self._start(job)

    def _start(self, job: Job) -> None:
        self._tell(events.Searching(*self.moment, job.name, len(job.frames), isinstance(job, LabelledJob)))
        try:
            self._learner.start(job)
        except BaseException:
            self.phase = after(self.phase, "failed")
            raise
        self._job = job

    def _decide(self, outcome: Outcome, job: Job) -> None:
        self._job = None
        match outcome:
            case Rejected():
                self.phase = after(self.phase, "rejected")
                self._tell(events.NotAdmitted(*self.moment, outcome.domain, outcome.reasons))
            case Failed():
                self._fail(job, outcome.reason)
            case Candidate() if outcome.base is not self.system:
                self._fail(job, "the outcome is for a generation that no longer serves: it was refused")
            case Candidate():
                try:
                    self._enter("admitted", outcome, f"grew {job.name}")
                except DeviceError as error:
                    self._fail(job, f"the new generation cannot be stored, so it does not serve: {error}")
            case _:
                assert_never(outcome)
        self._start_afresh()

    def _fail(self, job: Job, reason: str) -> None:
        self.phase = after(self.phase, "failed")
        self._tell(events.LearningFailed(*self.moment, job.name, reason))

    def _enter(self, signal: Signal, candidate: Candidate, note: str) -> None:
        """Store a candidate, then serve it on probation. Raises what `offer` does, and has changed nothing then."""
        phase, live = after(self.phase, signal), commit(self.live, candidate)
        new = next((d for d in candidate.system.domains if d not in candidate.base.domains), None)
        if new is None:
            raise UsageError("the candidate has no new or changed domain: nothing to put on probation")
        if self._store is not None:
            live = Live(generations.publish(self._store, candidate.system, self._clock(), note), live.confirmed)
        self.phase, self.live, self._probation = phase, live, []
        self._drop_work()
        self._start_afresh()
        why, classes = str(new.growth.get("explanation", note)), len(new.head.classes)
        self._tell(events.Grown(*self.moment, new.name, why, classes, new.bytes, self.system.generation))

    def _watch(self, prediction: Prediction) -> None:
        self._probation.append(prediction.ood)
        if len(self._probation) >= self.policy.probation:
            share = sum(self._probation) / len(self._probation)
            self._settle("foreign" if share > self.policy.foreign else "good", share)

    def _settle(self, signal: Literal["good", "foreign"], share: float | None) -> None:
        """End probation, for good or back to the confirmed generation. `share` of foreign frames: None where the
        operator decided."""
        self.phase = after(self.phase, signal)
        self._state = self._state.restart()
        if signal == "foreign":
            self.live, keep = rollback(self.live), generations.roll_back
            self._tell(events.RolledBack(*self.moment, self.system.generation, share, len(self._probation)))
        else:
            self.live, keep = confirm(self.live), generations.confirm
            self._tell(events.Confirmed(*self.moment, self.system.generation, share))
        try:
            if self._store is not None:
                keep(self._store)
        except DeviceError as error:  # a restart falls back to what was confirmed before
            self._tell(events.LearningFailed(*self.moment, None, f"the store does not know of it: {error}"))

    def _told(self) -> tuple[BoardEvent, ...]:
        told, self._events = tuple(self._events), []
        return told

    def _tell(self, event: BoardEvent) -> None:
        self._events.append(event)
        self._on_event(event)


def _codes(seen: Sequence[Seen] | deque[Seen]) -> F32:
    """Hypervectors `(frames, D)` of frames seen; those seen before anything was learned have none."""
    return np.stack([s.prediction.code for s in seen if s.prediction.code is not None])
