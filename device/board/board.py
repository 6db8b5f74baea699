"""One board's life, one frame at a time: the step function that the daemon and the simulation share.

    serving --(shift, or nothing learned)--> collecting --(enough frames)--> labelling --(labels)--> learning
    learning --(admitted)--> probation --(good or foreign)--> serving

1. Every frame gets its prediction first, from the serving generation, whatever else is going on.
2. What was seen since the onset of a shift is collected, up to a bound, and labelled within a budget. Where a known
   domain explains all of it together, that domain is back: no label is asked for and no search is spent.
3. Labels are waited for `patience` seconds, then what came must do. A learner works at its own pace; `poll` asks it, as
   every step does. What it found for a generation that no longer serves is refused.
4. A committed generation is on probation: if the stream looks foreign to it too, it is rolled back, else confirmed.
5. Each change of generation is in the store before it serves; where the store fails, nothing changes.
6. `TABLE` holds every phase and signal. An operator's verb goes through it like everything else, or is refused.
7. The encoder sees each frame once: hypervectors are kept with the frames. At most twice the larger of `memory` and
   `labels` frames are held, beside those of a job.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, assert_never, get_args

import numpy as np

from adaptors.progress import Progress
from device.board.events import (
    Confirmed,
    Event,
    Forgotten,
    Grown,
    LabelsWanted,
    LearningFailed,
    NotAdmitted,
    Paused,
    Recognised,
    Resumed,
    RolledBack,
    Searching,
    Shifted,
    Started,
    TooFewLabels,
)
from device.board.learner import Failed, InlineLearner, Job, Learner, Outcome
from device.encoder.engine import OrtEngine
from device.mqtt.settings import LiveSettings
from device.state.codec import to_files
from device.state.store import Store
from edgeear.attribution import Attribution, attribute
from edgeear.errors import DeviceError, UsageError
from edgeear.flow import Prediction, infer
from edgeear.novelty import MINIMUM
from edgeear.recognition import recognise
from edgeear.samples import AdaptPolicy
from edgeear.shift import Shift, ShiftState, log_e_value
from edgeear.system import Candidate, Live, Rejected, System, commit, confirm, rollback
from edgeear.types import F32, U8, Encoder
from edgeear.unlabelled import UnlabelledPolicy

Phase = Literal["serving", "collecting", "labelling", "learning", "probation"]
Signal = Literal[
    "shift", "enough", "known", "labels", "too few", "admitted", "rejected", "failed", "good", "foreign",
    "adapt", "pause", "replace",
]  # fmt: skip
"""What moves a board from phase to phase; the last three are an operator's, who may also say "good" or "foreign"."""
PHASES: tuple[Phase, ...] = get_args(Phase)
TABLE: Mapping[Signal, tuple[Phase | None, ...]] = {
    # from:       serving       collecting    labelling     learning     probation
    "shift":     ("collecting", None,         None,         None,        None),
    "enough":    (None,         "labelling",  None,         None,        None),
    "known":     (None,         "serving",    None,         None,        None),
    "labels":    (None,         None,         "learning",   None,        None),
    "too few":   (None,         None,         "collecting", None,        None),
    "admitted":  (None,         None,         None,         "probation", None),
    "rejected":  (None,         None,         None,         "serving",   None),
    "failed":    (None,         None,         None,         "serving",   None),
    "good":      (None,         None,         None,         None,        "serving"),
    "foreign":   (None,         None,         None,         None,        "serving"),
    "adapt":     ("labelling",  "labelling",  "labelling",  None,        None),
    "pause":     ("serving",    "serving",    "serving",    "serving",   "probation"),
    "replace":   ("serving",    "serving",    "serving",    "learning",  None),
}  # fmt: skip
"""Where each signal leads from each phase; None where it makes no sense: it is refused."""
REMEDY: Mapping[Phase, str] = {
    "serving": "there is no generation on probation",
    "collecting": "there is no generation on probation",
    "labelling": "there is no generation on probation",
    "learning": "wait for its outcome, or pause to end it",
    "probation": "confirm the generation on probation or roll it back first",
}
"""What an operator is told whose verb is refused in a phase."""
VERBS: Mapping[Signal, str] = {"good": "confirm", "foreign": "rollback", "replace": "forget"}
"""What an operator calls a signal, where it is not the signal's own name."""
ATTRIBUTED = 32
"""Frames since the onset of a shift that say what it is about."""


class Labeller(Protocol):
    """Who knows the truth: a person, a slower model, or the ground truth in a simulation."""

    def label(self, at: Sequence[int]) -> Sequence[str | None]:
        """Class names for the frames seen at these sample numbers; None where the labeller does not know (yet).

        Asked again and again for the same numbers while the board has patience; never waits."""

    def domain(self, at: Sequence[int]) -> str:
        """What to call the domain that these frames are from."""


class Clock(Protocol):
    def __call__(self) -> float:
        """Seconds."""


@dataclass(frozen=True)
class BoardPolicy:
    """`labels`: asked for per shift; `memory`: frames kept before a shift is declared; `probation`: samples served on
    probation; `foreign`: share of out-of-distribution verdicts on probation that means rollback; `patience`: seconds
    that labels may take, 0 to take what is there at once; `views`: how each labelled frame is shown to training;
    `adapt`: for the built-in learner; `unlabelled`: how to adapt when no labels come, None for not at all."""

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
class Step:
    """What one frame led to."""

    prediction: Prediction
    events: tuple[Event, ...]


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame and what was found out about it; `code (D,)` is None where nothing was learned yet, `label` and `route`
    where the board abstained."""

    number: int
    frame: U8
    p: float
    code: F32 | None
    label: str | None
    route: str | None


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Frames that wait for labels since `since` (seconds), and what an operator wants their domain called."""

    seen: tuple[Seen, ...]
    since: float
    name: str | None = None

    @property
    def numbers(self) -> list[int]:
        return [s.number for s in self.seen]


class Board:
    """A board: a live system, a detector state and a buffer. `step`, `poll` and an operator's verbs are the only ways
    anything happens; they are called from one thread. The verbs raise UsageError where the phase does not allow them.

    `learner` None learns inside `step` with `policy.adapt`; `on_progress` is that learner's."""

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
        learner: Learner | None = None,
    ) -> None:
        self.live, self.engine = live, OrtEngine(encoder)
        self.policy = policy or BoardPolicy()
        self.phase: Phase = "serving"
        self.paused = False
        self._labeller, self._clock, self._store, self._seed = labeller, clock, store, seed
        self._learner = learner or InlineLearner(encoder, self.engine, self.policy.adapt, on_progress)
        self._on_event = on_event
        self._state = ShiftState()
        self._recent: deque[Seen] = deque(maxlen=max(self.policy.memory, self.policy.labels))
        self._waiting: _Waiting | None = None
        self._job: Job | None = None
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

    @property
    def encoder(self) -> Encoder:
        return self.engine.encoder

    @property
    def at(self) -> int:
        """The sample number of the latest frame, from 1."""
        return self._at

    @property
    def waiting(self) -> bool:
        """Whether labels or a learner are waited for: `poll` has something to ask."""
        return self._waiting is not None or self._job is not None

    def wanted(self) -> tuple[Seen, ...]:
        """The frames whose labels are waited for."""
        return () if self._waiting is None else self._waiting.seen

    @property
    def wanted_until(self) -> float | None:
        """When the wait for labels ends, in seconds; None where none is waited for."""
        return None if self._waiting is None else self._waiting.since + self.policy.patience

    @property
    def moment(self) -> tuple[int, float]:
        """Sample number and time, with which every event begins."""
        return self._at, self._clock()

    def step(self, frame: U8) -> Step:
        """Predict for one `frame (height, width, 3)`, then learn from the stream what it shows."""
        self._at += 1
        self._events = []
        prediction, self._state, shift = infer(self.system, self.engine, self._state, frame)
        self._recent.append(Seen(self._at, frame, prediction.p, prediction.code, prediction.label, prediction.route))
        if self.phase == "probation":
            self._watch(prediction)
        elif self.phase == "serving" and not self.paused and (shift or not self.system.domains):
            self._declare(shift)
        if self.phase == "collecting":
            self._collect()
        self._advance()
        return Step(prediction, tuple(self._events))

    def poll(self) -> tuple[Event, ...]:
        """Do what needs no frame: take labels that came, end the wait for them, take the learner's outcome."""
        self._events = []
        self._advance()
        return tuple(self._events)

    def adapt_now(self, name: str | None = None) -> tuple[Event, ...]:
        """Learn from the frames at hand, known domain or not, as `name` if given. While labels are awaited: from those
        that came. Raises UsageError while paused and for too few frames, too."""
        self._events = []
        if self.paused:
            raise UsageError("learning is paused: resume it first")
        self._allowed("adapt")
        held = len(self._waiting.seen) if self._waiting else len(self._recent)
        if held < MINIMUM:
            raise UsageError(f"{held} frames at hand, at least {MINIMUM} needed: show the board more")
        if self._waiting is None:
            self._await("adapt", name)
        else:
            self._move("adapt")
            self._waiting = replace(self._waiting, name=name or self._waiting.name, since=-math.inf)
        self._advance()
        return tuple(self._events)

    def rollback(self) -> tuple[Event, ...]:
        """Undo the generation on probation."""
        return self._settled("foreign")

    def confirm(self) -> tuple[Event, ...]:
        """Make the generation on probation permanent before its time."""
        return self._settled("good")

    def pause(self, paused: bool) -> tuple[Event, ...]:
        """Stop learning, or resume: predictions and probation go on. What was collected, or is being learned, is
        dropped; a shift that still holds at the end of the pause is declared then."""
        self._events = []
        if paused and not self.paused:
            self._move("pause")
            self._drop_work()
            self._tell(Paused(*self.moment))
        elif self.paused and not paused:
            self._tell(Resumed(*self.moment))
        self.paused = paused
        return tuple(self._events)

    def replace(self, candidate: Candidate, note: str) -> tuple[Event, ...]:
        """Serve an admitted change of an operator's, permanent at once and without a way back: a domain or class
        forgotten, domains merged. A job at work is started again over it. Raises UsageError for another base's.

        It is stored twice and older generations are collected, so that none is left."""
        self._events = []
        self._allowed("replace")
        live = confirm(commit(self.live, candidate))
        for _ in range(2 if self._store is not None else 0):
            self._write(candidate.system, note)
            self._persist_confirmation()
        if self._store is not None:
            self._store.collect(keep=1)
        self.live, job = live, self._job
        self._move("replace")
        self._drop_work()
        self._recent.clear()
        self._state = self._state.restart()
        self._tell(Forgotten(*self.moment, note, self.system.generation))
        if job is not None:
            self._start(replace(job, system=self.system))
        return tuple(self._events)

    def close(self) -> None:
        """End the learner's job, if any. The board must not be used after."""
        self._learner.cancel()

    def _allowed(self, signal: Signal) -> Phase:
        to = TABLE[signal][PHASES.index(self.phase)]
        if to is None:
            raise UsageError(f"{VERBS.get(signal, signal)} is refused while {self.phase}: {REMEDY[self.phase]}")
        return to

    def _move(self, signal: Signal) -> None:
        self.phase = self._allowed(signal)

    def _declare(self, shift: Shift | None) -> None:
        self._move("shift")
        onset = self._onset(shift) if shift else self._at - 1
        self._recent = deque((s for s in self._recent if s.number > onset), maxlen=self._recent.maxlen)
        if shift:
            self._tell(Shifted(*self.moment, onset, self._attribute()))
        else:
            self._tell(Started(*self.moment))

    def _attribute(self) -> Attribution:
        """Which taps moved since the onset, against the domain that most of these frames are routed to."""
        h = _codes(list(self._recent)[-ATTRIBUTED:])
        nearest = int(np.bincount(self.system.router.route(h)).argmax())
        return attribute(self.system.space, self.system.domains[nearest].memory, h)

    def _onset(self, shift: Shift) -> int:
        """The sample after which the evidence for `shift` is largest. The test's own onset is a lower bound: its
        evidence wanders above the floor for hundreds of samples while nothing happens."""
        best, evidence, onset = -math.inf, 0.0, shift.onset
        for seen in reversed(self._recent):
            if seen.number <= shift.onset:
                break
            evidence += log_e_value(seen.p, self.system.policy.shift)
            if evidence > best:
                best, onset = evidence, seen.number - 1
        return onset

    def _collect(self) -> None:
        if len(self._recent) < self.policy.labels:
            return
        back = recognise(self.system, _codes(self._recent)) if self.system.domains else None
        if back is None:
            self._await("enough", None)
            return
        self._move("known")
        self._tell(Recognised(*self.moment, back.domain, len(self._recent)))
        self._start_afresh()

    def _await(self, signal: Signal, name: str | None) -> None:
        """The frames at hand are those to learn from."""
        self._move(signal)
        self._waiting = _Waiting(tuple(self._recent), self._clock(), name)
        self._start_afresh()
        if self.policy.patience > 0:
            numbers = self._waiting.numbers
            self._tell(LabelsWanted(*self.moment, numbers[0], numbers[-1], self.policy.patience))

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
        if now < waiting.since:  # the clock was set back: the wait starts again, instead of lasting for years
            self._waiting = replace(waiting, since=now)
        if len(known) >= min(self.policy.labels, len(waiting.seen)) or now - waiting.since >= self.policy.patience:
            self._waiting = None
            self._learn(waiting, known)

    def _learn(self, waiting: _Waiting, known: Sequence[tuple[U8, str]]) -> None:
        blind = self.policy.unlabelled if self.system.domains else None
        if len(known) < MINIMUM and blind is None:
            self._move("too few")
            self._tell(TooFewLabels(*self.moment, len(known), len(waiting.seen), MINIMUM))
            return
        self._move("labels")
        name = waiting.name or self._labeller.domain(waiting.numbers)
        if len(known) < MINIMUM:
            job = Job(self.system, name, tuple(s.frame for s in waiting.seen), (), blind)
        else:
            job = Job(self.system, name, tuple(f for f, _ in known), tuple(label for _, label in known))
        self._start(replace(job, views=self.policy.views, seed=self._seed))

    def _start(self, job: Job) -> None:
        self._tell(Searching(*self.moment, job.name, len(job.frames), job.unlabelled is None))
        try:
            self._learner.start(job)
        except BaseException:
            self._move("failed")
            raise
        self._job = job

    def _decide(self, outcome: Outcome, job: Job) -> None:
        self._job = None
        if isinstance(outcome, Rejected):
            self._move("rejected")
            self._tell(NotAdmitted(*self.moment, outcome.domain, outcome.reasons))
        elif isinstance(outcome, Failed):
            self._fail(job, outcome.reason)
        elif isinstance(outcome, Candidate):
            self._commit(outcome, job)
        else:
            assert_never(outcome)
        self._start_afresh()

    def _fail(self, job: Job, reason: str) -> None:
        self._move("failed")
        self._tell(LearningFailed(*self.moment, job.name, reason))

    def _commit(self, candidate: Candidate, job: Job) -> None:
        if candidate.base is not self.system:
            self._fail(job, "the outcome is for a generation that no longer serves: it was refused")
            return
        live = commit(self.live, candidate)
        try:
            self._write(candidate.system, f"grew {job.name}")
        except DeviceError as error:
            self._fail(job, f"the new generation cannot be stored, so it does not serve: {error}")
            return
        self._move("admitted")
        self.live, self._probation = live, []
        new = self.system.domain(job.name)
        why, classes = str(new.growth["explanation"]), len(new.head.classes)
        self._tell(Grown(*self.moment, new.name, why, classes, new.bytes, self.system.generation))

    def _write(self, system: System, note: str) -> None:
        if self._store is not None:
            self._store.commit(self._store.write(to_files(system), created=self._clock(), note=note))

    def _watch(self, prediction: Prediction) -> None:
        self._probation.append(prediction.ood)
        if len(self._probation) < self.policy.probation:
            return
        share = sum(self._probation) / len(self._probation)
        self._settle("foreign" if share > self.policy.foreign else "good", share)

    def _settled(self, signal: Literal["good", "foreign"]) -> tuple[Event, ...]:
        self._events = []
        self._settle(signal, None)
        return tuple(self._events)

    def _settle(self, signal: Literal["good", "foreign"], share: float | None) -> None:
        """End probation, for good or back to the confirmed generation. `share` of foreign frames: None where the
        operator decided."""
        self._move(signal)
        self._state = self._state.restart()
        if signal == "foreign":
            self.live = rollback(self.live)
            self._tell(RolledBack(*self.moment, self.system.generation, share, len(self._probation)))
        else:
            self.live = confirm(self.live)
            self._tell(Confirmed(*self.moment, self.system.generation, share))
        try:
            self._persist_confirmation() if signal == "good" else self._persist_rollback()
            self._collect_garbage()
        except DeviceError as error:  # a restart falls back to what was confirmed before
            self._tell(LearningFailed(*self.moment, None, f"the store does not know of it: {error}"))

    def _persist_confirmation(self) -> None:
        if self._store is not None and self._store.live is not None:
            self._store.confirm(self._store.live)

    def _collect_garbage(self) -> None:
        if self._store is not None:
            self._store.collect()

    def _persist_rollback(self) -> None:
        if self._store is not None:
            self._store.rollback()

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._on_event(event)


def _codes(seen: Sequence[Seen] | deque[Seen]) -> F32:
    """Hypervectors `(frames, D)` of frames seen; those seen before anything was learned have none."""
    return np.stack([s.code for s in seen if s.code is not None])
