"""A learner turns a job into a candidate: at once, or in another process while the board goes on serving.

Rules of this file:

1. A job is a snapshot: its base generation and its frames never change, whatever the board does. A new kind of job is
   one more member of `Job`.
2. A learner has one job at a time. `poll` gives its outcome once, and None before and after.
3. A learner that crashes, or is stopped at a limit, is an outcome (`Failed`), never an exception and never a candidate.
4. The learner encodes the frames as training sees them (`views`); the board does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

import numpy as np

from adaptors.progress import Progress
from device.images.views import view
from edgeear.errors import UsageError
from edgeear.flow import adapt
from edgeear.samples import AdaptPolicy, Samples
from edgeear.system import Candidate, Engine, Rejected, System
from edgeear.types import U8, Encoder, Features
from edgeear.unlabelled import UnlabelledPolicy, adapt_unlabelled


@dataclass(frozen=True, eq=False)
class _Job:
    """Grow the domain `name` over `system` from `frames`, at least one, each `(height, width, 3)`. `views`: how frames
    are shown to training."""

    system: System
    name: str
    frames: tuple[U8, ...]
    views: tuple[str, ...] = field(default=("plain", "flip"), kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.frames:
            raise UsageError(f"a job for {self.name!r} has 0 frames: it needs at least 1")


@dataclass(frozen=True, eq=False)
class LabelledJob(_Job):
    """`labels` are the class names of the frames. Raises UsageError where their numbers differ."""

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) != len(self.frames):
            raise UsageError(f"{len(self.labels)} labels for {len(self.frames)} frames of a job: give one for each")


@dataclass(frozen=True, eq=False)
class UnlabelledJob(_Job):
    """`policy` says how to learn without labels."""

    policy: UnlabelledPolicy


Job = LabelledJob | UnlabelledJob


@dataclass(frozen=True)
class Failed:
    """The learner gave no answer; the live system is unchanged. `reason` names what failed, limit and remedy."""

    reason: str


Outcome = Candidate | Rejected | Failed


class Learner(Protocol):
    """Runs one job at a time."""

    def start(self, job: Job) -> None:
        """Start a job; raises UsageError while another one runs."""

    def poll(self) -> Outcome | None:
        """The outcome, once; None while there is none. Never waits."""

    def cancel(self) -> None:
        """End the job, if any, without an outcome."""


class InlineLearner:
    """Learns inside `start`, which raises the errors of the flow: for the simulation, where nothing else has to run."""

    def __init__(
        self,
        encoder: Encoder,
        engine: Engine,
        policy: AdaptPolicy | None = None,
        on_progress: Progress = lambda *_: None,
    ) -> None:
        self._encoder, self._engine = encoder, engine
        self._policy, self._on_progress = policy or AdaptPolicy(), on_progress
        self._outcome: Outcome | None = None

    def start(self, job: Job) -> None:
        self._outcome = learn(job, self._encoder, self._engine, self._policy, self._on_progress)

    def poll(self) -> Outcome | None:
        outcome, self._outcome = self._outcome, None
        return outcome

    def cancel(self) -> None:
        self._outcome = None


def learn(
    job: Job, encoder: Encoder, engine: Engine, policy: AdaptPolicy, on_progress: Progress
) -> Candidate | Rejected:
    """Run a job in this process. Needs torch (the `learn` extra); raises what `flow.adapt` raises."""
    match job:
        case LabelledJob():
            views = _views(job, encoder, [t.name for t in job.system.space.taps], on_progress)
            classes = tuple(sorted(set(job.labels)))
            labels = np.array([classes.index(label) for label in job.labels], np.int64)
            return adapt(job.system, Samples(job.name, views, labels, classes), policy, job.seed, on_progress)
        case UnlabelledJob():
            views = _views(job, encoder, job.system.wanted_taps, on_progress)
            return adapt_unlabelled(job.system, engine, job.name, views, job.policy, policy, job.seed, on_progress)
        case _:
            assert_never(job)


def _views(job: Job, encoder: Encoder, taps: Sequence[str], on_progress: Progress) -> list[Features]:
    views: list[Features] = []
    for k, how in enumerate(job.views):
        done = []
        for i, frame in enumerate(job.frames):
            done.append(encoder.encode(view(frame, how)[None], taps))
            on_progress("encode", k * len(job.frames) + i + 1, len(job.frames) * len(job.views))
        views.append({t: np.concatenate([d[t] for d in done]) for t in taps})
    return views
