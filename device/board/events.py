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
from typing import ClassVar, dataclass_transform

from device.files import escaped
from edgeear.attribution import Attribution

MAX_TEXT = 500
"""Characters of a text in `data`."""
Scalar = str | int | float | bool | None


@dataclass_transform(frozen_default=True)
@dataclass(frozen=True)
class _Happened:
    """Subclasses give their kind, and a template of their sentence unless they have a `text` of their own. They become
    dataclasses by themselves."""

    kind: ClassVar[str]
    sentence: ClassVar[str]
    at: int
    time: float

    def __init_subclass__(cls, kind: str, sentence: str = "") -> None:
        cls.kind, cls.sentence = kind, sentence
        dataclass(frozen=True)(cls)

    @property
    def text(self) -> str:
        """`sentence` with the fields filled in."""
        return self.sentence.format(**{k: "; ".join(v) if isinstance(v, tuple) else v for k, v in vars(self).items()})

    @property
    def data(self) -> dict[str, Scalar]:
        """Every field but `at` and `time`."""
        return {f.name: _scalar(getattr(self, f.name)) for f in fields(self)[2:]}


class Started(_Happened, kind="start", sentence="nothing is learned yet: collecting the first domain"):
    pass


class Shifted(_Happened, kind="shift"):
    """The stream left all known domains after sample `onset`; `at` is the sample that declared it. `attribution` says
    which taps moved."""

    onset: int
    attribution: Attribution = field(compare=False)

    @property
    def text(self) -> str:
        left = f"the stream left all known domains after sample {self.onset} (declared at {self.at})"
        return f"{left}; by the taps that moved: {self.attribution.kind}"

    @property
    def data(self) -> dict[str, Scalar]:
        return {"onset": self.onset, "attribution": self.attribution.kind, "ratio": _scalar(self.attribution.ratio)}


class Recognised(
    _Happened, kind="recognised", sentence="{domain} is back: it explains the {frames} frames, none is new"
):
    domain: str
    frames: int


class LabelsWanted(
    _Happened, kind="label-wanted", sentence="labels wanted for samples {first} to {last}, within {wait_s:g} s"
):
    first: int
    last: int
    wait_s: float


class TooFewScenes(
    _Happened,
    kind="too-few-scenes",
    sentence="{frames} frames show only {scenes} scenes, {needed} are wanted: the board waits for more before it asks "
    "for labels; show it more, or send adapt to learn from these",
):
    """`frames` collected frames show only `scenes` scenes, and `needed` are wanted."""

    scenes: int
    frames: int
    needed: int


class TooFewLabels(
    _Happened, kind="refused", sentence="{labels} labels for {frames} frames, {needed} needed: nothing was learned"
):
    labels: int
    frames: int
    needed: int


class Searching(_Happened, kind="search"):
    """A learner started on `frames` frames of `domain`."""

    domain: str
    frames: int
    labelled: bool

    @property
    def text(self) -> str:
        if self.labelled:
            return f"{self.domain}: searching a head with {self.frames} labelled frames"
        return f"{self.domain}: no labels came, adapting without labels from {self.frames} frames"


class Grown(_Happened, kind="grown", sentence="{domain}: {explanation}; generation {generation} is on probation"):
    """`bytes` of the new head, memory included; `explanation`: why that head."""

    domain: str
    explanation: str
    classes: int
    bytes: int
    generation: int


class NotAdmitted(_Happened, kind="rejected"):
    """Admission rejected what was learned of `domain`; what served before still serves. `twin`: the known domain that
    it may be. The board keeps `kept` labelled frames of it."""

    domain: str
    reasons: tuple[str, ...]
    twin: str | None = None
    kept: int = 0

    @property
    def text(self) -> str:
        said = f"{self.domain}: {'; '.join(self.reasons)}"
        if self.twin is None or not self.kept:
            return said
        wait = f"its {self.kept} labelled frames are kept and learned together with the next that get labels: wait"
        return f"{said}; {wait}, or update {self.twin!r} with such frames if the two are one domain"


class LearningFailed(_Happened, kind="learning-failed"):
    """A job, the store or the machine failed; what served before still serves. `domain` is None outside of a job."""

    domain: str | None
    reason: str

    @property
    def text(self) -> str:
        return self.reason if self.domain is None else f"{self.domain}: {self.reason}"


class Confirmed(_Happened, kind="confirmed"):
    """`foreign`: share of out-of-distribution frames on probation, None where the operator confirmed."""

    generation: int
    foreign: float | None

    @property
    def text(self) -> str:
        why = "by the operator" if self.foreign is None else f"{self.foreign:.0%} foreign frames"
        return f"generation {self.generation} is permanent ({why})"


class RolledBack(_Happened, kind="rolled-back"):
    """`generation` serves again. `foreign`: share of out-of-distribution frames among the `frames` on probation, None
    where nobody counted. `restart`: the generation on probation when the daemon stopped, if that was the cause; the
    operator is the cause where both are None."""

    generation: int
    foreign: float | None
    frames: int
    restart: int | None = None

    @property
    def text(self) -> str:
        if self.restart is not None:
            return (
                f"generation {self.restart} was on probation when the daemon stopped: generation {self.generation} "
                "serves again, and what was learned since is lost; teach it again"
            )
        if self.foreign is None:
            return "by the operator"
        return f"{self.foreign:.0%} of {self.frames} frames were foreign to the new generation"


class StoreDamaged(_Happened, kind="store-damaged", sentence="the store was damaged: {damage}"):
    """An older generation serves."""

    damage: str


class Forgotten(_Happened, kind="forgotten", sentence="{what}; generation {generation} serves"):
    """An operator's change (`what`) is permanent as `generation`."""

    what: str
    generation: int


class Paused(_Happened, kind="paused", sentence="{why}"):
    why: str = "learning is paused, predictions go on"


class Resumed(_Happened, kind="resumed", sentence="learning goes on"):
    pass


class PolicyChanged(_Happened, kind="policy"):
    """An operator changed `settings`."""

    settings: Mapping[str, Scalar]

    @property
    def text(self) -> str:
        return f"set {json.dumps(dict(self.settings))}"

    @property
    def data(self) -> dict[str, Scalar]:
        return {name: _scalar(value) for name, value in self.settings.items()}


class SettingsIgnored(
    _Happened, kind="settings-ignored", sentence="stored settings that do not fit this version have no effect: {faults}"
):
    faults: tuple[str, ...]


class FrameRefused(_Happened, kind="frame-refused", sentence="frame {ref}: {error}"):
    """A frame could not be encoded; `ref` is what its source calls it."""

    ref: str
    error: str


class SourceChanged(_Happened, kind="source"):
    """Frames stopped coming because of `problem`, or come again (None)."""

    problem: str | None

    @property
    def text(self) -> str:
        return self.problem or "frames come again"


class MessagesLost(_Happened, kind="dropped"):
    """The disk changed `count` messages in the outbox and they were dropped; None where the whole outbox was replaced
    because of `damage`."""

    damage: str
    count: int | None = None

    @property
    def text(self) -> str:
        if self.count is None:
            return f"the outbox was damaged and replaced by a new one: {self.damage}"
        return f"{self.count} messages in the outbox were damaged and dropped: {self.damage}"


class Stopped(_Happened, kind="stopped", sentence="{why}"):
    why: str = "the daemon was asked to stop"


BoardEvent = (
    Started | Shifted | Recognised | LabelsWanted | TooFewScenes | TooFewLabels | Searching | Grown | NotAdmitted
    | LearningFailed | Confirmed | RolledBack | StoreDamaged | Forgotten | Paused | Resumed | PolicyChanged
    | SettingsIgnored | FrameRefused | SourceChanged | MessagesLost | Stopped
)  # fmt: skip
ENDED = (Grown, NotAdmitted, LearningFailed)
"""The events that end an adaptation."""


def bounded(text: str, most: int) -> str:
    """At most `most` characters of `text`, as text that can be sent."""
    return escaped(text)[:most]


def _scalar(value: object) -> Scalar:
    if isinstance(value, tuple):
        value = "; ".join(map(str, value))
    if isinstance(value, str):
        return bounded(value, MAX_TEXT)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    assert value is None or isinstance(value, int)
    return value
