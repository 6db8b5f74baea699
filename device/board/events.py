"""What happens to a board, as values: one frozen class for each thing that an operator wants to know.

Rules of this file:

1. `BoardEvent` is closed. Whoever reacts to events matches on the class; nobody compares texts.
2. `kind` is the kind of the MQTT event (device/mqtt/messages.py). A test holds both sets equal.
3. `text` is the sentence for people. `data` holds the same facts for programs, as flat JSON within the bounds of the
   `data` of an MQTT event.
4. `at` is the sample number at which it happened, `time` the time in seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from edgeear.attribution import Attribution

MAX_TEXT = 500
"""Characters of a text in `data`."""
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class _Happened:
    kind: ClassVar[str]
    sentence: ClassVar[str]
    at: int
    time: float

    @property
    def text(self) -> str:
        """`sentence` with the fields filled in."""
        return self.sentence.format(**{k: "; ".join(v) if isinstance(v, tuple) else v for k, v in vars(self).items()})

    @property
    def data(self) -> dict[str, Scalar]:
        """Every field but `at` and `time`."""
        return {f.name: _scalar(getattr(self, f.name)) for f in fields(self)[2:]}


@dataclass(frozen=True)
class Started(_Happened):
    """Nothing is learned yet; the board collects its first domain."""

    kind = "start"
    sentence = "nothing is learned yet: collecting the first domain"


@dataclass(frozen=True)
class Shifted(_Happened):
    """The stream left all known domains after sample `onset`; `at` is the sample that declared it. `attribution` says
    which taps moved."""

    kind = "shift"
    onset: int
    attribution: Attribution = field(compare=False)

    @property
    def text(self) -> str:
        left = f"the stream left all known domains after sample {self.onset} (declared at {self.at})"
        return f"{left}; by the taps that moved: {self.attribution.kind}"

    @property
    def data(self) -> dict[str, Scalar]:
        return {"onset": self.onset, "attribution": self.attribution.kind, "ratio": _scalar(self.attribution.ratio)}


@dataclass(frozen=True)
class Recognised(_Happened):
    """The collected `frames` are of a `domain` that is known: nothing is learned."""

    kind = "recognised"
    sentence = "{domain} is back: it explains the {frames} frames, none is new"
    domain: str
    frames: int


@dataclass(frozen=True)
class LabelsWanted(_Happened):
    """The board waits `wait_s` seconds for labels of the samples `first` to `last`."""

    kind = "label-wanted"
    sentence = "labels wanted for samples {first} to {last}, within {wait_s:g} s"
    first: int
    last: int
    wait_s: float


@dataclass(frozen=True)
class TooFewLabels(_Happened):
    """The wait is over and `labels` of `frames` are too few to learn from."""

    kind = "refused"
    sentence = "{labels} labels for {frames} frames, {needed} needed: nothing was learned"
    labels: int
    frames: int
    needed: int


@dataclass(frozen=True)
class Searching(_Happened):
    """A learner started on `frames` frames of `domain`."""

    kind = "search"
    domain: str
    frames: int
    labelled: bool

    @property
    def text(self) -> str:
        if self.labelled:
            return f"{self.domain}: searching a head with {self.frames} labelled frames"
        return f"{self.domain}: no labels came, adapting without labels from {self.frames} frames"


@dataclass(frozen=True)
class Grown(_Happened):
    """A new head of `bytes` bytes, memory included, serves `domain` on probation; `explanation`: why that head."""

    kind = "grown"
    sentence = "{domain}: {explanation}; generation {generation} is on probation"
    domain: str
    explanation: str
    classes: int
    bytes: int
    generation: int


@dataclass(frozen=True)
class NotAdmitted(_Happened):
    """Admission rejected what was learned of `domain`; what served before still serves."""

    kind = "rejected"
    sentence = "{domain}: {reasons}"
    domain: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class LearningFailed(_Happened):
    """A job, the store or the machine failed; what served before still serves. `domain` is None outside of a job."""

    kind = "learning-failed"
    domain: str | None
    reason: str

    @property
    def text(self) -> str:
        return self.reason if self.domain is None else f"{self.domain}: {self.reason}"


@dataclass(frozen=True)
class Confirmed(_Happened):
    """`generation` is permanent. `foreign`: share of out-of-distribution frames on probation, None where the operator
    confirmed it."""

    kind = "confirmed"
    generation: int
    foreign: float | None

    @property
    def text(self) -> str:
        why = "by the operator" if self.foreign is None else f"{self.foreign:.0%} foreign frames"
        return f"generation {self.generation} is permanent ({why})"


@dataclass(frozen=True)
class RolledBack(_Happened):
    """`generation` serves again. `foreign`: share of out-of-distribution frames among the `frames` on probation, None
    where the operator rolled back."""

    kind = "rolled-back"
    generation: int
    foreign: float | None
    frames: int

    @property
    def text(self) -> str:
        if self.foreign is None:
            return "by the operator"
        return f"{self.foreign:.0%} of {self.frames} frames were foreign to the new generation"


@dataclass(frozen=True)
class StoreDamaged(_Happened):
    """The store was damaged at the start, and an older generation serves."""

    kind = "rolled-back"
    sentence = "the store was damaged: {damage}"
    damage: str


@dataclass(frozen=True)
class Forgotten(_Happened):
    """An operator's change (`what`) is permanent as `generation`."""

    kind = "forgotten"
    sentence = "{what}; generation {generation} serves"
    what: str
    generation: int


@dataclass(frozen=True)
class Paused(_Happened):
    """The board does not learn."""

    kind = "paused"
    sentence = "{why}"
    why: str = "learning is paused, predictions go on"


@dataclass(frozen=True)
class Resumed(_Happened):
    """The board learns again."""

    kind = "resumed"
    sentence = "learning goes on"


@dataclass(frozen=True)
class PolicyChanged(_Happened):
    """An operator changed `settings`."""

    kind = "policy"
    settings: Mapping[str, Scalar]

    @property
    def text(self) -> str:
        return f"set {json.dumps(dict(self.settings))}"

    @property
    def data(self) -> dict[str, Scalar]:
        return {name: _scalar(value) for name, value in self.settings.items()}


@dataclass(frozen=True)
class SettingsIgnored(_Happened):
    """Stored settings do not fit this version: they stay stored and have no effect. `faults` says why."""

    kind = "policy"
    sentence = "stored settings that do not fit this version have no effect: {faults}"
    faults: tuple[str, ...]


@dataclass(frozen=True)
class FrameRefused(_Happened):
    """A frame could not be encoded; `ref` is what its source calls it."""

    kind = "refused"
    sentence = "frame {ref}: {error}"
    ref: str
    error: str


@dataclass(frozen=True)
class SourceChanged(_Happened):
    """Frames stopped coming because of `problem`, or come again (None)."""

    kind = "source"
    problem: str | None

    @property
    def text(self) -> str:
        return self.problem or "frames come again"


@dataclass(frozen=True)
class OutboxReset(_Happened):
    """The outbox was damaged at the start: its messages are lost, and a new one was made."""

    kind = "dropped"
    sentence = "the outbox was damaged and replaced by a new one: {damage}"
    damage: str


@dataclass(frozen=True)
class Stopped(_Happened):
    """The daemon stops."""

    kind = "stopped"
    sentence = "{why}"
    why: str = "the daemon was asked to stop"


BoardEvent = (
    Started | Shifted | Recognised | LabelsWanted | TooFewLabels | Searching | Grown | NotAdmitted
    | LearningFailed | Confirmed | RolledBack | StoreDamaged | Forgotten | Paused | Resumed | PolicyChanged
    | SettingsIgnored | FrameRefused | SourceChanged | OutboxReset | Stopped
)  # fmt: skip
ENDED = (Grown, NotAdmitted, LearningFailed)
"""The events that end an adaptation."""


def bounded(text: str, most: int) -> str:
    """At most `most` characters of `text`. Surrogates, as in names of files that are no UTF-8, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()[:most]


def _scalar(value: object) -> Scalar:
    if isinstance(value, tuple):
        value = "; ".join(map(str, value))
    if isinstance(value, str):
        return bounded(value, MAX_TEXT)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    assert value is None or isinstance(value, int)
    return value
