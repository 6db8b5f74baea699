"""A board, one frame at a time: the step function that the daemon and the simulation share.

Rules of this file (phases.py has the table of phases):

1. Every frame gets its prediction first, from the serving generation, whatever else is going on.
2. The board collects frames from the onset of a shift on, up to a bound, and asks for labels within a budget. It keeps
   the first frame of each scene (edgeear/scenes.py): near-copies cost labels and teach nothing. Where fewer than a
   fifth of the frames repeat a scene, they are alike by chance and all are kept. A board short of scenes waits, and
   says so. Where a known domain explains all collected frames together, that domain is back: the board asks for no
   labels and learns nothing.
3. The board waits `patience` seconds for labels, then learns from those that came. A learner works at its own pace;
   `poll` and every step ask for its outcome. An outcome for a generation that no longer serves is refused.
4. A new generation is on probation, whether it was learned here or offered: if the stream looks foreign to it, too, it
   is rolled back, else confirmed. Probation counts scenes, and ends after `PATIENT` times as many frames without them.
5. Each change of generation is in the store before it serves; where the store fails, nothing changes.
6. The encoder sees each frame once: hypervectors are kept with the frames. At most twice the larger of `memory` and
   `labels` frames are held, beside those of a job and those of rule 8.
7. Nothing that a learner or operator brings serves before it has answered (edgeear/proving.py). A stored domain that
   cannot answer is left out at the start, and `damage` says so.
8. Labels are not lost with a rejected domain. The board keeps its labelled frames, at most twice `labels`, and learns
   them together with those that it collects next, until it serves another generation or a known domain is back.
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
from edgeear.errors import DeviceError, EdgeearError, UsageError
from edgeear.flow import Prediction, infer
from edgeear.novelty import MINIMUM
from edgeear.proving import fault, prove
from edgeear.recognition import recognise
from edgeear.samples import AdaptPolicy
from edgeear.scenes import remember, repeats, scene_code
from edgeear.shift import Shift, ShiftState, likely_onset
from edgeear.system import Candidate, Domain, Live, Rejected, System, commit, confirm, rollback
from edgeear.types import F32, U8, Encoder
from edgeear.unlabelled import UnlabelledPolicy

ATTRIBUTED = 32
"""The latest scenes since the onset of a shift, used for its attribution."""
PATIENT = 20
"""Frames for each scene wanted, after which the board says that it is short of scenes, and ends probation without."""
COPIED = 0.2
"""Share of frames that repeat a scene from which on they are copies, and not alike by chance."""


class Labeller(Protocol):
    """Who knows the truth: a person, a slower model, or the ground truth in a simulation."""

    def label(self, at: Sequence[int]) -> Sequence[str | None]:
        """Class names for the frames with these sample numbers; None where the labeller does not know one (yet).

        The board asks for the same numbers again and again until its patience ends. Never waits."""

    def domain(self, at: Sequence[int]) -> str | None:
        """The name of the domain of these frames; None where the labeller has none: the first free `domain-N`."""


@dataclass(frozen=True)
class BoardPolicy:
    """`labels`: most labels for a shift; `memory`: scenes kept before a shift is declared; `probation`: scenes that
    probation lasts; `foreign`: share of out-of-distribution scenes on probation above which the board rolls back;
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
    """A frame, its sample number, what the board predicted for it, and whether it is the first of its scene."""

    number: int
    frame: U8
    prediction: Prediction
    first: bool


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Frames that wait for labels since `since` (seconds of the timer), and the operator's name for their domain."""

    seen: tuple[Seen, ...]
    since: float
    name: str | None = None

    @property
    def numbers(self) -> list[int]:
        return [s.number for s in self.seen]


class Board:
    """A board: a live system, a detector state and a buffer. Only `step`, `poll` and an operator's verbs change it.
    Call them from one thread. The verbs raise UsageError where the phase does not allow them.

    `clock` gives unix seconds, which stamp; `timer` seconds that never go back, which measure waits (None:
    those of `clock`). `learner` None learns inside `step` with `policy.adapt`; `on_progress` is that learner's.
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
        timer: Callable[[], float] | None = None,
    ) -> None:
        self.live, self.engine = live, OrtEngine(encoder)
        self.policy = policy or BoardPolicy()
        self.phase: Phase = "serving"
        self.paused = False
        self.at = 0
        """The sample number of the latest frame, from 1."""
        self._timer = timer or clock
        self._labeller, self._clock, self._store, self._seed = labeller, clock, store, seed
        self._learner = learner or InlineLearner(encoder, self.engine, self.policy.adapt, on_progress)
        self._on_event = on_event
        self._state = ShiftState()
        self._recent: deque[Seen] = deque(maxlen=max(self.policy.memory, self.policy.labels))
        self._scene: tuple[F32, ...] = ()
        """The code of the first frame of the latest scene: frames like it show the same one."""
        self._shown, self._repeated = 0, 0
        """Frames since `_recent` was empty or a shift began, and how many of them repeated a scene."""
        self._kept: tuple[tuple[U8, str], ...] = ()
        """Labelled frames of the latest rejected domain."""
        self._waiting: _Waiting | None = None
        self._job: Job | None = None
        self._probation: list[tuple[bool, bool]] = []
        """Of each frame on probation: whether it is out of distribution, and the first of its scene."""
        self._events: list[BoardEvent] = []
        self.live, self.damage = self._usable(live)
        """`damage` tells of stored domains that cannot serve, or only with weaker verdicts."""
        if store is not None and store.confirmed is None:
            first = generations.publish_confirmed(store, self.live.confirmed, clock(), "before anything was learned")
            self.live = Live(self.live.serving if self.live.probation else first, first)

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
        if self._waiting is None:
            return None
        return self._clock() + self._waiting.since + self.policy.patience - self._timer()

    def step(self, frame: U8) -> tuple[Prediction, tuple[BoardEvent, ...]]:
        """Predict for one `frame (height, width, 3)`, then do what the stream asks for."""
        self.at += 1
        prediction, self._state, shift = infer(self.system, self.engine, self._state, frame)
        seen = Seen(self.at, frame, prediction, self._new_scene(frame, prediction))
        self._remember(seen)
        if self.phase == "probation":
            self._watch(seen)
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
        self._drop_copies()
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
        """Make the generation on probation permanent now. Raises DeviceError where the store cannot keep that."""
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

        Raises UsageError for another generation's candidate, one without a new or changed domain and one that cannot
        answer, DeviceError where it cannot be stored; what served before serves then."""
        if isinstance(proven := self._proven(candidate), Rejected):
            raise UsageError(str(proven))
        self._enter("offer", proven, note)
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

    def _usable(self, live: Live) -> tuple[Live, tuple[BoardEvent, ...]]:
        """`live` without the domains that cannot answer, and what to tell."""
        fit, told, now = list[Domain](), list[BoardEvent](), self._clock()
        for domain in live.serving.domains:
            why = fault(live.serving, domain, self.engine, self.engine.encoder.taps, self._clock)
            if why is not None:
                told.append(events.LearningFailed(0, now, domain.name, f"{why}; it does not serve"))
                continue
            fit.append(domain)
            if domain.detector.repaired:
                why = "its stored sums are damaged, so its verdicts are weaker: learn it again, or restore a backup"
                told.append(events.LearningFailed(0, now, domain.name, why))
        if len(fit) == len(live.serving.domains):
            return live, tuple(told)
        serving = replace(live.serving, domains=tuple(fit))
        return Live(serving, live.confirmed if live.probation else serving), tuple(told)

    def _proven(self, candidate: Candidate) -> Candidate | Rejected:
        return prove(candidate, self.engine, self.engine.encoder.taps, self._clock)

    def _new_scene(self, frame: U8, prediction: Prediction) -> bool:
        """Whether the frame is the first of a scene. Only the latest scene counts: where different frames look alike,
        those of one class would be one scene for ever."""
        h = prediction.code
        if h is None:
            h = self.system.space.encode(self.engine.encode(frame, self.system.wanted_taps))[0]
        code = scene_code(h)
        if repeats(code, self._scene, max(self.system.policy.shift.alike, self.system.likeness)):
            return False
        self._scene = remember(code, (), 1)
        return True

    def _remember(self, seen: Seen) -> None:
        self._recent.append(seen)
        self._shown, self._repeated = self._shown + 1, self._repeated + (not seen.first)
        if len(self._recent) >= self.policy.labels:
            self._drop_copies()

    def _drop_copies(self) -> None:
        if self._repeated >= COPIED * self._shown:
            self._recent = deque((s for s in self._recent if s.first), maxlen=self._recent.maxlen)

    def _declare(self, shift: Shift | None) -> None:
        self.phase = after(self.phase, "shift")
        if shift is None:
            self._recent = deque(list(self._recent)[-1:], maxlen=self._recent.maxlen)
            self._shown, self._repeated = 1, 0
            self._tell(events.Started(*self.moment))
            return
        scenes = [(s.number, s.prediction.p) for s in self._recent if s.first]
        onset = likely_onset(shift, scenes, self.system.policy.shift)
        self._recent = deque((s for s in self._recent if s.number > onset), maxlen=self._recent.maxlen)
        self._shown, self._repeated = len(self._recent), sum(not s.first for s in self._recent)
        h = _codes(list(self._recent)[-ATTRIBUTED:])
        nearest = int(np.bincount(self.system.router.route(h)).argmax())
        moved = attribute(self.system.space, self.system.domains[nearest].memory, h)
        self._tell(events.Shifted(*self.moment, onset, moved))

    def _collect(self) -> None:
        if len(self._recent) < self.policy.labels:
            if self._shown == PATIENT * self.policy.labels:
                scenes = sum(s.first for s in self._recent)
                self._tell(events.TooFewScenes(*self.moment, scenes, self._shown, self.policy.labels))
            return
        back = recognise(self.system, _codes(self._recent)) if self.system.domains else None
        if back is None:
            self._await("enough", None)
            return
        self.phase = after(self.phase, "known")
        self._tell(events.Recognised(*self.moment, back.domain, len(self._recent)))
        self._kept = ()
        self._start_afresh()

    def _await(self, signal: Signal, name: str | None) -> None:
        """Wait for labels of the collected frames."""
        self.phase = after(self.phase, signal)
        self._waiting = _Waiting(tuple(self._recent), self._timer(), name)
        self._start_afresh()
        if self.policy.patience > 0:
            numbers = self._waiting.numbers
            self._tell(events.LabelsWanted(*self.moment, numbers[0], numbers[-1], self.policy.patience))

    def _start_afresh(self) -> None:
        self._recent.clear()
        self._scene, self._shown, self._repeated = (), 0, 0
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
        labels, now = self._labeller.label(waiting.numbers), self._timer()
        known = [(s.frame, label) for s, label in zip(waiting.seen, labels, strict=True) if label is not None]
        if len(known) >= min(self.policy.labels, len(waiting.seen)) or now - waiting.since >= self.policy.patience:
            self._waiting = None
            self._learn(waiting, [*self._kept, *known] if known else known)

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
                self._reject(job, outcome)
            case Failed():
                self._fail(job, outcome.reason)
            case Candidate() if outcome.base is not self.system:
                self._fail(job, "the outcome is for a generation that no longer serves: it was refused")
            case Candidate():
                try:
                    proven = self._proven(outcome)
                    if isinstance(proven, Rejected):
                        self._reject(job, proven)
                    else:
                        self._enter("admitted", proven, f"grew {job.name}")
                except DeviceError as error:
                    self._fail(job, f"the new generation cannot be stored, so it does not serve: {error}")
                except EdgeearError as error:
                    self._fail(job, f"the outcome cannot serve: {error}")
            case _:
                assert_never(outcome)
        self._start_afresh()

    def _reject(self, job: Job, outcome: Rejected) -> None:
        self.phase = after(self.phase, "rejected")
        if isinstance(job, LabelledJob):
            most = 2 * self.policy.labels
            self._kept = tuple(zip(job.frames, job.labels, strict=True))[-most:]
        self._tell(events.NotAdmitted(*self.moment, outcome.domain, outcome.reasons, outcome.twin, len(self._kept)))

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
        self.phase, self.live, self._probation, self._kept = phase, live, [], ()
        self._drop_work()
        self._start_afresh()
        why, classes = str(new.growth.get("explanation", note)), len(new.head.classes)
        self._tell(events.Grown(*self.moment, new.name, why, classes, new.bytes, self.system.generation))

    def _watch(self, seen: Seen) -> None:
        self._probation.append((seen.prediction.ood, seen.first))
        judged = [ood for ood, first in self._probation if first]
        if len(self._probation) - len(judged) < COPIED * len(self._probation):
            judged = [ood for ood, _ in self._probation]
        if len(judged) >= self.policy.probation or len(self._probation) >= PATIENT * self.policy.probation:
            share = sum(judged) / max(1, len(judged))
            foreign = share > self.policy.foreign and len(judged) >= min(MINIMUM, self.policy.probation)
            try:
                self._settle("foreign" if foreign else "good", share)
            except DeviceError as error:
                self._probation = []
                why = f"generation {self.system.generation} cannot be confirmed and stays on probation: {error}"
                self._tell(events.LearningFailed(*self.moment, None, why))

    def _settle(self, signal: Literal["good", "foreign"], share: float | None) -> None:
        """End probation, for good or back to the confirmed generation. `share` of foreign frames: None where the
        operator decided. Raises DeviceError where the store cannot confirm; nothing has changed then."""
        phase = after(self.phase, signal)
        if signal == "good" and self._store is not None:
            generations.confirm(self._store)
        self.phase, self._state = phase, self._state.restart()
        if signal == "good":
            self.live = confirm(self.live)
            self._tell(events.Confirmed(*self.moment, self.system.generation, share))
            return
        self.live = rollback(self.live)
        self._tell(events.RolledBack(*self.moment, self.system.generation, share, len(self._probation)))
        try:
            if self._store is not None:
                generations.roll_back(self._store)
        except DeviceError as error:  # a restart rolls back, too
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
